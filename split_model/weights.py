"""Tensors of a checkpoint directory: found by name, read on demand, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from split_model.config import ModelConfig, ModelError, read_object
from split_model.layout import EMBEDDING, HEAD, Shape, needed, strange
from split_model.part import Part
from split_model.quantised import DTYPES, QUANTISED, Matrix, Quantised, quantise
from split_model.settings import Precision

WHOLE = 1 << 20  # a tensor up to this many bytes is digested whole, a larger one by sample
PIECES, PIECE = 16, 4096
FLOATS = ("F32", "BF16", "F16")


class Checkpoint:
    """The safetensors of one directory, a single file or an index of shards. Raises ModelError."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such model directory")
        self.folder, self._part = folder, Part.read(folder)
        index = folder / "model.safetensors.index.json"
        shards = _shards(index) if index.exists() else {}
        paths = sorted(set(shards.values())) or [folder / "model.safetensors"]
        self._files = {path: _open(path) for path in paths}
        held = {path: frozenset(file.keys()) for path, file in self._files.items()}
        for name, path in shards.items():
            if name not in held[path]:
                raise ModelError(f"{index}: {name} is not in {path.name}")
        self._home = {name: path for path in paths for name in held[path]} | shards

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def check(self, config: ModelConfig, first: int, stop: int, *, embedding: bool, head: bool) -> None:
        """Compares names, types and shapes with what `config` says, from the files' headers alone. Raises ModelError.

        What is not asked for may be missing; names that do not belong to such a model may not be there at all.
        """
        for name in strange(config, self._home):
            what = f"a {config.architecture} of {config.layers} layers"
            raise ModelError(f"{self._home[name]}: tensor {name} is not one of {what}")
        if self._part is not None:
            self._part.check(first, stop, embedding=embedding, head=head)
        for name, shape in needed(config, first, stop, embedding, head):
            self._check(name, shape)

    def _check(self, name: str, shape: Shape) -> None:
        path = self._home.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        if f"{name}_scale" in self and len(shape) == 2:
            return  # integers, which are checked with their scale
        found = self._files[path].get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ModelError(f"{path}: {name} has shape {tuple(found.get_shape())}, the config says {shape}")
        if found.get_dtype() not in FLOATS:
            raise ModelError(f"{path}: {name} is {found.get_dtype()}, only {', '.join(FLOATS)} are supported")

    def tensor(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A copy of the tensor, so that a file replaced later cannot change or fault a running model."""
        return self._float(name, shape).to(dtype, copy=True)

    def matrix(self, name: str, shape: Shape, precision: Precision) -> Matrix:
        """The same as `precision` holds it: quantised here, where it was not stored so; embedding and head as int8."""
        if precision in QUANTISED and name in (EMBEDDING, HEAD):
            precision = Precision.INT8  # so that both use one table: looked up as it is, and multiplied as it is
        if f"{name}_scale" in self:
            return self._stored(name, shape, precision)
        if precision in QUANTISED:
            return quantise(self._float(name, shape), precision)
        return self.tensor(name, shape, DTYPES[precision])

    def _stored(self, name: str, shape: Shape, precision: Precision) -> Matrix:
        values, scale = (self._files[self._home[one]].get_tensor(one) for one in (name, f"{name}_scale"))
        kind = Precision.INT8 if values.dtype == torch.int8 else Precision.INT4
        found = Quantised(values.clone(), scale.clone(), kind)
        if found.problem(shape):
            raise ModelError(f"{self._home[name]}: {name}: {found.problem(shape)}")
        if precision not in QUANTISED:
            return found.float().to(DTYPES[precision])
        if (kind is Precision.INT4) != (precision is Precision.INT4):
            raise ModelError(f"{self._home[name]}: {name} is stored as {kind}, which cannot be held as {precision}")
        return replace(found, precision=precision)

    def _float(self, name: str, shape: Shape) -> Tensor:
        self._check(name, shape)
        found: Tensor = self._files[self._home[name]].get_tensor(name)
        if not all(end.isfinite() for end in torch.aminmax(found)):  # a NaN is both
            raise ModelError(f"{self._home[name]}: {name} holds a number that is not finite")
        return found

    def digest(self, arithmetic: str) -> bytes:
        """16 bytes over every tensor's name, type, shape and data, however the tensors are spread over files.

        Data of more than 1 MiB is read at 16 evenly spaced places of 4 KiB, so that a large model costs little;
        another training run changes them all, a single flipped bit may go unseen. A packed part has its source's.
        """
        if self._part is not None:
            return self._part.digest(arithmetic)
        total = hashlib.sha256(arithmetic.encode())
        parts = sorted(part for path in self._files for part in _tensor_digests(path))
        for name, digest in parts:
            total.update(name.encode() + b"\0" + digest)
        return total.digest()[:16]


def _shards(index: Path) -> dict[str, Path]:
    """Where the index says that each tensor is."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: {name} is in {shard!r}, not a plain file name of safetensors")
    return {name: index.parent / shard for name, shard in shards.items()}


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def _tensor_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            for at, size in _pieces(start, stop):
                file.seek(8 + length + at)
                digest.update(file.read(size))
            yield name, digest.digest()


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    if stop - start <= WHOLE:
        yield start, stop - start
        return
    stride = (stop - start - PIECE) // (PIECES - 1)
    for piece in range(PIECES):
        yield start + piece * stride, PIECE
