"""Frames as records: built, written, read and bounded here; protobuf goes no further than this file."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from itertools import pairwise

from google.protobuf.message import DecodeError

from protocol import limits
from protocol import split_pb2 as pb
from protocol.errors import BadFrame, FaultCode


class Reason(enum.IntEnum):
    """Why an answer ended."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class Digests:
    """16 bytes each; equal digests mean equal bits."""

    weights: bytes
    tokenizer: bytes
    numerics: bytes


@dataclass(frozen=True, slots=True)
class WireSampling:
    """How to draw tokens; temperature 0 is greedy, top_k 0 and top_p 1 filter nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Open:
    """The session's request. `log` is empty for a split; `log_length` counts it in any case."""

    request_id: bytes
    attempt: int
    model: str
    digests: Digests
    split: int
    sampling: WireSampling
    max_tokens: int
    prompt_length: int
    log_length: int
    log: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ticket_age_s: float | None = None
    token: str = ""
    draft: int = 0  # tokens of the longest draft that the phone will send
    cloud_draft: int = 0  # tokens that the server's own tiny model may propose at a time
    sparse: bool = False  # in a long context each token reads the most relevant keys only


@dataclass(frozen=True, slots=True)
class Scaled:
    """What makes numbers of int8 data: a float32 a row, and bf16 `[rows, len(apart)]` of channels it does not tell."""

    scales: bytes
    apart: tuple[int, ...]
    apart_data: bytes


def position_bytes(width: int, bits: int) -> int:
    """Of one position's hidden states as they are sent, in 16 or 8 bits; without channels apart."""
    return 2 * width if bits == 16 else width + 4


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states `[rows, width]` of consecutive positions, from `position` on, as raw bytes.

    `data` is bf16, or int8 with `scaled`; `epoch` as in Draft.
    """

    position: int
    rows: int
    width: int
    data: bytes
    scaled: Scaled | None = None
    epoch: int = 0

    @property
    def size(self) -> int:
        """Bytes that count against the credit."""
        return len(self.data) + (len(self.scaled.scales) + len(self.scaled.apart_data) if self.scaled else 0)


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed by the tiny model for the positions from `position` on; none: the server goes on alone.

    `epoch` counts how often a token was another than drafted: what is of an older one is dropped.
    """

    position: int
    tokens: tuple[int, ...]
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """The phone wants no more."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The server took the session; `credit` is in bytes, in all."""

    digests: Digests
    exact: bool
    held: int
    credit: int
    early: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """Answer tokens from `position` on, and the epoch of drafts from now on."""

    position: int
    ids: tuple[int, ...]
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """The server's state: rates in FLOP/s and bytes/s (0 when not measured), waits in seconds."""

    running: int
    waiting: int
    steps: int
    wait_s: float
    prefill_rate: float
    decode_rate: float
    delivery_rate: float
    credit: int
    draining: bool
    draft_rate: float = 0.0  # of the server's tiny model; 0 when it has none


@dataclass(frozen=True, slots=True)
class Fault:
    """The session is over, and why."""

    code: FaultCode
    message: str
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; of `drafted` tokens, up to the first wrong one of each draft, `accepted` were right."""

    reason: Reason
    answer_tokens: int
    queue_s: float = 0.0
    compute_s: float = 0.0
    drafted: int = 0
    accepted: int = 0


ClientFrame = Open | Hidden | Draft | Close
ServerFrame = Admitted | Tokens | Load | Fault | Done
Frame = ClientFrame | ServerFrame


def encode(frame: Frame) -> bytes:
    """The frame's bytes, without a length. Raises BadFrame when they are over the limit."""
    body = _to_message(frame).SerializeToString()
    if len(body) > limits.MAX_FRAME:
        raise BadFrame(f"{type(frame).__name__} frame of {len(body)} bytes, limit {limits.MAX_FRAME}")
    return body


def decode_client(data: bytes) -> ClientFrame:
    """Reads a frame that a phone sent. Raises BadFrame for anything malformed or out of bounds."""
    message = pb.ClientFrame()
    match _body(message, data):
        case "open":
            return _read_open(message.open)
        case "hidden":
            return _read_hidden(message.hidden)
        case "draft":
            ids = tuple(message.draft.tokens)
            _at_most("draft tokens", len(ids), limits.MAX_DRAFT)
            return Draft(message.draft.position, ids, message.draft.epoch)
        case _:
            return Close()


def decode_server(data: bytes) -> ServerFrame:
    """Reads a frame that a server sent. Raises BadFrame for anything malformed or out of bounds."""
    message = pb.ServerFrame()
    match _body(message, data):
        case "admitted":
            got = message.admitted
            return Admitted(_read_digests(got.digests), got.exact, got.held, got.credit, got.early)
        case "tokens":
            got_tokens = message.tokens
            return Tokens(got_tokens.position, tuple(got_tokens.ids), got_tokens.epoch)
        case "load":
            load = message.load
            _measured(load.wait_s, load.prefill_rate, load.decode_rate, load.delivery_rate, load.draft_rate)
            return Load(
                load.running, load.waiting, load.steps, load.wait_s, load.prefill_rate, load.decode_rate,
                load.delivery_rate, load.credit, load.draining, load.draft_rate,
            )  # fmt: skip
        case "fault":
            fault = message.fault
            code = FaultCode(fault.code) if fault.code in _FAULTS else FaultCode.INTERNAL
            return Fault(code, fault.message[: limits.MAX_MESSAGE], fault.retry_after_ms / 1000)
        case _:
            done = message.done
            if done.reason not in _REASONS:
                raise BadFrame(f"reason {done.reason} is not one of {sorted(_REASONS)}")
            _measured(done.queue_s, done.compute_s)
            if done.accepted > done.drafted:
                raise BadFrame(f"{done.accepted} tokens accepted of {done.drafted} drafted")
            times = (done.queue_s, done.compute_s)
            return Done(Reason(done.reason), done.answer_tokens, *times, done.drafted, done.accepted)


_FAULTS = frozenset(int(code) for code in FaultCode)
_REASONS = frozenset(int(reason) for reason in Reason)


def _body(message: pb.ClientFrame | pb.ServerFrame, data: bytes) -> str:
    if len(data) > limits.MAX_FRAME:
        raise BadFrame(f"frame of {len(data)} bytes, limit {limits.MAX_FRAME}")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise BadFrame(f"frame of {len(data)} bytes does not parse: {error}") from None
    kind = message.WhichOneof("body")
    if kind is None:
        raise BadFrame(f"frame of {len(data)} bytes has no known body")
    return kind


def _at_most(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise BadFrame(f"{what}: {size}, limit {limit}")


def _measured(*numbers: float) -> None:
    for number in numbers:
        if not 0.0 <= number < math.inf:  # also refuses NaN
            raise BadFrame(f"a rate or time of {number}, must be at least 0 and finite")


def _read_digests(digests: pb.Digests) -> Digests:
    for name, value in (("weights", digests.weights), ("tokenizer", digests.tokenizer), ("numerics", digests.numerics)):
        if len(value) != limits.DIGEST:
            raise BadFrame(f"{name} digest of {len(value)} bytes, must be {limits.DIGEST}")
    return Digests(digests.weights, digests.tokenizer, digests.numerics)


def _read_sampling(sampling: pb.Sampling) -> WireSampling:
    if not 0.0 <= sampling.temperature <= 100.0:  # also refuses NaN
        raise BadFrame(f"temperature {sampling.temperature}, must be 0 to 100")
    if not 0.0 < sampling.top_p <= 1.0:
        raise BadFrame(f"top_p {sampling.top_p}, must be over 0 and at most 1")
    return WireSampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)


def _read_open(got: pb.Open) -> Open:
    if len(got.request_id) != limits.REQUEST_ID:
        raise BadFrame(f"request id of {len(got.request_id)} bytes, must be {limits.REQUEST_ID}")
    _at_most("model name bytes", len(got.model.encode()), limits.MAX_MODEL_NAME)
    _at_most("token bytes", len(got.token.encode()), limits.MAX_TOKEN)
    _at_most("stop strings", len(got.stop), limits.MAX_STOPS)
    for stop in got.stop:
        _at_most("stop string bytes", len(stop.encode()), limits.MAX_STOP)
    _at_most("positions", got.log_length, limits.MAX_LOG)
    _at_most("prompt positions", got.prompt_length, got.log_length)
    if got.log and len(got.log) != got.log_length:
        raise BadFrame(f"token log of {len(got.log)} ids, declared {got.log_length}")
    if bool(got.log) == bool(got.split):
        raise BadFrame(f"split {got.split} with {len(got.log)} ids: a split sends none, any other session all")
    if got.prompt_length == 0 or "" in got.stop:
        raise BadFrame("the prompt is empty" if got.prompt_length == 0 else "a stop string is empty")
    _at_most("tokens of a draft", max(got.draft, got.cloud_draft), limits.MAX_DRAFT)
    if got.draft and got.cloud_draft:
        raise BadFrame(f"drafts of {got.draft} from the phone and of {got.cloud_draft} in the cloud, one of them is 0")
    if got.split and got.cloud_draft:
        raise BadFrame(f"split {got.split} with drafts in the cloud, which has no token ids of its prompt")
    if got.max_tokens == 0:
        raise BadFrame("max_tokens is 0, must be at least 1")
    return Open(
        got.request_id, got.attempt, got.model, _read_digests(got.digests), got.split, _read_sampling(got.sampling),
        got.max_tokens, got.prompt_length, got.log_length, tuple(got.log), tuple(got.stop),
        got.ticket_age_ms / 1000 if got.HasField("ticket_age_ms") else None, got.token,
        got.draft, got.cloud_draft, got.sparse,
    )  # fmt: skip


def _read_hidden(got: pb.Hidden) -> Hidden:
    tensor = got.tensor
    if tensor.dtype not in (pb.BFLOAT16, pb.INT8_SCALED):
        raise BadFrame(f"hidden states of type {tensor.dtype}, must be 1 (bfloat16) or 2 (scaled int8)")
    scaled = _read_scaled(tensor) if tensor.dtype == pb.INT8_SCALED else None
    frame = Hidden(got.position, tensor.rows, tensor.width, tensor.data, scaled, got.epoch)
    _at_most("hidden state bytes", frame.size, limits.TENSOR_CHUNK)
    if not tensor.data or tensor.rows * tensor.width * (1 if scaled else 2) != len(tensor.data):
        raise BadFrame(f"hidden states of {tensor.rows} x {tensor.width} in {len(tensor.data)} bytes")
    return frame


def _read_scaled(tensor: pb.Tensor) -> Scaled:
    _at_most("channels apart", len(tensor.apart), tensor.width // limits.CHANNELS_APART)
    apart = tuple(tensor.apart)
    if any(one >= after for one, after in pairwise((*apart, tensor.width))):
        raise BadFrame(f"channels {list(apart[:8])} apart do not increase, or are not of {tensor.width}")
    if len(tensor.scales) != 4 * tensor.rows:
        raise BadFrame(f"scales of {tensor.rows} rows in {len(tensor.scales)} bytes")
    if len(tensor.apart_data) != 2 * tensor.rows * len(apart):
        raise BadFrame(f"{tensor.rows} rows of {len(apart)} channels apart in {len(tensor.apart_data)} bytes")
    return Scaled(tensor.scales, apart, tensor.apart_data)


def _digests(digests: Digests) -> pb.Digests:
    return pb.Digests(weights=digests.weights, tokenizer=digests.tokenizer, numerics=digests.numerics)


def _open(frame: Open) -> pb.Open:
    s = frame.sampling
    return pb.Open(
        request_id=frame.request_id, attempt=frame.attempt, model=frame.model, digests=_digests(frame.digests),
        split=frame.split, sampling=pb.Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed),
        stop=frame.stop, max_tokens=frame.max_tokens, prompt_length=frame.prompt_length, log_length=frame.log_length,
        log=frame.log, token=frame.token, draft=frame.draft, cloud_draft=frame.cloud_draft, sparse=frame.sparse,
        ticket_age_ms=None if frame.ticket_age_s is None else round(frame.ticket_age_s * 1000),
    )  # fmt: skip


def _tensor(frame: Hidden) -> pb.Tensor:
    rows, width, scaled = frame.rows, frame.width, frame.scaled
    if scaled is None:
        return pb.Tensor(rows=rows, width=width, dtype=pb.BFLOAT16, data=frame.data)
    return pb.Tensor(
        rows=rows, width=width, dtype=pb.INT8_SCALED, data=frame.data,
        scales=scaled.scales, apart=scaled.apart, apart_data=scaled.apart_data,
    )  # fmt: skip


def _to_message(frame: Frame) -> pb.ClientFrame | pb.ServerFrame:
    match frame:
        case Open():
            return pb.ClientFrame(open=_open(frame))
        case Hidden():
            return pb.ClientFrame(hidden=pb.Hidden(position=frame.position, tensor=_tensor(frame), epoch=frame.epoch))
        case Draft(position, tokens, epoch):
            return pb.ClientFrame(draft=pb.Draft(position=position, tokens=tokens, epoch=epoch))
        case Close():
            return pb.ClientFrame(close=pb.Close())
        case Admitted(digests, exact, held, credit, early):
            return pb.ServerFrame(
                admitted=pb.Admitted(digests=_digests(digests), exact=exact, held=held, credit=credit, early=early)
            )
        case Tokens(position, ids, epoch):
            return pb.ServerFrame(tokens=pb.Tokens(position=position, ids=ids, epoch=epoch))
        case Load():
            fields = {name: getattr(frame, name) for name in Load.__dataclass_fields__}
            return pb.ServerFrame(load=pb.Load(**fields))
        case Fault(code, message, retry_after_s):
            text = message[: limits.MAX_MESSAGE]
            return pb.ServerFrame(
                fault=pb.Fault(
                    code=pb.FaultCode.ValueType(code), message=text, retry_after_ms=round(retry_after_s * 1000)
                )
            )
        case Done(reason, answer_tokens, queue_s, compute_s, drafted, accepted):
            return pb.ServerFrame(
                done=pb.Done(
                    reason=pb.Reason.ValueType(reason),
                    answer_tokens=answer_tokens,
                    queue_s=queue_s,
                    compute_s=compute_s,
                    drafted=drafted,
                    accepted=accepted,
                )
            )
