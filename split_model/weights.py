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

from split_model.config import ModelError, read_object
from split_model.quantised import DTYPES, QUANTISED, Matrix, Quantised, quantise
from split_model.settings import Precision

WHOLE = 1 << 20  # a tensor up to this many bytes is digested whole, a larger one by sample
PIECES, PIECE = 16, 4096


class Checkpoint:
    """The safetensors of one directory, a single file or an index of shards. Raises ModelError."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such model directory")
        self.folder = folder
        self._files = {path: _open(path) for path in self._paths()}
        self._home = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return [self.folder / "model.safetensors"]
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(f"{index}: no weight_map")
        names = sorted(set(shards.values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ModelError(f"{index}: a shard is not a plain file name")
        return [self.folder / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of the tensor, so that a file replaced later cannot change or fault a running model."""
        return self._float(name, shape).to(dtype, copy=True)

    def matrix(self, name: str, shape: tuple[int, int], precision: Precision) -> Matrix:
        """The same as `precision` holds it: quantised here, where it was not stored so."""
        if f"{name}_scale" in self:
            return self._stored(name, shape, precision)
        if precision in QUANTISED:
            return quantise(self._float(name, shape), precision)
        return self.tensor(name, shape, DTYPES[precision])

    def _stored(self, name: str, shape: tuple[int, int], precision: Precision) -> Matrix:
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

    def _float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self._home.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        found: Tensor = self._files[path].get_tensor(name)
        if tuple(found.shape) != shape:
            raise ModelError(f"{path}: {name} has shape {tuple(found.shape)}, the config says {shape}")
        if found.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"{path}: {name} is {found.dtype}, only float32, bfloat16 and float16 are supported")
        return found

    def digest(self, arithmetic: str) -> bytes:
        """16 bytes over every tensor's name, type, shape and data, however the tensors are spread over files.

        Data of more than 1 MiB is read at 16 evenly spaced places of 4 KiB, so that a large model costs little;
        another training run changes them all, a single flipped bit may go unseen.
        """
        total = hashlib.sha256(arithmetic.encode())
        parts = sorted(part for path in self._files for part in _tensor_digests(path))
        for name, digest in parts:
            total.update(name.encode() + b"\0" + digest)
        return total.digest()[:16]


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
