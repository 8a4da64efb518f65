"""One suite for the three transports: what a channel promises, whatever carries it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from protocol.errors import BadFrame, LinkLost
from protocol.frames import Close, Done, Draft, Frame, Open, Reason, Tokens
from protocol.limits import MAX_FRAME, MAX_LOG
from protocol.transport.base import ServerChannel
from support.sample_frames import OPEN, opening, opening_of, tokens_of
from support.wires import Wire, send_raw

pytestmark = pytest.mark.anyio

DONE = Done(Reason.STOP, 1)


async def echo(channel: ServerChannel) -> None:
    """Answers every Draft with its own tokens, until Close."""
    while not isinstance(frame := await channel.receive(), Close):
        if isinstance(frame, Draft):
            await channel.send(Tokens(frame.position, frame.tokens))
    await channel.send(DONE)


async def send_forever(channel: Any, frame: Frame) -> None:
    while True:
        await channel.send(frame)


async def test_frames_arrive_in_order_in_both_directions(wire: Wire) -> None:
    await wire.serve(echo)
    channel = await wire.open()

    async def send() -> None:
        for i in range(200):
            await channel.send(Draft(i, (i, i + 1)))

    sending = asyncio.create_task(send())
    assert [await channel.receive() for _ in range(200)] == [Tokens(i, (i, i + 1)) for i in range(200)]
    await sending
    await channel.send(Close())
    assert await channel.receive() == DONE


async def test_the_first_frame_arrives_whole_and_says_how_it_came(wire: Wire) -> None:
    seen: asyncio.Queue[tuple[object, ...]] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        frame = await channel.receive()
        await channel.handshake()
        seen.put_nowait((frame, channel.transport, channel.early, channel.ticket_age_s))
        assert channel.peer
        assert channel.silent_s() >= 0.0
        assert channel.delivery_rate() >= 0.0

    await wire.serve(handler)
    channel = await wire.open()
    opened = opening(stop=("end",), token="key", cloud_draft=4, sparse=True)
    await channel.send(opened)
    assert await seen.get() == (opened, wire.kind, False, None)


@pytest.mark.parametrize("size", [2000, MAX_FRAME - 1, MAX_FRAME])
async def test_a_frame_of_any_allowed_size_arrives(wire: Wire, size: int) -> None:
    answer = tokens_of(size)

    async def handler(channel: ServerChannel) -> None:
        await channel.send(Tokens(0, (len((await channel.receive()).log),)))  # type: ignore[union-attr]
        await channel.send(answer)

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(opening_of(MAX_LOG))
    assert await channel.receive() == Tokens(0, (MAX_LOG,))
    assert await channel.receive() == answer
    assert channel.bytes_up > MAX_LOG
    assert channel.bytes_down > size


async def test_many_sessions_share_a_connection_without_mixing(wire: Wire) -> None:
    await wire.serve(echo)
    connection = await wire.connect()

    async def session(number: int) -> list[object]:
        channel = await connection.open()
        for i in range(5):
            await channel.send(Draft(number, (i,)))
        got = [await channel.receive() for _ in range(5)]
        await channel.aclose()
        return got  # type: ignore[return-value]

    answers = await asyncio.gather(*(session(number) for number in range(64)))
    assert answers == [[Tokens(number, (i,)) for i in range(5)] for number in range(64)]


async def test_far_more_sessions_than_streams_follow_each_other(wire: Wire) -> None:
    await wire.serve(echo)
    connection = await wire.connect()
    for number in range(300):
        channel = await connection.open()
        await channel.send(Draft(number, (1,)))
        assert await channel.receive() == Tokens(number, (1,))
        await channel.aclose()


async def test_what_the_server_sent_before_its_end_is_read_before_the_end(wire: Wire) -> None:
    async def handler(channel: ServerChannel) -> None:
        for i in range(50):
            await channel.send(Tokens(i, (i,)))
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(LinkLost):
            await channel.send(DONE)
        with pytest.raises(LinkLost):
            await channel.receive()

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    assert [await channel.receive() for _ in range(50)] == [Tokens(i, (i,)) for i in range(50)]
    with pytest.raises(LinkLost):
        await channel.receive()
    with pytest.raises(LinkLost):
        await send_forever(channel, Draft(0, (1,)))


@pytest.mark.parametrize("whole", [False, True], ids=["channel", "connection"])
async def test_a_phone_that_goes_is_noticed_by_a_server_that_receives(wire: Wire, whole: bool) -> None:
    opened, lost = asyncio.Event(), asyncio.Event()

    async def handler(channel: ServerChannel) -> None:
        await channel.receive()
        opened.set()
        with pytest.raises(LinkLost):
            await channel.receive()
        lost.set()

    await wire.serve(handler)
    connection = await wire.connect()
    channel = await connection.open()
    await channel.send(OPEN)
    await opened.wait()
    for _ in range(2):
        await (connection.aclose() if whole else channel.aclose())
    await lost.wait()
    with pytest.raises(LinkLost):
        await channel.send(OPEN)
    with pytest.raises(LinkLost):
        await channel.receive()
    assert connection.closed == whole


async def test_a_phone_that_goes_is_noticed_by_a_server_that_sends(wire: Wire) -> None:
    lost = asyncio.Event()

    async def handler(channel: ServerChannel) -> None:
        with pytest.raises(LinkLost):
            await send_forever(channel, Tokens(0, (1,) * 1000))
        lost.set()

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    await channel.receive()
    await channel.aclose()
    await lost.wait()


async def test_a_closed_connection_opens_nothing(wire: Wire) -> None:
    await wire.serve(echo)
    connection = await wire.connect()
    await connection.handshake()
    assert not connection.closed
    await connection.aclose()
    assert connection.closed
    with pytest.raises(LinkLost):
        await connection.open()


async def test_a_server_that_stops_is_noticed_and_its_handlers_have_ended(wire: Wire) -> None:
    opened, running = asyncio.Event(), True

    async def handler(channel: ServerChannel) -> None:
        nonlocal running
        await channel.receive()
        opened.set()
        try:
            await channel.receive()
        finally:
            running = False

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    await opened.wait()
    await wire.stop_serving()
    assert not running
    with pytest.raises(LinkLost):
        await channel.receive()
    await wire.stop_serving()


async def test_a_handler_that_waits_for_something_else_is_cancelled(wire: Wire) -> None:
    opened, cancelled = asyncio.Event(), False

    async def handler(channel: ServerChannel) -> None:
        nonlocal cancelled
        opened.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    await opened.wait()
    await wire.stop_serving()
    assert cancelled


async def test_a_bad_frame_ends_its_session_only(wire: Wire) -> None:
    faults: asyncio.Queue[BadFrame] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        try:
            await echo(channel)
        except BadFrame as bad:
            faults.put_nowait(bad)
            raise

    await wire.serve(handler)
    connection = await wire.connect()
    good, bad = await connection.open(), await connection.open()
    await good.send(Draft(1, (1,)))
    await send_raw(bad, b"\xff\xff\xff")
    assert "3 bytes" in str(await faults.get())
    with pytest.raises(LinkLost):
        await bad.receive()
    assert await good.receive() == Tokens(1, (1,))
    await good.send(Draft(2, (2,)))
    assert await good.receive() == Tokens(2, (2,))


async def test_a_frame_of_the_wrong_kind_is_refused_by_the_phone_too(wire: Wire) -> None:
    async def handler(channel: ServerChannel) -> None:
        await channel.receive()
        if hasattr(channel, "put"):
            await channel.put(b"")
        else:
            await channel._down.put(b"")  # type: ignore[attr-defined]
        await channel.send(DONE)

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    with pytest.raises(BadFrame):
        await channel.receive()


async def test_a_reader_that_does_not_read_stops_the_sender_and_loses_nothing(wire: Wire) -> None:
    answer, count = tokens_of(250_000), 64 if wire.kind == "grpc" else 24
    sent = 0
    finished = asyncio.Event()

    async def handler(channel: ServerChannel) -> None:
        nonlocal sent
        for _ in range(count):
            await channel.send(answer)
            sent += 1
        finished.set()

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(finished.wait(), 1.0)
    assert sent <= {"memory": 9, "quic": 16, "grpc": 56}[wire.kind]  # TCP's own buffers are larger than ours
    for _ in range(count):
        assert await channel.receive() == answer
    await finished.wait()


async def test_a_cancelled_receive_loses_nothing(wire: Wire) -> None:
    await wire.serve(echo)
    channel = await wire.open()
    for i in range(20):
        waiting = asyncio.create_task(channel.receive())
        await asyncio.wait({waiting}, timeout=0)
        waiting.cancel()
        await asyncio.wait({waiting})
        await channel.send(Draft(i, (i,)))
        assert await channel.receive() == Tokens(i, (i,))


async def test_a_cancelled_send_leaves_whole_frames(wire: Wire) -> None:
    start, sent = asyncio.Event(), 0

    async def handler(channel: ServerChannel) -> None:
        nonlocal sent
        answer = tokens_of(250_000)
        with suppress(asyncio.TimeoutError):
            while True:
                await asyncio.wait_for(channel.send(answer), 0.3)
                sent += 1
        start.set()
        await channel.send(DONE)

    await wire.serve(handler)
    channel = await wire.open()
    await channel.send(OPEN)
    await start.wait()
    received = 0
    while await channel.receive() != DONE:
        received += 1
    assert received == sent


async def test_the_facts_of_a_link(wire: Wire) -> None:
    await wire.serve(echo)
    connection = await wire.connect()
    await connection.handshake()
    channel = await connection.open()
    await channel.send(Draft(0, (1,) * 50))
    await channel.receive()
    facts = connection.facts()
    assert not facts.resumed
    assert not facts.early_accepted
    assert connection.ticket_age_s is None
    if wire.kind != "memory":
        assert facts.bytes_sent >= channel.bytes_up > 50
        assert facts.bytes_received >= channel.bytes_down > 50
    if wire.kind == "quic":
        assert facts.rtt_s is not None
        assert facts.min_rtt_s is not None
        assert 0 < facts.min_rtt_s <= facts.rtt_s < 5


async def test_every_field_of_an_open_arrives(wire: Wire) -> None:
    got: asyncio.Queue[Open] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        frame = await channel.receive()
        assert isinstance(frame, Open)
        got.put_nowait(frame)

    await wire.serve(handler)
    channel = await wire.open()
    wanted = opening(attempt=3, ticket_age_s=1.5, token="secret", stop=("a", "b"))
    await channel.send(wanted)
    assert await got.get() == wanted
