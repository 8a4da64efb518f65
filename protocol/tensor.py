"""torch ⇄ bytes: hidden states as they cross the wire."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Hidden
from protocol.limits import TENSOR_CHUNK

WIDTH_BYTES = 2  # bf16


def pack(x: torch.Tensor, position: int) -> Iterator[Hidden]:
    """Cuts bf16 hidden states `[n, width]` of positions from `position` on into frames of TENSOR_CHUNK bytes."""
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"hidden states must be bfloat16 [n, width], not {x.dtype} {list(x.shape)}")
    rows = max(1, TENSOR_CHUNK // (x.shape[1] * WIDTH_BYTES))
    for start in range(0, len(x), rows):
        part = x[start : start + rows].contiguous()
        yield Hidden(position + start, len(part), part.shape[1], part.view(torch.uint8).numpy().tobytes())


def unpack(frame: Hidden, width: int) -> torch.Tensor:
    """The frame's hidden states, bf16 `[rows, width]`; refuses another width, and numbers that are not finite."""
    if frame.width != width:
        raise BadFrame(f"hidden states of width {frame.width}, the model's is {width}")
    x = torch.frombuffer(bytearray(frame.data), dtype=torch.bfloat16).view(frame.rows, width)
    if not bool(torch.isfinite(x).all()):
        raise SessionFault(FaultCode.NOT_FINITE, f"hidden states at positions from {frame.position} on are not finite")
    return x
