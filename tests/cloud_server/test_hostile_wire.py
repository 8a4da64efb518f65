"""What phones send that they should not, over real sockets: one session ends, in words, and nobody else notices."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
import torch

from protocol import limits
from protocol import split_pb2 as pb
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.frames import Admitted, Close, Done, Draft, Fault, Frame, Hidden, Open, Reason, Tokens, encode
from protocol.tensor import pack
from protocol.transport.base import Address, ClientChannel, Connection, ServerChannel
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.quic_connection import configuration
from split_model.sampling import Sampling
from support.bystander import unharmed
from support.certificates import Authority
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.eventually import eventually
from support.phone import Phone, expected
from support.quic_raw import Hello, Peer
from support.relay import TcpRelay, UdpRelay
from support.sample_frames import hidden_8
from support.wires import Wire, send_raw, turn

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
SAMPLED = Sampling(temperature=0.9, seed=3)
NEVER = 400  # answer tokens: far more than any of these tests waits for


@dataclass(frozen=True, slots=True)
class Arena:
    """A cloud behind one transport, a phone, and what to compare before and after."""

    kind: str
    server: Cloud
    wire: Wire
    phone: Phone
    channels: set[ServerChannel]  # of running sessions

    async def honest(self) -> tuple[int, ...]:
        """A bystander's session, on a connection of its own; by split, so that it takes part in the same steps."""
        connection = await self.connect()
        try:
            heard = await self.phone.ask(connection, PROMPT, split=1, sampling=SAMPLED, max_tokens=6)
        finally:
            await connection.aclose()
        assert heard.ids == expected(checkpoint(), PROMPT, SAMPLED, 6)
        return heard.ids

    async def connect(self, address: Address | None = None) -> Connection:
        connect = connect_quic if self.kind == "quic" else connect_grpc
        return await connect(address or self.wire.address, self.wire.trust)

    async def seen(self, which: Callable[[Any], bool]) -> ServerChannel:
        """The server's end of a session, once there is one like that."""
        while not (found := [channel for channel in self.channels if which(channel)]):
            await turn()
        return found[0]

    def faults(self, code: str) -> float:
        """How many of this kind were sent so far."""
        return float(self.server.service.metrics._faults.labels("tiny-llama", code)._value.get())

    async def held(self) -> tuple[int, ...]:
        """Rows, waiting rows, rooms, slots, and sessions of the listener."""
        service, listener = self.server.service, self.wire.listener
        sessions = listener._dispatcher.tasks if self.kind == "quic" else listener._calls  # type: ignore[union-attr]
        free = service.prefixes.free_slots
        return (*await self.server.settled(), service.rooms.taken, free, len(sessions))

    def open_frame(self, **changes: object) -> Open:
        return self.phone.open_frame(PROMPT, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.fixture(scope="module", params=["quic", "grpc"])
async def running(
    request: pytest.FixtureRequest, phone: Phone, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Arena]:
    authority = Authority.create()
    tls = authority.issue(tmp_path_factory.mktemp("tls"), "127.0.0.1")
    wire = Wire(request.param, tls, authority.trust)
    channels: set[ServerChannel] = set()
    async with cloud(checkpoint()) as server:

        async def handle(channel: ServerChannel) -> None:
            channels.add(channel)
            try:
                await server.handle(channel)
            finally:
                channels.discard(channel)

        await wire.serve(handle)
        yield Arena(request.param, server, wire, phone, channels)
        await wire.aclose()


@pytest.fixture
async def arena(running: Arena, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Arena]:
    async with unharmed(running.honest, running.held):
        yield running
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture
async def connection(arena: Arena) -> AsyncIterator[Connection]:
    """The attacker's. Whatever ends its sessions, it carries a good one at the end."""
    connection = await arena.connect()
    yield connection
    assert (await arena.phone.ask(connection, PROMPT)).ids == expected(checkpoint(), PROMPT, Sampling(), 8)
    await connection.aclose()


async def end_of(channel: ClientChannel) -> Fault | Done:
    while not isinstance(frame := await channel.receive(), Fault | Done):
        pass
    return frame


async def fault_of(connection: Connection, *frames: Frame | bytes) -> Fault:
    """How a session ends that sends these."""
    channel = await connection.open()
    try:
        for frame in frames:
            await send_raw(channel, frame if isinstance(frame, bytes) else encode(frame))
        end = await end_of(channel)
        assert isinstance(end, Fault), end
        return end
    finally:
        await channel.aclose()


def hidden(position: int, rows: int, value: float = 0.5, width: int = 64) -> Hidden:
    return next(pack(torch.full((rows, width), value, dtype=torch.bfloat16), position))


def eight(**changes: Any) -> Hidden:
    """Two positions in 8 bits, of the model's width."""
    return hidden_8(**{"position": 0, "width": 64, "data": bytes(128)} | changes)


def lie(rows: int, width: int, size: int, dtype: Any = pb.BFLOAT16) -> bytes:
    """A tensor that is not what it says."""
    tensor = pb.Tensor(rows=rows, width=width, dtype=dtype, data=bytes(size))
    return pb.ClientFrame(hidden=pb.Hidden(position=0, tensor=tensor)).SerializeToString()


Case = tuple[FaultCode, str, tuple[Frame | bytes, ...]]


def bad_frames(phone: Phone) -> list[Case]:
    whole, split = phone.open_frame(PROMPT, max_tokens=NEVER), phone.open_frame(PROMPT, split=2)
    drafts = dataclasses.replace(whole, draft=4)
    both = dataclasses.replace(split, draft=4, max_tokens=NEVER)
    wrong = lambda **changes: dataclasses.replace(phone.digests, **changes)  # noqa: E731
    bad = FaultCode.BAD_FRAME
    return [
        (bad, "must be Open", (Close(),)),
        (bad, "must be Open", (hidden(0, 4),)),
        (bad, "does not parse", (b"\xff\xff\xff",)),
        (bad, "no known body", (b"\x7a\x00",)),
        (bad, "", (encode(Admitted(phone.digests, True, 0, 0, False)),)),
        (bad, "no known body", (whole, b"\x7a\x00")),
        (bad, "limit 262144", (split, lie(1, 131073, 262146))),
        (bad, "2 x 64 in 100 bytes", (split, lie(2, 64, 100))),
        (bad, "in 0 bytes", (split, lie(2**31, 2**31, 0))),
        (bad, "5 x 0 in 0 bytes", (split, lie(5, 0, 0))),
        (bad, "type 7", (split, lie(1, 64, 128, 7))),
        (bad, "width 32", (split, hidden(0, 4, width=32))),
        (bad, "expected 0", (split, hidden(8, 4))),
        (bad, "expected 4", (split, hidden(0, 4), hidden(0, 4))),
        (bad, "at most 49", (split, hidden(0, 51))),
        (bad, "width 32", (split, hidden_8(position=0))),
        (bad, "channels [3, 64] apart", (split, eight(apart=(3, 64)))),
        (bad, "channels apart: 5, limit 4", (split, eight(apart=(1, 2, 3, 4, 5), apart_data=bytes(20)))),
        (bad, "scales of 2 rows in 4 bytes", (split, eight(scales=bytes(4)))),
        (bad, "2 x 64 in 127 bytes", (split, eight(data=bytes(127)))),
        (bad, "scale nan of position 0", (split, eight(scales=b"\xff" * 8))),
        (FaultCode.NOT_FINITE, "not finite", (split, eight(apart_data=b"\xff" * 8))),
        (FaultCode.NOT_FINITE, "not finite", (split, hidden(0, 4, float("nan")))),
        (FaultCode.NOT_FINITE, "not finite", (split, hidden(0, 4, float("-inf")))),
        (FaultCode.BAD_REQUEST, "without drafts", (whole, Draft(50, (7,)))),
        (FaultCode.BAD_REQUEST, "without drafts", (dataclasses.replace(whole, cloud_draft=4), Draft(50, (7,)))),
        (bad, "tokens of a draft: 65, limit 64", (dataclasses.replace(whole, draft=65),)),
        (bad, "one of them is 0", (dataclasses.replace(whole, draft=4, cloud_draft=4),)),
        (bad, "draft tokens: 65, limit 64", (drafts, Draft(50, (7,) * 65))),
        (bad, "draft of 5 tokens, this session's limit is 4", (drafts, Draft(50, (7,) * 5))),
        (bad, "token id 512 in a draft, the vocabulary has 512", (drafts, Draft(50, (7, 512)))),
        (bad, "token id 4294967295", (drafts, Draft(50, (2**32 - 1,)))),
        (bad, "from position 60 on, expected 5", (drafts, Draft(60, (7,)))),
        (bad, "from position 4294967295 on", (drafts, Draft(2**32 - 1, (7,)))),
        (bad, "from position 0 on, expected 5", (drafts, Draft(0, (7,)))),
        (bad, "from position 49 on, expected 5", (drafts, Draft(49, (7,)))),
        (bad, "epoch 4294967295, at most", (drafts, Draft(50, (7,), 2**32 - 1))),
        (bad, "260 drafts to be verified, limit 256", (both, *(Draft(50 + at, (7,) * 4) for at in range(0, 260, 4)))),
        (bad, "draft of 0 tokens in a split", (both, Draft(50, ()))),
        (bad, "at most 49", (both, hidden(0, 51), Draft(50, (7,)))),
        (bad, "at most 52", (both, Draft(50, (7, 7, 7)), hidden(0, 54))),
        (bad, "expected 0", (both, Draft(50, (7, 7, 7)), hidden(50, 1))),
        (bad, "epoch 1, at most 0", (both, dataclasses.replace(hidden(0, 4), epoch=1))),
        (bad, "epoch 9, at most 0", (split, dataclasses.replace(hidden(0, 4), epoch=9))),
        (FaultCode.BAD_REQUEST, "sent token ids", (drafts, hidden(0, 4))),
        (FaultCode.NOT_FINITE, "not finite", (both, Draft(50, (7,)), hidden(0, 51, float("nan")))),
        (FaultCode.BAD_REQUEST, "under way", (whole, whole)),
        (FaultCode.BAD_REQUEST, "sent token ids", (whole, hidden(0, 4))),
        (FaultCode.BAD_REQUEST, "has 5 layers", (dataclasses.replace(split, split=6),)),
        (FaultCode.BAD_REQUEST, "has 5 layers", (dataclasses.replace(split, split=2**32 - 1),)),
        (FaultCode.CONTEXT_LENGTH_EXCEEDED, "context holds 1024", (phone.open_frame([9] * 1024),)),
        (
            FaultCode.CONTEXT_LENGTH_EXCEEDED,
            "context holds 1024",
            (dataclasses.replace(split, log_length=limits.MAX_LOG),),
        ),
        (FaultCode.BAD_REQUEST, "vocabulary has 512", (phone.open_frame([512]),)),
        (FaultCode.BAD_REQUEST, "max_tokens is 2", (phone.open_frame(PROMPT, delivered=(7, 8), max_tokens=2),)),
        (FaultCode.WRONG_MODEL, "gpt", (dataclasses.replace(whole, model="gpt"),)),
        (FaultCode.WRONG_MODEL, "weights", (dataclasses.replace(whole, digests=wrong(weights=b"x" * 16)),)),
        (FaultCode.WRONG_TOKENIZER, "tokenizer", (dataclasses.replace(whole, digests=wrong(tokenizer=b"x" * 16)),)),
    ]  # fmt: skip


async def test_each_bad_frame_ends_its_session_only_and_says_why(arena: Arena, connection: Connection) -> None:
    for code, words, frames in bad_frames(arena.phone):
        fresh = [
            dataclasses.replace(frame, request_id=os.urandom(16)) if isinstance(frame, Open) else frame
            for frame in frames
        ]
        fault = await fault_of(connection, *fresh)
        assert fault.code is code, (fault, frames)
        assert words in fault.message, (fault, frames)


async def test_a_flood_of_drafts_ends_its_session_only(arena: Arena, connection: Connection) -> None:
    """A split whose prompt never comes draws no token that would excuse them."""
    opened = dataclasses.replace(arena.open_frame(split=2), draft=4)
    fault = await fault_of(connection, opened, *(Draft(50 + at, (7,)) for at in range(300)))
    assert fault.code is FaultCode.BAD_FRAME
    assert "limit 256" in fault.message


async def test_a_frame_cut_short_anywhere_is_refused(arena: Arena, connection: Connection) -> None:
    opened, rows = encode(arena.open_frame(max_tokens=NEVER)), encode(hidden(0, 4))
    for size in range(1, len(opened), 7):
        assert (await fault_of(connection, opened[:size])).code is FaultCode.BAD_FRAME, size
    for size in range(1, len(rows), 31):
        first = encode(arena.open_frame(split=2))
        assert (await fault_of(connection, first, rows[:size])).code is FaultCode.BAD_FRAME, size


async def test_random_frames_never_look_like_a_fault_of_ours(arena: Arena, connection: Connection) -> None:
    draw = random.Random(5)
    for _ in range(40):
        frame = dataclasses.replace(
            arena.open_frame(split=draw.choice([0, 2]), max_tokens=9), draft=draw.choice([0, 4])
        )
        opened, junk = bytearray(encode(frame)), draw.randbytes(draw.randrange(1, 200))
        drafts = [
            Draft(
                draw.randrange(48, 54), tuple(draw.randrange(520) for _ in range(draw.randrange(6))), draw.randrange(3)
            )
            for _ in range(draw.randrange(4))
        ]
        if draw.random() < 0.5:
            for _ in range(draw.randrange(1, 4)):
                opened[draw.randrange(len(opened))] ^= 1 << draw.randrange(8)
        channel = await connection.open()
        try:
            await send_raw(channel, bytes(opened))
            for one in drafts:
                await send_raw(channel, encode(one))
            await send_raw(channel, junk)
            end = await end_of(channel)
        except LinkLost:
            continue
        finally:
            await channel.aclose()
        assert isinstance(end, Done) or end.code is not FaultCode.INTERNAL, (end, opened.hex(), junk.hex())


async def test_an_oversized_frame_ends_its_session_only(arena: Arena, connection: Connection) -> None:
    if arena.kind == "grpc":
        credentials = grpc.ssl_channel_credentials(root_certificates=arena.wire.trust.ca)
        async with grpc.aio.secure_channel(str(arena.wire.address), credentials) as unlimited:
            call: Any = unlimited.stream_stream("/tandem.v1.Split/Generate")()
            await call.write(encode(arena.open_frame(max_tokens=NEVER)))
            await call.write(bytes(limits.MAX_FRAME + 1))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return
    channel: Any = await connection.open()
    await channel.send(arena.open_frame(max_tokens=NEVER))
    channel._link.quic.send_stream_data(channel._id, (limits.MAX_FRAME + 1).to_bytes(4, "big"))
    channel._link.flush_soon()
    fault = await end_of(channel)
    assert isinstance(fault, Fault)
    assert (fault.code, str(limits.MAX_FRAME + 1) in fault.message) == (FaultCode.BAD_FRAME, True)
    await channel.aclose()


async def test_hidden_states_beyond_the_credit_end_the_session(
    arena: Arena, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.limits.HIDDEN_CREDIT", 60 * 128)  # bytes of 60 positions, enough for the bystander
    fault = await fault_of(connection, arena.phone.open_frame([9] * 70, split=2), hidden(0, 70))
    assert fault.code is FaultCode.OVER_CREDIT
    assert "credit 7680" in fault.message


async def test_a_request_seen_before_runs_nothing(arena: Arena, connection: Connection) -> None:
    name = os.urandom(16)
    await arena.phone.ask(connection, PROMPT, request_id=name)
    for _ in range(5):
        with pytest.raises(SessionFault, match="replayed"):
            await arena.phone.ask(connection, PROMPT, request_id=name)


async def test_numbers_at_the_edge_of_what_is_allowed_hurt_nobody(arena: Arena, connection: Connection) -> None:
    least, most = 5e-324, 2**32 - 1
    edges = [
        Sampling(least, 1.0, 0, 2**64 - 1), Sampling(100.0, least, most, 0), Sampling(least, least, 1, 1),
        Sampling(100.0, 1.0, most, 2**63), Sampling(1.0, 1 - 2**-53, 2, 5),
    ]  # fmt: skip
    for sampling in edges:
        heard = await arena.phone.ask(connection, PROMPT, sampling=sampling, split=2, max_tokens=4)
        assert heard.ids == expected(checkpoint(), PROMPT, sampling, 4)
    heard = await arena.phone.ask(connection, PROMPT[:2], max_tokens=2**32 - 1)
    assert heard.done.reason in (Reason.LENGTH, Reason.STOP)
    assert heard.done.answer_tokens <= 1022


@pytest.mark.parametrize("value", [3.38e38, -3.38e38, 1e-40])
async def test_hidden_states_that_overflow_poison_their_own_session_only(
    arena: Arena, connection: Connection, value: float
) -> None:
    channel = await connection.open()
    await channel.send(arena.open_frame(split=2, max_tokens=1))
    await channel.send(hidden(0, 50, value))
    assert isinstance(await end_of(channel), Done)
    await channel.aclose()


async def until(channel: ClientChannel, kind: type[Frame]) -> None:
    while not isinstance(await channel.receive(), kind):
        pass


@pytest.mark.parametrize("whole", [False, True], ids=["session", "connection"])
@pytest.mark.parametrize("split", [0, 3])
async def test_a_phone_that_goes_in_mid_answer(arena: Arena, split: int, whole: bool) -> None:
    connection = await arena.connect()
    channel = await connection.open()
    await channel.send(arena.open_frame(split=split, max_tokens=NEVER))
    if split:
        for frame in arena.phone.hidden(PROMPT, split=split, rows=25):
            await channel.send(frame)
    await until(channel, Tokens)
    await (connection.aclose() if whole else channel.aclose())
    while arena.server.service.rooms.taken > 1:  # the bystander's
        await turn()
    await connection.aclose()


async def test_a_phone_that_vanishes_in_mid_answer(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that it has gone: its path swallows everything."""
    monkeypatch.setattr("protocol.transport.grpc.SIGN_AFTER", 0.05)
    relay: Any
    async with await (UdpRelay if arena.kind == "quic" else TcpRelay).start(arena.wire.address) as relay:
        connection = await arena.connect(relay.address)
        channel = await connection.open()
        await channel.send(arena.open_frame(split=2, max_tokens=NEVER))
        await until(channel, Admitted)
        seen = await arena.seen(lambda one: int(one.peer.rpartition(":")[2]) in relay.ports and one.silent_s() > 0)
        relay.hold()

        def missed() -> bool:
            forget_that_it_lives(seen)  # again, since what was under way may still have come
            return arena.faults("silent") > 0

        await eventually(missed)
        await connection.aclose()


def forget_that_it_lives(channel: Any) -> None:
    """As if its last sign of life were long ago."""
    if hasattr(channel, "_link"):
        channel._link.quic.heard_at -= 100
    else:
        channel._heard_at -= 100


async def test_a_phone_that_takes_nothing(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no window at all, so that not even Admitted can leave."""
    if arena.kind == "grpc":
        pytest.skip("gRPC's own clients always read ahead; test_grpc.py has a server that says too much for that")
    monkeypatch.setattr("protocol.transport.quic_sessions.STALLED", 1.0)
    with monkeypatch.context() as patch:
        deaf = lambda **how: dataclasses.replace(configuration(**how), max_stream_data=0)  # noqa: E731
        patch.setattr("protocol.transport.quic.configuration", deaf)
        connection = await arena.connect()
    channel = await connection.open()
    await channel.send(arena.open_frame(max_tokens=16))
    seen: Any = await arena.seen(lambda one: one._link.quic._remote_max_stream_data_bidi_local == 0)
    while not seen._closed:
        await turn()
    assert seen._link.quic.unsent(0) > 100
    while seen._link.quic.unsent(0):
        await turn()
    await connection.aclose()


async def test_garbage_on_the_udp_port(arena: Arena) -> None:
    if arena.kind == "grpc":
        pytest.skip("UDP is QUIC's")
    draw, peer, hello = random.Random(7), Peer(arena.wire.address, "127.0.5.1"), Hello.of(arena.wire.trust)
    dispatcher = arena.wire.listener._dispatcher  # type: ignore[union-attr]
    for number in range(1500):
        data = bytearray(draw.randbytes(draw.randrange(1, 1400)))
        live = [cid for link in dispatcher.links for cid in link.cids]
        if number % 3 == 0 and live:  # to a connection that lives
            data[:9] = b"\x40" + draw.choice(live)
        elif number % 3 == 1:
            data = bytearray(hello.packet())
            for _ in range(draw.randrange(1, 30)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        peer.send(bytes(data))
        await turn()
    assert peer.received <= 3 * peer.sent
    peer.close()
