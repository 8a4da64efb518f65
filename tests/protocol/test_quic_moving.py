"""Moving between real sockets: the phone's own, and those that a relay in between changes under it."""

from __future__ import annotations

import asyncio
import errno
import inspect
import math
import os

import pytest
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet_builder import QuicPacketBuilder

from protocol.errors import LinkLost
from protocol.frames import Draft, Tokens
from protocol.transport.base import Address, ServerChannel, Trust
from protocol.transport.quic import QuicClientChannel, connect_quic
from protocol.transport.quic_client import FIRST_RETRY_S, MOST_RETRY_S, ClientLink
from support.eventually import eventually
from support.relay import UdpRelay
from support.wires import Serve

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("tidy")]


async def opened(address: Address, trust: Trust) -> tuple[ClientLink, QuicClientChannel]:
    """A connection whose session has been answered once."""
    phone = await connect_quic(address, trust)
    channel = await phone.open()
    assert isinstance(channel, QuicClientChannel)
    await ask(channel, 0)
    return phone, channel


async def ask(channel: QuicClientChannel, number: int = 1) -> None:
    """One question and its answer."""
    await channel.send(Draft(number, (number,)))
    assert await channel.receive() == Tokens(number, (number,))


def port(phone: ClientLink) -> int:
    assert phone._transport is not None
    found: int = phone._transport.get_extra_info("sockname")[1]
    return found


async def test_a_session_goes_on_from_socket_to_socket(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    phone, channel = await opened(listener.address, trust)
    (server,) = listener._dispatcher.links
    ports, ids, files = {port(phone)}, {phone.quic._peer_cid.cid}, len(os.listdir("/proc/self/fd"))
    for number in range(1, 31):
        assert await phone.move()
        await ask(channel, number)
        assert server.quic._network_paths[0].addr[1] == port(phone)
        ports.add(port(phone))
        ids.add(phone.quic._peer_cid.cid)
    assert (len(ports), len(ids)) == (31, 31)
    assert len(server.quic._network_paths) <= 8
    assert len(os.listdir("/proc/self/fd")) <= files + 1
    await phone.aclose()


async def test_moves_at_the_same_time_are_one(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    phone, channel = await opened(listener.address, trust)
    before = phone.quic._peer_cid.sequence_number
    assert await asyncio.gather(*(phone.move() for _ in range(5))) == [True] * 5
    assert phone.quic._peer_cid.sequence_number == before + 1
    await ask(channel)
    await phone.aclose()


@pytest.mark.parametrize("silent", [False, True])
async def test_a_session_survives_rebinding_after_rebinding(serve: Serve, trust: Trust, silent: bool) -> None:
    listener = await serve()
    async with await UdpRelay.start(listener.address) as relay:
        phone, channel = await opened(relay.address, trust)
        for number in range(10):
            relay.rebind(silent=silent)
            await ask(channel, number)
        assert len(relay.ports) == 11
        await phone.aclose()


async def test_a_session_that_only_listens_survives_a_silent_rebinding(serve: Serve, trust: Trust) -> None:
    """The phone has nothing to say but its pings, which show the server the new port."""
    rebound = asyncio.Event()

    async def late(channel: ServerChannel) -> None:
        await channel.receive()
        await channel.send(Tokens(0, (0,)))
        await rebound.wait()
        await channel.send(Tokens(1, (1,)))
        await channel.receive()

    listener = await serve(late)
    async with await UdpRelay.start(listener.address) as relay:
        phone, channel = await opened(relay.address, trust)
        relay.rebind(silent=True)
        rebound.set()
        async with asyncio.timeout(20):
            assert await channel.receive() == Tokens(1, (1,))
        await phone.aclose()


async def test_a_move_out_of_a_dead_path_carries_the_session_on(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    async with await UdpRelay.start(listener.address) as relay:
        phone, channel = await opened(relay.address, trust)
        relay.swallow(port(phone))
        waiting = asyncio.create_task(ask(channel))
        await eventually(lambda: phone.silent_s() > 0.3)
        assert await phone.move()
        async with asyncio.timeout(20):
            await waiting
        assert phone.silent_s() < 0.3
        await phone.aclose()


async def test_a_connection_that_is_not_there_yet_or_no_more_does_not_move(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    async with await UdpRelay.start(listener.address) as relay:
        relay.down.hold()
        early = await connect_quic(relay.address, trust)
        assert not await early.move()
        await early.aclose()
    phone, _ = await opened(listener.address, trust)
    await phone.aclose()
    assert not await phone.move()
    assert not phone.displaced()


async def test_a_connection_that_ends_while_it_moves_leaves_no_socket(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    phone, _ = await opened(listener.address, trust)
    files = set(os.listdir("/proc/self/fd"))
    moving = asyncio.create_task(phone.move())
    await asyncio.sleep(0)
    phone.lose(LinkLost("gone"))
    assert not await moving
    await phone.aclose()
    assert len(set(os.listdir("/proc/self/fd")) - files) == 0


async def test_where_there_is_no_way_the_socket_stays(
    serve: Serve, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    listener = await serve()
    phone, channel = await opened(listener.address, trust)
    here = port(phone)
    with monkeypatch.context() as broken:
        broken.setattr("protocol.transport.quic_client.connected", refuse)
        assert not await phone.move()
    assert port(phone) == here
    await ask(channel)
    await phone.aclose()


@pytest.mark.parametrize(
    "code", [errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EPERM]
)
async def test_an_error_of_sending_moves_the_connection_and_no_more_often_than_helps(
    serve: Serve, trust: Trust, code: int
) -> None:
    listener = await serve()
    phone, channel = await opened(listener.address, trust)
    waits = []
    for turn in range(8):
        assert phone._port is not None
        here, phone._retry_at = port(phone), 0.0
        phone._port.error_received(OSError(code, os.strerror(code)))
        assert phone._move is not None
        assert await phone._move
        assert port(phone) != here
        again = phone._move
        phone._retry_at = math.inf
        phone._port.error_received(OSError(code, os.strerror(code)))
        assert phone._move is again
        waits.append(phone._retry_s)
        if turn:
            phone.quic.heard_at -= 10.0  # as if it had not helped
    assert waits[0] == FIRST_RETRY_S
    assert waits[-1] == MOST_RETRY_S
    assert waits == sorted(waits)
    await ask(channel)
    await phone.aclose()


async def test_what_a_socket_says_that_was_left_is_not_heard(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    phone, channel = await opened(listener.address, trust)
    left = phone._port
    assert left is not None
    assert await phone.move()
    left.error_received(ConnectionRefusedError())
    await ask(channel)
    await phone.aclose()


async def test_aioquic_still_has_what_moving_relies_on() -> None:
    assert list(inspect.signature(QuicConnection._write_ping_frame).parameters) == [
        "self",
        "builder",
        "uids",
        "comment",
    ]
    assert "self._probe_pending = True" in inspect.getsource(QuicConnection._send_probe)
    assert "self._datagram_needs_padding" in inspect.getsource(QuicPacketBuilder._end_packet)
    source = inspect.getsource(QuicConnection)
    for name in ("self._network_paths.insert(0, network_path)", "self._handshake_confirmed", "self._max_datagram_size"):
        assert name in source
