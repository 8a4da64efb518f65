"""Hidden states cross the wire bit for bit, in chunks, and nothing else gets in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Hidden, decode_client, encode, position_bytes
from protocol.limits import CHANNELS_APART, TENSOR_CHUNK
from protocol.tensor import OUTLIER, pack, unpack
from support.sample_frames import hidden_8


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


def in_8_bits(x: torch.Tensor, position: int = 0) -> torch.Tensor:
    """As the other end has them."""
    frames = [decode_client(encode(frame)) for frame in pack(x, position, 8)]
    return torch.cat([unpack(frame, x.shape[1]) for frame in frames])  # type: ignore[arg-type]


def apart(x: torch.Tensor) -> tuple[int, ...]:
    (frame,) = pack(x, 0, 8)
    assert frame.scaled is not None
    return frame.scaled.apart


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(-30, 30))
def test_8_bits_are_off_by_half_a_step_of_their_row(rows: int, width: int, seed: int, size: int) -> None:
    x = (states(rows, width, seed).float() * 2.0**size).to(torch.bfloat16)
    got = in_8_bits(x)
    assert got.dtype == torch.bfloat16
    step = x.float().abs().amax(1, keepdim=True) / 127
    assert bool(
        ((got.float() - x.float()).abs() <= step / 2 + x.float().abs() / 128).all()
    )  # and bf16 rounds once more


@given(st.integers(1, 20), st.sets(st.integers(0, 63), max_size=4), st.integers(0, 2**32 - 1))
def test_channels_far_beyond_the_others_arrive_as_they_are(rows: int, far: set[int], seed: int) -> None:
    x = states(rows, 64, seed).sign()
    assume(bool((x != 0).all()))
    x[:, list(far)] *= 100
    assert apart(x) == tuple(sorted(far))
    assert torch.equal(in_8_bits(x), x)


def test_only_so_many_channels_go_apart_the_largest_of_them() -> None:
    x = torch.ones(3, 4 * CHANNELS_APART, dtype=torch.bfloat16)
    x[:, :10] = torch.arange(10, 20, dtype=torch.bfloat16)
    assert apart(x) == (6, 7, 8, 9)
    x[:, :10] = 100.0
    assert apart(x) == (0, 1, 2, 3)
    x[:, :10] = OUTLIER
    assert apart(x) == ()
    assert apart(torch.ones(3, CHANNELS_APART - 1, dtype=torch.bfloat16)) == ()


@given(st.integers(2, 30), st.integers(1, 100), st.data())
def test_a_row_in_8_bits_does_not_depend_on_the_others_but_for_what_is_apart(
    rows: int, width: int, data: st.DataObject
) -> None:
    x, row = states(rows, width), data.draw(st.integers(0, rows - 1))
    assume(apart(x) == apart(x[row : row + 1]))
    assert torch.equal(in_8_bits(x)[row], in_8_bits(x[row : row + 1])[0])


def test_rows_of_next_to_nothing_stay_finite() -> None:
    x = torch.tensor([[0.0] * 4, [-0.0] * 4, [9.18e-41] * 4, [1e-38] * 4, [3.3895e38] * 4]).to(torch.bfloat16)
    got = in_8_bits(x)
    assert torch.equal(got[:2], torch.zeros(2, 4, dtype=torch.bfloat16))
    assert torch.allclose(got.float(), x.float(), rtol=0.01, atol=1.2e-38)


def test_8_bits_go_in_chunks_and_take_half_of_the_room() -> None:
    x = states(2000, 384)
    parts = list(pack(x, 100, 8))
    assert [part.position for part in parts] == [100 + 601 * i for i in range(4)]
    assert all(part.size <= TENSOR_CHUNK for part in parts)
    assert sum(part.size for part in parts) == 2000 * position_bytes(384, 8) == 2000 * 388
    assert position_bytes(384, 16) == 768


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 40])
def test_what_is_not_finite_is_not_hidden_by_8_bits(value: float, channel: int) -> None:
    x = states(3, 64)
    x[1, channel] = value
    (frame,) = pack(x, 7, 8)
    with pytest.raises(SessionFault):
        unpack(frame, 64)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(b"\0\0\xc0\x7f", "scale nan of position 8"), (b"\0\0\x80\x7f", "scale inf of position 8"),
     (b"\0\0\x80\xbf", "scale -1 of position 8")],
)  # fmt: skip
def test_a_scale_that_is_none_is_refused_with_its_position(scale: bytes, words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        unpack(hidden_8(scales=b"\0\0\x80\x3f" + scale), 32)


@pytest.mark.parametrize("changes", [{"scales": b"\0\0\x7f\x7f" * 2}, {"apart_data": b"\xc0\x7f" * 4}])
def test_numbers_that_a_frame_in_8_bits_makes_are_finite(changes: dict[str, bytes]) -> None:
    with pytest.raises(SessionFault, match="positions from 7 on") as fault:
        unpack(hidden_8(**changes), 32)
    assert fault.value.code is FaultCode.NOT_FINITE
