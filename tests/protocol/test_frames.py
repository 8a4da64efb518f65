"""Frames survive the wire, and nothing out of bounds is let in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol import split_pb2 as pb
from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import (
    Admitted,
    Close,
    Digests,
    Done,
    Draft,
    Fault,
    Hidden,
    Load,
    Open,
    Reason,
    Scaled,
    Tokens,
    WireSampling,
    decode_client,
    decode_server,
    encode,
)
from support.sample_frames import DIGESTS, HIDDEN_8, OPEN, hidden_8, opening, tokens_of

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
real = st.floats(0, 1e12)
ids = st.lists(uint32, max_size=50).map(tuple)
digest = st.binary(min_size=limits.DIGEST, max_size=limits.DIGEST)
digests = st.builds(Digests, digest, digest, digest)
sampling = st.builds(
    WireSampling, st.floats(0, 100), st.floats(0, 1, exclude_min=True, allow_subnormal=False), uint32, uint64
)


def drafting(split: int) -> st.SearchStrategy[dict[str, int]]:
    tokens, where = st.integers(0, limits.MAX_DRAFT), ["draft"] if split else ["draft", "cloud_draft"]
    return st.sampled_from(where).flatmap(lambda name: tokens.map(lambda count: {name: count}))


@st.composite
def opens(draw: st.DrawFn) -> Open:
    log = draw(st.lists(uint32, min_size=1, max_size=50).map(tuple))
    split = draw(st.integers(0, 200))
    return Open(
        request_id=draw(st.binary(min_size=16, max_size=16)),
        attempt=draw(uint32),
        model=draw(st.text(max_size=60)),
        digests=draw(digests),
        split=split,
        sampling=draw(sampling),
        max_tokens=draw(st.integers(1, 2**32 - 1)),
        prompt_length=draw(st.integers(1, len(log))),
        log_length=len(log),
        log=() if split else log,
        stop=draw(st.lists(st.text(min_size=1, max_size=60), max_size=limits.MAX_STOPS).map(tuple)),
        ticket_age_s=draw(st.none() | st.integers(0, 10**7).map(lambda ms: ms / 1000)),
        token=draw(st.text(max_size=100)),
        sparse=draw(st.booleans()),
        **draw(drafting(split)),
    )


@st.composite
def hiddens(draw: st.DrawFn) -> Hidden:
    rows, width = draw(st.integers(1, 8)), draw(st.integers(1, 64))
    if draw(st.booleans()):
        return Hidden(draw(uint32), rows, width, draw(exactly(rows * width * 2)), None, draw(uint32))
    most = width // limits.CHANNELS_APART
    apart = tuple(sorted(draw(st.sets(st.integers(0, width - 1), max_size=most))))
    scaled = Scaled(draw(exactly(4 * rows)), apart, draw(exactly(2 * rows * len(apart))))
    return Hidden(draw(uint32), rows, width, draw(exactly(rows * width)), scaled, draw(uint32))


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


client_frames = st.one_of(
    opens(),
    hiddens(),
    st.builds(Draft, uint32, st.lists(uint32, max_size=limits.MAX_DRAFT).map(tuple), uint32),
    st.just(Close()),
)
server_frames = st.one_of(
    st.builds(Admitted, digests, st.booleans(), uint32, uint64, st.booleans()),
    st.builds(Tokens, uint32, ids, uint32),
    st.builds(Load, uint32, uint32, uint64, real, real, real, real, uint64, st.booleans(), real),
    st.builds(
        Fault, st.sampled_from(FaultCode), st.text(max_size=100), st.integers(0, 10**6).map(lambda ms: ms / 1000)
    ),
    st.builds(Done, st.sampled_from(Reason), uint32, real, real, st.just(9), st.integers(0, 9)),
)


@given(client_frames)
def test_what_a_phone_sends_arrives(frame: Any) -> None:
    assert decode_client(encode(frame)) == frame


@given(server_frames)
def test_what_a_server_sends_arrives(frame: Any) -> None:
    assert decode_server(encode(frame)) == frame


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_bad_frame(data: bytes) -> None:
    for decode in (decode_client, decode_server):
        with suppress(BadFrame):
            decode(data)


@given(opens() | hiddens(), st.data())
def test_a_spoiled_frame_is_a_frame_or_a_bad_frame(frame: Open | Hidden, data: st.DataObject) -> None:
    spoiled = bytearray(encode(frame))
    spoiled[data.draw(st.integers(0, len(spoiled) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(BadFrame):
        decode_client(bytes(spoiled))


AT_THE_LIMIT = [
    {"log": (1,) * limits.MAX_LOG, "log_length": limits.MAX_LOG},
    {"stop": ("s",) * limits.MAX_STOPS},
    {"stop": ("s" * limits.MAX_STOP,)},
    {"model": "m" * limits.MAX_MODEL_NAME},
    {"token": "t" * limits.MAX_TOKEN},
    {"sampling": WireSampling(temperature=100.0)},
    {"sampling": WireSampling(top_p=1.0)},
    {"split": 3, "log": ()},
]


@pytest.mark.parametrize("changes", AT_THE_LIMIT, ids=lambda changes: "-".join(changes))
def test_an_open_at_a_limit_is_taken(changes: dict[str, Any]) -> None:
    assert decode_client(encode(opening(**changes))) == opening(**changes)


OUT_OF_BOUNDS = [
    ({"request_id": b"r" * 15}, "request id of 15 bytes, must be 16"),
    ({"request_id": b"r" * 17}, "request id of 17 bytes, must be 16"),
    ({"log": (1,) * (limits.MAX_LOG + 1), "log_length": limits.MAX_LOG + 1}, f"limit {limits.MAX_LOG}"),
    ({"split": 1, "log": (), "log_length": limits.MAX_LOG + 1}, f"limit {limits.MAX_LOG}"),
    ({"log_length": 4}, "log of 3 ids, declared 4"),
    ({"log": ()}, "split 0 with 0 ids"),
    ({"split": 1}, "split 1 with 3 ids"),
    ({"prompt_length": 4}, "prompt positions: 4, limit 3"),
    ({"prompt_length": 0}, "prompt is empty"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"draft": limits.MAX_DRAFT + 1}, f"tokens of a draft: 65, limit {limits.MAX_DRAFT}"),
    ({"cloud_draft": limits.MAX_DRAFT + 1}, f"tokens of a draft: 65, limit {limits.MAX_DRAFT}"),
    ({"draft": 1, "cloud_draft": 1}, "one of them is 0"),
    ({"split": 1, "log": (), "cloud_draft": 1}, "split 1 with drafts in the cloud"),
    ({"stop": ("s",) * (limits.MAX_STOPS + 1)}, f"stop strings: 17, limit {limits.MAX_STOPS}"),
    ({"stop": ("é" * limits.MAX_STOP,)}, f"stop string bytes: 512, limit {limits.MAX_STOP}"),
    ({"stop": ("",)}, "stop string is empty"),
    ({"model": "m" * (limits.MAX_MODEL_NAME + 1)}, f"limit {limits.MAX_MODEL_NAME}"),
    ({"token": "t" * (limits.MAX_TOKEN + 1)}, f"limit {limits.MAX_TOKEN}"),
    ({"sampling": WireSampling(temperature=-0.1)}, "temperature -0.1"),
    ({"sampling": WireSampling(temperature=100.1)}, "temperature 100.1"),
    ({"sampling": WireSampling(temperature=float("nan"))}, "temperature nan"),
    ({"sampling": WireSampling(temperature=float("inf"))}, "temperature inf"),
    ({"sampling": WireSampling(top_p=0.0)}, "top_p 0.0"),
    ({"sampling": WireSampling(top_p=1.1)}, "top_p 1.1"),
    ({"sampling": WireSampling(top_p=float("nan"))}, "top_p nan"),
    ({"digests": Digests(b"", DIGESTS.tokenizer, DIGESTS.numerics)}, "weights digest of 0 bytes, must be 16"),
    ({"digests": Digests(DIGESTS.weights, b"t" * 17, DIGESTS.numerics)}, "tokenizer digest of 17 bytes"),
    ({"digests": Digests(DIGESTS.weights, DIGESTS.tokenizer, b"n")}, "numerics digest of 1 bytes"),
]


@pytest.mark.parametrize(("changes", "words"), OUT_OF_BOUNDS, ids=[words for _, words in OUT_OF_BOUNDS])
def test_an_open_out_of_bounds_is_refused_with_the_number(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        decode_client(encode(opening(**changes)))


def hidden(rows: int, width: int, size: int, dtype: Any = pb.BFLOAT16) -> bytes:
    tensor = pb.Tensor(rows=rows, width=width, dtype=dtype, data=bytes(size))
    return pb.ClientFrame(hidden=pb.Hidden(position=0, tensor=tensor)).SerializeToString()


def test_hidden_states_at_the_limit_are_taken() -> None:
    frame = decode_client(hidden(512, 256, limits.TENSOR_CHUNK))
    assert isinstance(frame, Hidden)
    assert len(frame.data) == limits.TENSOR_CHUNK


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (hidden(513, 256, 513 * 512), f"limit {limits.TENSOR_CHUNK}"),
        (hidden(2, 4, 15), "2 x 4 in 15 bytes"),
        (hidden(0, 4, 0), "0 x 4 in 0 bytes"),
        (hidden(4, 0, 0), "4 x 0 in 0 bytes"),
        (hidden(2**31, 2**31, 0), "in 0 bytes"),
        (hidden(1, 1, 2, pb.DTYPE_UNSPECIFIED), "type 0"),
        (hidden(1, 1, 2, 7), "type 7"),
        (pb.ClientFrame(hidden=pb.Hidden()).SerializeToString(), "type 0"),
    ],
)
def test_hidden_states_out_of_bounds_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        decode_client(data)


def test_hidden_states_in_8_bits_are_as_large_as_they_say() -> None:
    assert HIDDEN_8.size == 64 + 8 + 8
    rows = limits.TENSOR_CHUNK // (32 + 4 + 4)
    whole = {"scales": bytes(4 * rows), "apart_data": bytes(4 * rows)}
    largest = hidden_8(rows=rows, data=bytes(32 * rows), **whole)
    assert decode_client(encode(largest)) == largest
    none = hidden_8(apart=(), apart_data=b"")
    assert decode_client(encode(none)) == none


MANY = limits.TENSOR_CHUNK // 36
IN_8_BITS = [
    ({"data": bytes(63)}, "2 x 32 in 63 bytes"),
    ({"data": bytes(128)}, "2 x 32 in 128 bytes"),
    ({"rows": 3, "scales": bytes(12), "apart_data": bytes(12)}, "3 x 32 in 64 bytes"),
    ({"rows": 0, "data": b"", "scales": b"", "apart_data": b""}, "0 x 32 in 0 bytes"),
    ({"scales": bytes(7)}, "scales of 2 rows in 7 bytes"),
    ({"scales": b""}, "scales of 2 rows in 0 bytes"),
    ({"rows": 2**31}, "scales of 2147483648 rows in 8 bytes"),
    ({"apart": (3, 4, 5), "apart_data": bytes(12)}, "channels apart: 3, limit 2"),
    ({"width": 15, "data": bytes(30), "apart": (1,), "apart_data": bytes(4)}, "channels apart: 1, limit 0"),
    ({"apart": (3, 32)}, r"channels \[3, 32\] apart do not increase, or are not of 32"),
    ({"apart": (31, 3)}, r"channels \[31, 3\] apart"),
    ({"apart": (3, 3)}, r"channels \[3, 3\] apart"),
    ({"apart_data": bytes(7)}, "2 rows of 2 channels apart in 7 bytes"),
    ({"apart": ()}, "2 rows of 0 channels apart in 8 bytes"),
    (
        {"rows": MANY, "data": bytes(32 * MANY), "scales": bytes(4 * MANY), "apart_data": bytes(4 * MANY)},
        f"hidden state bytes: {40 * MANY}, limit {limits.TENSOR_CHUNK}",
    ),
]


@pytest.mark.parametrize(("changes", "words"), IN_8_BITS, ids=[words for _, words in IN_8_BITS])
def test_hidden_states_in_8_bits_that_lie_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        decode_client(encode(hidden_8(**changes)))


def test_a_draft_has_a_limit() -> None:
    assert decode_client(encode(Draft(0, (1,) * limits.MAX_DRAFT))) == Draft(0, (1,) * limits.MAX_DRAFT)
    with pytest.raises(BadFrame, match=f"limit {limits.MAX_DRAFT}"):
        decode_client(encode(Draft(0, (1,) * (limits.MAX_DRAFT + 1))))


def test_a_frame_has_a_limit_on_both_sides() -> None:
    largest = tokens_of(limits.MAX_FRAME)
    assert len(encode(largest)) == limits.MAX_FRAME
    assert decode_server(encode(largest)) == largest
    with pytest.raises(BadFrame, match=rf"Tokens frame of {limits.MAX_FRAME + 1} bytes, limit {limits.MAX_FRAME}"):
        encode(Tokens(7, (*largest.ids, 1)))
    for decode in (decode_client, decode_server):
        with pytest.raises(BadFrame, match=f"limit {limits.MAX_FRAME}"):
            decode(bytes(limits.MAX_FRAME + 1))


@pytest.mark.parametrize("decode", [decode_client, decode_server])
@pytest.mark.parametrize("data", [b"", b"\x7a\x00", b"\xff", b"\x0a\x05\x01"], ids=["empty", "unknown", "cut", "short"])
def test_what_has_no_known_body_is_refused(decode: Any, data: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(data)


def test_a_frame_of_the_other_side_is_never_taken_for_ours() -> None:
    """The two sides' numbers overlap, so a confused peer is caught by the bounds, or by what a body lacks."""
    with pytest.raises(BadFrame):
        decode_client(encode(Admitted(DIGESTS, True, 0, 0, False)))


def test_an_unknown_fault_is_internal_and_an_unknown_reason_is_refused() -> None:
    fault = pb.ServerFrame(fault=pb.Fault(code=99, message="x" * 5000))  # type: ignore[arg-type]
    assert decode_server(fault.SerializeToString()) == Fault(FaultCode.INTERNAL, "x" * limits.MAX_MESSAGE)
    done = pb.ServerFrame(done=pb.Done(reason=99))  # type: ignore[arg-type]
    with pytest.raises(BadFrame, match="reason 99"):
        decode_server(done.SerializeToString())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    "field", ["wait_s", "prefill_rate", "decode_rate", "delivery_rate", "draft_rate", "queue_s", "compute_s"]
)
def test_what_a_server_measured_is_a_number(field: str, number: float) -> None:
    load, done = Load(1, 2, 3, 0.5, 1e9, 1e8, 1e6, 1 << 22, False), Done(Reason.STOP, 9, 0.1, 0.2)
    with pytest.raises(BadFrame, match=str(number)):
        decode_server(encode(replace(load if hasattr(load, field) else done, **{field: number})))


def test_a_long_message_of_a_fault_is_cut() -> None:
    sent = Fault(FaultCode.BUSY, "é" * 5000, 1.5)
    assert decode_server(encode(sent)) == Fault(FaultCode.BUSY, "é" * limits.MAX_MESSAGE, 1.5)


def test_the_codes_are_those_of_the_schema() -> None:
    assert {code.name: int(code) for code in FaultCode} == {k: v for k, v in pb.FaultCode.items() if v}
    assert {reason.name: int(reason) for reason in Reason} == {k: v for k, v in pb.Reason.items() if v}


def test_a_bad_frame_is_a_fault_in_words() -> None:
    assert issubclass(BadFrame, SessionFault)
    bad = BadFrame("5 bytes, limit 4")
    assert str(bad) == "bad_frame: 5 bytes, limit 4"
    assert bad.code is FaultCode.BAD_FRAME


def test_an_open_of_a_token_log_is_small() -> None:
    """A prompt of 3,000 tokens must fit in early data, about 10 KB."""
    ids = tuple(range(1000, 4000))
    assert len(encode(opening(log=ids, log_length=3000, prompt_length=3000))) < 6200
    assert len(encode(OPEN)) < 150
