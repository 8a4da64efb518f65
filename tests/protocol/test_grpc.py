"""What gRPC alone has: its own words for failures, and a schema that others can speak."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from protocol import split_pb2 as pb
from protocol.errors import LinkLost, UnverifiedServer
from protocol.frames import Draft, Hidden, Tokens, encode
from protocol.limits import CONNECTION_BYTES, MAX_FRAME, TENSOR_CHUNK
from protocol.transport.base import Address, ServerChannel, ServerTls, Trust
from protocol.transport.grpc import connect_grpc, serve_grpc
from protocol.transport.grpc_server import CALLS, GrpcListener
from support.certificates import Authority
from support.sample_frames import OPEN, opening, tokens_of
from support.wires import echo, endless, turn

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("tidy")]


@pytest.fixture
async def listener(tls: ServerTls, tidy: None) -> AsyncIterator[GrpcListener]:
    listener = await serve_grpc("127.0.0.1", 0, tls, echo)
    yield listener
    await listener.aclose()


@pytest.mark.parametrize("wrong", ["ca", "name", "expired"])
async def test_a_server_that_cannot_be_verified_is_told_from_one_that_is_gone(
    authority: Authority, tls: ServerTls, tmp_path: Path, wrong: str
) -> None:
    trust, used = authority.trust, tls
    if wrong == "ca":
        trust = Authority.create("another CA").trust
    elif wrong == "name":
        trust = Trust(trust.ca, "elsewhere.example")
    else:
        used = authority.issue(tmp_path, "127.0.0.1", valid=timedelta(days=-1))
    listener = await serve_grpc("127.0.0.1", 0, used, echo)
    connection = await connect_grpc(listener.address, trust)
    channel = await connection.open()
    with pytest.raises(UnverifiedServer):
        await channel.receive()
    connection_again = await connect_grpc(listener.address, trust)
    with pytest.raises(UnverifiedServer):
        await connection_again.handshake()
    assert connection.closed
    assert connection_again.closed
    await connection.aclose()
    await connection_again.aclose()
    await listener.aclose()


async def test_a_host_without_a_server_is_a_lost_link(listener: GrpcListener, trust: Trust) -> None:
    await listener.aclose()
    connection = await connect_grpc(listener.address, trust)
    with pytest.raises(LinkLost) as lost:
        await connection.handshake()
    assert not isinstance(lost.value, UnverifiedServer)
    await connection.aclose()


async def test_an_unknown_host_is_a_lost_link(trust: Trust) -> None:
    connection = await connect_grpc(Address("no.such.host.invalid", 4433), trust)
    with pytest.raises(LinkLost):
        await connection.handshake()
    await connection.aclose()


async def test_ending_while_the_handshake_is_under_way(trust: Trust) -> None:
    """The peer takes the connection and says nothing."""
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    connection = await connect_grpc(Address("127.0.0.1", port), trust)
    waiting = asyncio.create_task(connection.handshake())
    await asyncio.wait({waiting}, timeout=0)
    await connection.aclose()
    with pytest.raises(LinkLost):
        await waiting
    silent.close()


async def test_a_message_over_the_limit_ends_its_session_only(listener: GrpcListener, trust: Trust) -> None:
    connection = await connect_grpc(listener.address, trust)
    good, bad = await connection.open(), await connection.open()
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    async with grpc.aio.secure_channel(str(listener.address), credentials) as unlimited:
        raw: Any = unlimited
        call = raw.stream_stream("/tandem.v1.Split/Generate")()
        await call.write(bytes(MAX_FRAME + 1))
        assert await call.code() is not grpc.StatusCode.OK
    await good.send(Draft(1, (1,)))
    assert await good.receive() == Tokens(1, (1,))
    await bad.aclose()
    await connection.aclose()


async def test_anyone_with_the_schema_can_speak(listener: GrpcListener, trust: Trust) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    async with grpc.aio.secure_channel(str(listener.address), credentials) as channel:
        generate = channel.stream_stream(
            "/tandem.v1.Split/Generate",
            request_serializer=pb.ClientFrame.SerializeToString,
            response_deserializer=pb.ServerFrame.FromString,
        )
        frames = [pb.ClientFrame(draft=pb.Draft(position=i, tokens=[i])) for i in range(3)]
        call = generate(iter([*frames, pb.ClientFrame(close=pb.Close())]))
        assert [frame.tokens.position async for frame in call] == [0, 1, 2]
        assert await call.code() is grpc.StatusCode.OK


async def test_more_sessions_than_allowed_are_refused(tls: ServerTls, trust: Trust) -> None:
    listener = await serve_grpc("127.0.0.1", 0, tls, echo, max_sessions=1)
    connection = await connect_grpc(listener.address, trust)
    first = await connection.open()
    await first.send(opening())
    await first.send(Draft(1, (1,)))
    assert await first.receive() == Tokens(1, (1,))
    second = await connection.open()
    with pytest.raises(LinkLost):
        await second.receive()
    await connection.aclose()
    await listener.aclose()


async def test_a_port_that_is_taken_is_an_os_error(listener: GrpcListener, tls: ServerTls) -> None:
    with pytest.raises(OSError, match=str(listener.address.port)):
        await serve_grpc("127.0.0.1", listener.address.port, tls, echo)


async def refused(address: Address) -> bool:
    """Whether a TCP connection is ended by the server, which it is not asked to do."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True
    finally:
        writer.close()


async def test_more_connections_than_allowed_are_ended_at_once(tls: ServerTls, trust: Trust) -> None:
    listener = await serve_grpc("127.0.0.1", 0, tls, echo, connections=1)
    connection = await connect_grpc(listener.address, trust)
    await connection.handshake()
    assert await refused(listener.address)
    channel = await connection.open()
    await channel.send(Draft(1, (1,)))
    assert await channel.receive() == Tokens(1, (1,))
    await connection.aclose()
    await listener.aclose()


async def test_a_handshake_that_does_not_go_on_is_ended(tls: ServerTls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.transport.grpc_server.HANDSHAKE_S", 0.3)
    listener = await serve_grpc("127.0.0.1", 0, tls, echo)
    assert await refused(listener.address)
    await listener.aclose()


async def test_a_phone_opens_no_more_calls_than_a_connection_takes(listener: GrpcListener, trust: Trust) -> None:
    connection = await connect_grpc(listener.address, trust)
    channels = [await connection.open() for _ in range(CALLS)]
    one_more = asyncio.create_task(connection.open())
    for channel in channels:
        await channel.send(Draft(1, (1,)))
        assert await channel.receive() == Tokens(1, (1,))
    assert not one_more.done()
    await channels[0].aclose()
    await (await one_more).aclose()
    await connection.open()
    another = asyncio.create_task(connection.open())
    await asyncio.wait({another}, timeout=0)
    await connection.aclose()
    with pytest.raises(LinkLost):
        await another


async def test_the_calls_of_a_connection_hold_a_bounded_number_of_bytes_between_them(
    tls: ServerTls, trust: Trust
) -> None:
    read = asyncio.Event()

    async def handler(channel: ServerChannel) -> None:
        await read.wait()
        for _ in range(8):
            assert isinstance(await channel.receive(), Hidden)
        await channel.send(Tokens(1, (1,)))

    listener = await serve_grpc("127.0.0.1", 0, tls, handler)
    connection = await connect_grpc(listener.address, trust)
    part = Hidden(0, 512, 256, bytes(TENSOR_CHUNK))

    async def talk() -> None:
        channel = await connection.open()
        for _ in range(8):
            await channel.send(part)
        assert await channel.receive() == Tokens(1, (1,))
        await channel.aclose()

    sessions = [asyncio.create_task(talk()) for _ in range(8)]  # 2 MiB each
    while not listener._budgets:
        await turn()
    (budget,) = listener._budgets.values()
    while budget._free >= TENSOR_CHUNK + 100:
        await turn()
    assert budget._free >= 0
    read.set()
    await asyncio.gather(*sessions)
    await connection.aclose()
    await listener.aclose()
    assert not listener._budgets
    assert budget._free == CONNECTION_BYTES


async def test_a_phone_gives_signs_of_life_and_is_missed_without_them(
    tls: ServerTls, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.transport.grpc.SIGN_AFTER", 0.02)
    channels: asyncio.Queue[ServerChannel] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        channels.put_nowait(channel)
        await echo(channel)

    listener = await serve_grpc("127.0.0.1", 0, tls, handler)
    connection = await connect_grpc(listener.address, trust)
    channel = await connection.open()
    await channel.send(Draft(1, (1,)))
    assert await channel.receive() == Tokens(1, (1,))
    seen = await channels.get()
    while not seen.silent_s():
        await turn()
    longest = 0.0
    while seen.silent_s() >= longest:  # until another sign comes
        longest = seen.silent_s()
        await turn()
    channel._tasks[0].cancel()  # type: ignore[attr-defined]
    while seen.silent_s() < 0.2:
        await turn()
    await connection.aclose()
    await listener.aclose()


async def test_nobody_is_missed_who_never_gave_a_sign(tls: ServerTls, trust: Trust) -> None:
    """A client made from the schema alone does not know of them; its keepalive is watched by gRPC."""
    channels: asyncio.Queue[ServerChannel] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        channels.put_nowait(channel)
        await echo(channel)

    listener = await serve_grpc("127.0.0.1", 0, tls, handler)
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    async with grpc.aio.secure_channel(str(listener.address), credentials) as raw:
        call: Any = raw.stream_stream("/tandem.v1.Split/Generate")()
        await call.write(encode(Draft(1, (1,))))
        await call.read()
        assert (await channels.get()).silent_s() == 0.0
    await listener.aclose()


async def test_a_phone_that_takes_nothing_is_given_up(
    tls: ServerTls, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.transport.grpc_server.STALLED", 0.3)
    stalled: asyncio.Queue[str] = asyncio.Queue()
    listener = await serve_grpc("127.0.0.1", 0, tls, endless(stalled))
    well = await connect_grpc(listener.address, trust)
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    async with grpc.aio.secure_channel(str(listener.address), credentials) as raw:
        call: Any = raw.stream_stream("/tandem.v1.Split/Generate")()
        await call.write(encode(OPEN))
        channel = await well.open()
        await channel.send(OPEN)
        while stalled.empty():
            assert await channel.receive() == tokens_of(250_000)
        assert "took nothing for 0.3 s" in await stalled.get()
    await well.aclose()
    await listener.aclose()
