"""Writes the part of a checkpoint that a phone needs, in the precision that it is to be held in."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from split_model.config import ModelConfig, ModelError, read_object
from split_model.layout import Shape, needed
from split_model.part import Part
from split_model.quantised import DTYPES, QUANTISED, Quantised, description, tensors
from split_model.settings import Precision
from split_model.tokenizer import ChatTokenizer
from split_model.weights import Checkpoint

SHARD = 512 << 20  # bytes of a file; as much is in memory at a time
BITS = {Precision.FP32: 32, Precision.BF16: 16, Precision.INT8: 8, Precision.INT4: 6}  # of a weight, at most
COPIED = ("*.json", "*.jinja", "LICENSE*")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written; bytes of the weights' files."""

    layers: int
    head: bool
    before: int
    after: int


def pack(folder: Path, out: Path, split: int | None, precision: Precision,
         progress: Callable[[int, int], None] = lambda done, total: None) -> Packed:  # fmt: skip
    """Layers `[0, split)` with the embedding into the new folder `out`; None: all, with norm and head.

    `progress` hears how many of how many weights are done. Raises ModelError, OSError; `out` is then not there.
    """
    config, out = ModelConfig.read(folder), out.absolute()
    split = config.layers if split is None else split
    if not 0 <= split <= config.layers:
        raise ModelError(f"--split {split}, {config.name} has {config.layers} layers")
    if precision not in BITS:
        raise ModelError(f"--precision {precision}, can be stored as {', '.join(BITS)}")
    if Part.read(folder) is not None:
        raise ModelError(f"{folder}: packed already; pack the checkpoint that it was made from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: there is something already")
    ChatTokenizer.load(folder)  # or a phone would be the first to see that there is none
    head = split == config.layers
    checkpoint = Checkpoint(folder)
    checkpoint.check(config, 0, split, embedding=split > 0, head=head)
    wanted = list(needed(config, 0, split, split > 0, head))
    _has_room(out, sum(math.prod(shape) for _, shape in wanted) * BITS[precision] // 8)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _copy(folder, partial, precision)
        digest = checkpoint.digest(config.arithmetic).hex()
        Part(config.name, digest, config.arithmetic, split, head, precision, partial / "tandem.json").write()
        _write(partial, _held(checkpoint, wanted, precision, progress))
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Packed(split, head, _size(folder), _size(out))


def _has_room(out: Path, size: int) -> None:
    there = next(place for place in out.parents if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < size:
        raise ModelError(f"{out}: needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


def _copy(folder: Path, partial: Path, precision: Precision) -> None:
    """All that is not weights, and a config that says how those are stored."""
    for path in (path for pattern in COPIED for path in folder.glob(pattern)):
        if path.name not in ("config.json", INDEX):
            shutil.copyfile(path, partial / path.name)
    config = {name: value for name, value in read_object(folder / "config.json").items() if name != "torch_dtype"}
    config["dtype"] = str(DTYPES[precision]).removeprefix("torch.")
    if precision in QUANTISED:
        config["quantization_config"] = description(precision)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def _held(checkpoint: Checkpoint, wanted: list[tuple[str, Shape]], precision: Precision,
          progress: Callable[[int, int], None]) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    done, total = 0, sum(math.prod(shape) for _, shape in wanted)
    for name, shape in wanted:
        if len(shape) == 1:
            yield {name: checkpoint.tensor(name, shape, DTYPES[precision])}
        else:
            held = checkpoint.matrix(name, shape, precision)
            yield tensors(name, held) if isinstance(held, Quantised) else {name: held}
        done += math.prod(shape)
        progress(done, total)


def _write(folder: Path, groups: Iterator[dict[str, Tensor]]) -> None:
    """One file, or shards with an index; what belongs together is in one of them."""
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}

    def save() -> None:
        path = folder / f"model-{len(shards) + 1:05}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ModelError(f"{path.name} cannot be written: {error}") from None
        path.chmod((folder / "config.json").stat().st_mode)  # the library's own is 0600
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for group in groups:
        if shard and sum(tensor.nbytes for tensor in (*shard.values(), *group.values())) > SHARD:
            save()
        shard |= group
    save()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    places = {name: f"model-{at + 1:05}.safetensors" for at, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": sum(sum(names.values()) for names in shards)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
