"""Hidden states cross the wire bit for bit, in chunks, and nothing else gets in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Hidden, decode_client, encode
from protocol.limits import TENSOR_CHUNK
from protocol.tensor import pack, unpack


def states(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_every_bit_arrives(rows: int, width: int, position: int) -> None:
    x = states(rows, width)
    (frame,) = pack(x, position)
    got = unpack(decode_client(encode(frame)), width)  # type: ignore[arg-type]
    assert frame.position == position
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.view(torch.int16), x.view(torch.int16))


def test_many_rows_go_in_chunks_of_whole_rows() -> None:
    x = states(2000, 384)
    parts = list(pack(x, 100))
    assert len(parts) == 6
    assert all(len(part.data) <= TENSOR_CHUNK for part in parts)
    assert [part.position for part in parts] == [100 + 341 * i for i in range(6)]
    assert torch.equal(torch.cat([unpack(part, 384) for part in parts]), x)


def test_a_view_is_packed_as_it_reads() -> None:
    x = states(8, 32)[::2, :16]
    (frame,) = pack(x, 0)
    assert torch.equal(unpack(frame, 16), x)


def test_special_numbers_that_are_finite_arrive() -> None:
    x = torch.tensor([[0.0, -0.0, 3.3895e38, -3.3895e38, 1e-40, 9.18e-41]], dtype=torch.bfloat16)
    (frame,) = pack(x, 0)
    assert torch.equal(unpack(frame, 6).view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_the_senders_fault(value: float) -> None:
    x = states(3, 4)
    x[1, 2] = value
    (frame,) = pack(x, 7)
    with pytest.raises(SessionFault, match="positions from 7 on") as fault:
        unpack(frame, 4)
    assert fault.value.code is FaultCode.NOT_FINITE


def test_another_width_is_refused_with_both_numbers() -> None:
    (frame,) = pack(states(2, 8), 0)
    with pytest.raises(BadFrame, match="width 8, the model's is 16"):
        unpack(frame, 16)


@pytest.mark.parametrize("x", [torch.zeros(2, 2), torch.zeros(2, dtype=torch.bfloat16)], ids=["float32", "one row"])
def test_only_bf16_matrices_are_packed(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"bfloat16 \[n, width\]"):
        next(pack(x, 0))


def test_no_rows_make_no_frames() -> None:
    assert list(pack(torch.zeros(0, 8, dtype=torch.bfloat16), 0)) == []


def test_what_was_unpacked_can_be_written_to() -> None:
    frame = Hidden(0, 1, 2, bytes(4))
    x = unpack(frame, 2)
    x += 1
    assert frame.data == bytes(4)
