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
from protocol.frames import Draft, Open, Tokens
from protocol.limits import MAX_FRAME
from protocol.transport.base import Address, ServerChannel, ServerTls, Trust
from protocol.transport.grpc import GrpcListener, connect_grpc, serve_grpc
from support.certificates import Authority
from support.sample_frames import opening

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("tidy")]


async def echo(channel: ServerChannel) -> None:
    while isinstance(frame := await channel.receive(), Draft | Open):
        if isinstance(frame, Draft):
            await channel.send(Tokens(frame.position, frame.tokens))


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
