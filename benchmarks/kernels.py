"""Kernels of products side by side: microseconds for the four of a layer of the 135M shape, and for its head.

    python benchmarks/kernels.py [--threads 1 2] [--rows 1 5 16 128 512] [--rounds 9]

Activations come and go in bfloat16. Weights of many layers are used in turn, so that no cache holds them, and kernels
take turns, too; a cell is the median of the rounds. Ours is left out where it was not built.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from split_model import native
from split_model.integers import _int4, _int8, _int8_fast
from split_model.linear import Linear, _bf16
from split_model.quantised import Quantised, quantise
from split_model.settings import Precision

LAYER, HEAD = ((960, 576), (576, 576), (3072, 576), (576, 1536)), (49152, 576)
LAYERS = 40  # 70 MB of int8
LEAST_S = 0.01  # of a round
FLOATS: dict[str, Callable[[torch.Tensor], Linear]] = {
    "bf16, oneDNN": lambda held: _bf16(held, None),
    "bf16, ours": lambda held: native.bf16(held, None),
}
KERNELS: dict[str, tuple[Precision, Callable[[Quantised], Linear]]] = {
    "int8, fbgemm": (Precision.INT8, lambda held: _int8(held, None, shared=False)),
    "int8, `_int_mm`": (Precision.INT8, lambda held: _int8(held, None, shared=True)),
    "int8, ours": (Precision.INT8, lambda held: native.int8(native.tiled(held), None)),
    "int8-fast, `linear_dynamic`": (Precision.INT8_FAST, lambda held: _int8_fast(held, None)),
    "int4, `_weight_int4pack_mm_for_cpu`": (Precision.INT4, lambda held: _int4(held, None)),
    "int4, ours": (Precision.INT4, lambda held: native.int4(held, None)),
}


def products(shapes: tuple[tuple[int, int], ...], count: int) -> dict[str, list[list[Linear]]]:
    """For every kernel, `count` layers of products."""
    found: dict[str, list[list[Linear]]] = {}
    wanted = [name for name in (*FLOATS, *KERNELS) if "ours" not in name or native.library() is not None]
    for _ in range(count):
        weights = [torch.randn(shape) for shape in shapes]
        held = {kind: [quantise(weight, kind) for weight in weights] for kind in {kind for kind, _ in KERNELS.values()}}
        for name in wanted:
            if name in FLOATS:
                made = [FLOATS[name](weight.bfloat16()) for weight in weights]
            else:
                kind, make = KERNELS[name]
                made = [make(weight) for weight in held[kind]]
            found.setdefault(name, []).append(made)
    return found


def walk(layers: list[list[Linear]], inputs: list[torch.Tensor]) -> Iterator[None]:
    """One layer a step, for ever."""
    while True:
        for layer in layers:
            for product, x in zip(layer, inputs, strict=True):
                product(x)
            yield


def measure(kernels: dict[str, list[list[Linear]]], widths: list[int], rows: int, rounds: int) -> dict[str, float]:
    """Microseconds of a layer, for each kernel."""
    inputs = [torch.randn(rows, width).bfloat16() for width in widths]
    walks = {name: walk(layers, inputs) for name, layers in kernels.items()}
    found: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name, steps in walks.items():
            next(steps)
            began, count = time.perf_counter(), 0
            while (took := time.perf_counter() - began) < LEAST_S:
                next(steps)
                count += 1
            found[name].append(1e6 * took / count)
    return {name: statistics.median(times) for name, times in found.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels of products side by side.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for title, shapes, count in (("the four products of a layer", LAYER, LAYERS), ("the head", (HEAD,), 3)):
        kernels = products(shapes, count)
        for threads in given.threads:
            torch.set_num_threads(threads)
            table = Table(title=f"{title}, µs, {threads} thread{'s' if threads > 1 else ''}")
            for column in ("kernel", *(f"{rows} row{'s' if rows > 1 else ''}" for rows in given.rows)):
                table.add_column(column, justify="left" if column == "kernel" else "right")
            cells = [measure(kernels, [width for _, width in shapes], rows, given.rounds) for rows in given.rows]
            for name in kernels:
                table.add_row(name, *(f"{own[name]:,.0f}" for own in cells))
            Console(width=110).print(table)
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    print(f"medians of {given.rounds}; {machine}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
