"""What QUIC alone has: verified servers, raw streams, signs of life, limits of a listener."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from protocol.errors import BadFrame, LinkLost, UnverifiedServer
from protocol.frames import Close, Done, Draft, Reason, Tokens
from protocol.limits import CONNECTION_BYTES, MAX_FRAME, PING_AFTER
from protocol.transport.base import Address, ServerChannel, ServerTls, Trust
from protocol.transport.quic import QuicClientChannel, connect_quic, serve_quic
from protocol.transport.quic_sessions import QuicServerChannel
from support.certificates import Authority
from support.quic_raw import Peer
from support.relay import UdpRelay
from support.sample_frames import tokens_of
from support.wires import Serve, echo, endless, turn

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("tidy")]

DONE = Done(Reason.STOP, 1)


async def ask(channel: QuicClientChannel, number: int = 1) -> None:
    """One question and its answer."""
    await channel.send(Draft(number, (number,)))
    assert await channel.receive() == Tokens(number, (number,))


async def open_on(address: Address, trust: Trust) -> QuicClientChannel:
    channel = await (await connect_quic(address, trust)).open()
    assert isinstance(channel, QuicClientChannel)
    return channel


@pytest.mark.parametrize("wrong", ["ca", "name", "expired"])
async def test_a_server_that_cannot_be_verified_is_told_from_one_that_is_gone(
    serve: Serve, authority: Authority, tls: ServerTls, tmp_path: Path, wrong: str
) -> None:
    trust, used = authority.trust, tls
    if wrong == "ca":
        trust = Authority.create("another CA").trust
    elif wrong == "name":
        trust = Trust(trust.ca, "elsewhere.example")
    else:
        used = authority.issue(tmp_path, "127.0.0.1", valid=timedelta(days=-1))
    listener = await serve(echo, used)
    connection = await connect_quic(listener.address, trust)
    with pytest.raises(UnverifiedServer):
        await connection.handshake()
    with pytest.raises(UnverifiedServer):
        await connection.open()
    assert connection.closed
    await connection.aclose()


async def test_a_name_that_is_not_the_host_can_be_trusted(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    connection = await connect_quic(listener.address, Trust(trust.ca, "localhost"))
    await connection.handshake()
    await connection.aclose()


async def test_a_ca_file_may_hold_several_certificates_and_remarks(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    other = Authority.create("another CA").trust.ca
    connection = await connect_quic(listener.address, Trust(b"remark\n" + other + b"\n\n# more\n" + trust.ca + b"\n\n"))
    await connection.handshake()
    await connection.aclose()


@pytest.mark.parametrize("ca", [b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
async def test_a_ca_that_is_no_certificate_is_refused_at_once(trust: Trust, ca: bytes) -> None:
    with pytest.raises(ValueError):
        await connect_quic(Address("127.0.0.1", 9), Trust(ca))


async def test_a_host_without_a_server_is_known_at_once(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    await listener.aclose()
    connection = await connect_quic(listener.address, trust)
    with pytest.raises(LinkLost, match="nobody listens"):
        await connection.handshake()
    await connection.aclose()


async def test_an_unknown_host_is_a_lost_link(trust: Trust) -> None:
    with pytest.raises(LinkLost, match=r"no\.such\.host\.invalid"):
        await connect_quic(Address("no.such.host.invalid", 4433), trust)


async def test_a_server_whose_process_dies_is_noticed_by_a_waiting_phone(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    channel = await open_on(listener.address, trust)
    await ask(channel)
    listener._dispatcher._transport.abort()  # as the kernel does with a dead process's socket: no goodbye
    with pytest.raises(LinkLost):
        await channel.receive()
    await channel._link.aclose()  # type: ignore[attr-defined]


async def test_a_path_that_swallows_everything_is_lost_after_the_idle_timeout(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    async with await UdpRelay.start(listener.address) as relay:
        relay.up.hold()
        connection = await connect_quic(relay.address, trust, idle_timeout=0.2)
        with pytest.raises(LinkLost, match="Idle timeout"):
            await connection.open()
        await connection.aclose()


async def test_a_length_over_the_limit_is_refused_before_its_bytes_come(serve: Serve, trust: Trust) -> None:
    faults: asyncio.Queue[BadFrame] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        try:
            await echo(channel)
        except BadFrame as bad:
            faults.put_nowait(bad)
            raise

    listener = await serve(handler)
    good = await open_on(listener.address, trust)
    link = good._link
    bad = await link.open()  # type: ignore[attr-defined]
    await ask(good)
    link.quic.send_stream_data(bad._id, (MAX_FRAME + 1).to_bytes(4, "big"))
    link.flush_soon()
    assert str(MAX_FRAME + 1) in str(await faults.get())
    with pytest.raises(LinkLost):
        await bad.receive()
    await ask(good, 2)
    await link.aclose()  # type: ignore[attr-defined]


async def test_a_stream_that_says_nothing_is_given_back(serve: Serve, trust: Trust) -> None:
    """Reset before its first byte: no handler ever runs for it, and the stream's credit returns."""
    listener = await serve()
    channel = await open_on(listener.address, trust)
    link = channel._link
    for _ in range(300):
        await (await link.open()).aclose()  # type: ignore[attr-defined]
    await ask(channel)
    assert len(listener._dispatcher.tasks) == 1
    await link.aclose()  # type: ignore[attr-defined]


async def test_sessions_that_do_not_read_hold_a_bounded_number_of_bytes_between_them(
    serve: Serve, trust: Trust
) -> None:
    frame, read = bytes(250_000), asyncio.Event()

    async def handler(channel: ServerChannel) -> None:
        assert isinstance(channel, QuicServerChannel)
        await read.wait()
        for _ in range(20):
            assert await channel.take() == frame
        await channel.send(DONE)

    async def talk(channel: QuicClientChannel) -> None:
        for _ in range(20):
            await channel.put(frame)
        assert await channel.receive() == DONE

    listener = await serve(handler)
    first = await open_on(listener.address, trust)
    link = first._link
    channels = [first, *[await link.open() for _ in range(7)]]  # type: ignore[attr-defined]
    sessions = [asyncio.create_task(talk(channel)) for channel in channels]
    while not listener._dispatcher.links:
        await turn()
    (server,) = listener._dispatcher.links
    while server.quic.untaken < CONNECTION_BYTES - 2000:
        await turn()
    assert server.quic.untaken <= CONNECTION_BYTES
    read.set()
    await asyncio.gather(*sessions)
    await link.aclose()  # type: ignore[attr-defined]


async def test_a_phone_that_takes_nothing_is_given_up(
    serve: Serve, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It acknowledges and pings, but opens no window."""
    monkeypatch.setattr("protocol.transport.quic_link.STALLED", 0.2)
    stalled: asyncio.Queue[str] = asyncio.Queue()
    listener = await serve(endless(stalled))
    deaf, well = await open_on(listener.address, trust), await open_on(listener.address, trust)
    await deaf.send(Close())
    await well.send(Close())
    while stalled.empty():
        assert await well.receive() == tokens_of(250_000)
    assert "took nothing for 0.2 s" in await stalled.get()
    for channel in (deaf, well):
        await channel._link.aclose()  # type: ignore[attr-defined]


async def test_what_is_left_of_an_answer_that_nobody_takes_is_dropped(
    serve: Serve, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.transport.quic_sessions.STALLED", 0.1)

    async def handler(channel: ServerChannel) -> None:
        for _ in range(10):
            await channel.send(tokens_of(300_000))

    listener = await serve(handler)
    channel = await open_on(listener.address, trust)
    await channel.send(Close())
    (server,) = listener._dispatcher.links
    while not server.streams:
        await turn()
    while server.quic.unsent(0) or listener._dispatcher.tasks:
        await turn()
    await channel._link.aclose()  # type: ignore[attr-defined]


async def test_ended_sessions_leave_nothing_behind(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    channel = await open_on(listener.address, trust)
    link = channel._link
    for number in range(20):
        ended_by_phone, ended_by_server = [await link.open() for _ in range(2)]  # type: ignore[attr-defined]
        await ask(ended_by_phone, number)
        await ended_by_phone.aclose()
        await ended_by_server.send(Close())
        with pytest.raises(LinkLost):
            await ended_by_server.receive()
        await ended_by_server.aclose()
    await ask(channel)
    assert len(link.streams) == 1
    (server,) = listener._dispatcher.links
    assert len(server.streams) == 1
    assert len(server.quic._streams) <= 8  # of 41: those that are done may wait for their last acknowledgements
    await link.aclose()  # type: ignore[attr-defined]


async def test_a_quiet_session_is_kept_alive_by_pings(serve: Serve, trust: Trust) -> None:
    channels: asyncio.Queue[ServerChannel] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        channels.put_nowait(channel)
        await echo(channel)

    listener = await serve(handler, idle_timeout=3 * PING_AFTER)
    async with await UdpRelay.start(listener.address) as relay:
        channel = await open_on(relay.address, trust)
        await ask(channel)
        await relay.up.until(len(relay.up.sizes) + 8)
        await ask(channel, 2)
        relay.up.hold()
        seen = await channels.get()
        while seen.silent_s() < PING_AFTER:  # the phone goes on asking
            await relay.up.until(len(relay.up.sizes) + 1)
        relay.up.release()
        await ask(channel, 3)
        assert seen.silent_s() < PING_AFTER
        await channel._link.aclose()  # type: ignore[attr-defined]


async def test_garbage_to_a_live_connection_is_no_sign_of_its_phone(serve: Serve, trust: Trust) -> None:
    channels: asyncio.Queue[ServerChannel] = asyncio.Queue()

    async def handler(channel: ServerChannel) -> None:
        channels.put_nowait(channel)
        await echo(channel)

    listener = await serve(handler)
    async with await UdpRelay.start(listener.address) as relay:
        channel = await open_on(relay.address, trust)
        await ask(channel)
        seen, (server,) = await channels.get(), listener._dispatcher.links
        relay.up.hold()
        stranger, began = Peer(listener.address), server.quic.heard_at
        while seen.silent_s() < 0.3:
            stranger.send(b"\x40" + min(server.cids) + bytes(100))
            await turn()
        assert server.quic.heard_at == began
        relay.up.release()
        await ask(channel, 2)
        assert server.quic.heard_at > began
        stranger.close()
        await channel._link.aclose()  # type: ignore[attr-defined]


async def test_a_connection_without_a_session_is_left_to_end(serve: Serve, trust: Trust) -> None:
    listener = await serve(idle_timeout=0.2)
    channel = await open_on(listener.address, trust)
    link = channel._link
    await ask(channel)
    await channel.aclose()
    with pytest.raises(LinkLost, match="Idle timeout"):
        await link.until(lambda: False)
    await link.aclose()  # type: ignore[attr-defined]


async def test_noise_is_ignored(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    loop = asyncio.get_running_loop()
    noise, _ = await loop.create_datagram_endpoint(
        asyncio.DatagramProtocol, remote_addr=(listener.address.host, listener.address.port)
    )
    for data in (b"", b"\x00", bytes(1200), b"\xc0" + bytes(1300), b"\xff" * 1400, b"\x40" * 30):
        noise.sendto(data)
    channel = await open_on(listener.address, trust)
    await ask(channel)
    noise.close()
    await channel._link.aclose()  # type: ignore[attr-defined]


async def test_a_port_that_is_taken_is_an_os_error(serve: Serve, tls: ServerTls) -> None:
    listener = await serve()
    with pytest.raises(OSError):
        await serve_quic("127.0.0.1", listener.address.port, tls, echo)


async def test_ending_while_the_handshake_is_under_way(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    async with await UdpRelay.start(listener.address) as relay:
        relay.down.hold()
        connection = await connect_quic(relay.address, trust)
        waiting = asyncio.create_task(connection.handshake())
        await relay.up.until(1)
        await connection.aclose()
        with pytest.raises(LinkLost):
            await waiting
        with pytest.raises(LinkLost):
            await connection.open()


async def test_a_phone_hears_why_the_server_ends(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    channel = await open_on(listener.address, trust)
    await ask(channel)
    await listener.aclose()
    with pytest.raises(LinkLost, match=r"shutting down|ended the session"):
        await channel.receive()
    await channel._link.aclose()  # type: ignore[attr-defined]
