"""torch ⇄ bytes: hidden states as they cross the wire, in bf16 or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Hidden, Scaled, position_bytes
from protocol.limits import CHANNELS_APART, TENSOR_CHUNK

OUTLIER = 4.0  # times the median channel: beyond, a channel goes apart, so that it costs the others two bits at most


def pack(x: torch.Tensor, position: int, bits: int = 16) -> Iterator[Hidden]:
    """Cuts bf16 hidden states `[n, width]` of positions from `position` on into frames of TENSOR_CHUNK bytes.

    With 8 bits each is rounded to 127 steps either way of its row's largest channel, those apart not counted.
    """
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"hidden states must be bfloat16 [n, width], not {x.dtype} {list(x.shape)}")
    width = x.shape[1]
    rows = max(1, TENSOR_CHUNK // (position_bytes(width, bits) + (2 * (width // CHANNELS_APART) if bits == 8 else 0)))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        if bits == 8:
            yield _round(part, position + start)
        else:
            yield Hidden(position + start, len(part), width, _bytes(part))


def unpack(frame: Hidden, width: int) -> torch.Tensor:
    """The frame's hidden states, bf16 `[rows, width]`; refuses another width, and numbers that are not finite."""
    if frame.width != width:
        raise BadFrame(f"hidden states of width {frame.width}, the model's is {width}")
    x = _restored(frame, frame.scaled) if frame.scaled else _bf16(frame.data).view(frame.rows, width)
    if not bool(torch.isfinite(x).all()):
        raise SessionFault(FaultCode.NOT_FINITE, f"hidden states at positions from {frame.position} on are not finite")
    return x


def _round(x: torch.Tensor, position: int) -> Hidden:
    values, apart = x.float(), _outliers(x)
    values[:, apart] = 0
    # Rows of nothing but zeros, or nearly so, have a scale all the same.
    scales = (values.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    data = (values / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    scaled = Scaled(_bytes(scales), tuple(apart.tolist()), _bytes(x[:, apart]))
    return Hidden(position, len(x), x.shape[1], _bytes(data), scaled)


def _restored(frame: Hidden, scaled: Scaled) -> torch.Tensor:
    scales = torch.frombuffer(bytearray(scaled.scales), dtype=torch.float32)
    wrong = ~(torch.isfinite(scales) & (scales >= 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise BadFrame(f"scale {scales[row]:g} of position {frame.position + row}, must be at least 0 and finite")
    data = torch.frombuffer(bytearray(frame.data), dtype=torch.int8).view(frame.rows, frame.width)
    x = (data.float() * scales[:, None]).to(torch.bfloat16)
    if scaled.apart:
        x[:, list(scaled.apart)] = _bf16(scaled.apart_data).view(frame.rows, len(scaled.apart))
    return x


def _outliers(x: torch.Tensor) -> torch.Tensor:
    """The channels that go apart, ascending: those far beyond the median, the largest if there are too many."""
    largest = x.abs().amax(0).float()
    ranked = largest.sort(descending=True, stable=True).indices[: x.shape[1] // CHANNELS_APART]
    return ranked[largest[ranked] > OUTLIER * largest.median()].sort().values


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _bf16(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
