"""What strangers' bytes reach first, one function each: any bytes go, and whatever is raised is a fault of ours."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.tls import Epoch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server.tokens import Trusted, Verifier
from protocol.errors import BadFrame, SessionFault
from protocol.frames import Close, Draft, Frame, Hidden, Tokens, decode_client, decode_server, encode
from protocol.limits import MAX_FRAME
from protocol.tensor import unpack
from protocol.transport import tickets
from protocol.transport.base import Address, ServerChannel, ServerTls, Trust, end_sessions
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.quic_door import Bounds
from protocol.transport.quic_link import HEADER, Link, Stream
from protocol.transport.quic_server import Dispatcher
from protocol.transport.tickets import ServerTickets
from support.certificates import Authority
from support.quic_pair import CLIENT, SERVER, phone
from support.quic_raw import Hello, crypto, initial

Target = Callable[[bytes], None]
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")


# frames


def client_frame(data: bytes) -> None:
    _same_again(decode_client, data)


def server_frame(data: bytes) -> None:
    _same_again(decode_server, data)


def _same_again(decode: Callable[[bytes], Frame], data: bytes) -> None:
    """What is read is written and read again as it was, unless writing it takes more bytes than a frame may have."""
    try:
        frame = decode(data)
        again = encode(frame)
    except BadFrame:
        return
    assert decode(again) == frame


def tensor(data: bytes) -> None:
    try:
        frame = decode_client(data)
        if isinstance(frame, Hidden):
            assert unpack(frame, frame.width).shape == (frame.rows, frame.width)
    except SessionFault:
        return


def envelope(data: bytes) -> None:
    """The first byte says in what pieces the rest arrives."""
    _run(_envelope(data))


async def _envelope(data: bytes) -> None:
    stream, step, data = Stream(_idle_link(), 0), 1 + data[0] if data else 1, data[1:]
    wanted, taken = _frames(data), 0
    with suppress(BadFrame):
        for at in range(0, len(data), step):
            stream.feed(data[at : at + step], end=False)
            while (frame := stream._cut()) is not None:
                assert frame == next(wanted)
                taken += HEADER + len(frame)
        assert next(wanted, None) is None
    assert stream._link.quic.untaken == len(stream._received) <= len(data) - taken


def _frames(data: bytes) -> Iterator[bytes]:
    while len(data) >= HEADER and HEADER + (size := int.from_bytes(data[:HEADER], "big")) <= len(data):
        if size > MAX_FRAME:
            return
        yield data[HEADER : HEADER + size]
        data = data[HEADER + size :]


def _idle_link() -> Link:
    return Link(MendedConnection(configuration=configuration(is_client=True, idle_timeout=15.0)))


# texts


def address(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        found = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(found)) == found


def ticket(data: bytes) -> None:
    with suppress(ValueError):
        tickets._load(data.decode(errors="replace"))


def token(data: bytes) -> None:
    with suppress(SessionFault):
        _verifier().verify(data.decode(errors="surrogateescape"))
        raise AssertionError("a token that nobody signed")


@cache
def _verifier() -> Verifier:
    return Verifier(Trusted({"a": Ed25519PrivateKey.generate().public_key()}, {}, None))


# QUIC


class Air(asyncio.DatagramTransport):
    """A UDP port that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[bytes, Any]] = []

    def sendto(self, data: Any, addr: Any = None) -> None:
        self.sent.append((data, addr))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        return


async def _echo(channel: ServerChannel) -> None:
    while not isinstance(frame := await channel.receive(), Close):
        if isinstance(frame, Draft):
            await channel.send(Tokens(frame.position, frame.tokens))


@cache
def _identity() -> tuple[Trust, ServerTls]:
    authority = Authority.create()
    return authority.trust, authority.issue(Path(FOLDER.name), "localhost")


@cache
def _hello() -> Hello:
    return Hello.of(_identity()[0])


async def _port(attack: Callable[[Dispatcher, Air], int], retry_above: float = 1e6) -> None:
    """A listener; `attack` tells how many bytes it sent from an address that it never showed to be its own."""
    config, air = configuration(is_client=False, idle_timeout=15.0), Air()
    tls = _identity()[1]
    config.load_cert_chain(tls.certificate, tls.key)
    server = Dispatcher(config, _echo, ServerTickets(), Bounds(retry_above=retry_above, per_prefix=1e6))
    server.connection_made(air)
    try:
        came = attack(server, air)
        assert sum(len(data) for data, _ in air.sent) <= 3 * came
        for _ in range(3):
            await asyncio.sleep(0)
    finally:
        server.shut()
        await end_sessions(server.tasks)
        server.release()


def datagram(data: bytes) -> None:
    """The first byte says whether a Retry is demanded."""

    def attack(server: Dispatcher, air: Air) -> int:
        server.datagram_received(data[1:], CLIENT)
        return len(data)

    _run(_port(attack, 1e6 if data[:1] < b"\x80" else 0))


def first_packet(data: bytes) -> None:
    """The frames of a first packet that is sealed as it should be."""
    _packets(initial(data[:1100], to=b"12345678", source=b"abcdefgh"))


def client_hello(data: bytes) -> None:
    """A handshake message, in order, in as many first packets as it takes."""
    parts = [crypto(data[at : at + 1000], at) for at in range(0, len(data), 1000)]
    _packets(*(initial(part, to=b"12345678", source=_hello().cid, number=n) for n, part in enumerate(parts)))


def _packets(*packets: bytes) -> None:
    def attack(server: Dispatcher, air: Air) -> int:
        for packet in packets:
            server.datagram_received(packet, CLIENT)
        return sum(len(packet) for packet in packets)

    _run(_port(attack))


def established(data: bytes) -> None:
    """The frames of packets on a connection whose handshake is complete, each behind its length in two bytes."""

    def attack(server: Dispatcher, air: Air) -> int:
        client = phone(_identity()[0])
        client.connect(SERVER, now=server._loop.time())
        while flight := client.datagrams_to_send(now=server._loop.time()):
            for out, _ in flight:
                server.datagram_received(out, CLIENT)
            for back, _ in air.sent:
                client.receive_datagram(back, SERVER, now=server._loop.time())
            air.sent.clear()
        for payload in _payloads(data):
            server.datagram_received(_sealed(client, payload), CLIENT)
        air.sent.clear()
        return 0

    _run(_port(attack))


def _payloads(data: bytes) -> Iterator[bytes]:
    while len(data) > 2:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + min(size, 1100)]
        data = data[2 + size :]


def _sealed(client: MendedConnection, payload: bytes) -> bytes:
    builder = QuicPacketBuilder(
        host_cid=client.host_cid, peer_cid=client._peer_cid.cid, is_client=True, max_datagram_size=1200,
        packet_number=client._packet_number, version=client._version or 0,
    )  # fmt: skip
    builder.start_packet(QuicPacketType.ONE_RTT, client._cryptos[Epoch.ONE_RTT])
    builder._buffer.push_bytes(payload or b"\x01")
    (out,), _ = builder.flush()
    client._packet_number = builder.packet_number
    return out


_LOOP = asyncio.new_event_loop()


def _run(what: Coroutine[Any, Any, None]) -> None:
    """The loop reports what breaks in a callback, which would otherwise only be logged."""
    broken: list[BaseException] = []
    _LOOP.set_exception_handler(lambda _, context: broken.append(context.get("exception") or Exception(context)))
    _LOOP.run_until_complete(what)
    if broken:
        raise broken[0]


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        client_frame, server_frame, tensor, envelope, address, ticket, token, datagram, first_packet, client_hello,
        established,
    )
}  # fmt: skip
