"""The two ends of a bulk transfer, each a process in its own network namespace. `bulk.py` starts them.

bulk_ends.py serve FOLDER HOST          prints "ready" and serves until its input ends
bulk_ends.py once FOLDER HOST WAY N     N times a megabyte on a new connection that has answered once: seconds
bulk_ends.py flow FOLDER HOST WAY S     sends for S seconds: bytes/s answered after the first five
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import support.plain_control  # noqa: F401  # registers those controls
from protocol.errors import LinkLost
from protocol.frames import Hidden, Tokens
from protocol.transport import quic_connection
from protocol.transport.base import Address, ServerChannel, Trust
from protocol.transport.grpc import connect_grpc, serve_grpc
from protocol.transport.quic import connect_quic, serve_quic
from support.certificates import Authority
from support.sample_frames import OPEN

QUIC, GRPC, TCP = 7001, 7002, 7003
SIZE = 1_000_000  # bytes of one transfer
PIECE = 25_000  # bytes, each answered
WARM_S = 5.0
QUICS = {"QUIC, this": "", "QUIC, cubic": "plain-cubic", "QUIC, reno": "plain-reno"}


@dataclass(frozen=True, slots=True)
class Pipe:
    """Pieces go up, each is answered."""

    send: Callable[[], Awaitable[None]]
    answer: Callable[[], Awaitable[object]]


async def answer_pieces(channel: ServerChannel) -> None:
    with contextlib.suppress(LinkLost):
        while True:
            await channel.receive()
            await channel.send(Tokens(0, (1,)))


async def answer_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # at the end
        while await reader.readexactly(PIECE):
            writer.write(b"x")
    writer.close()


async def serve(folder: Path, host: str) -> None:
    authority = Authority.create()
    tls = authority.issue(folder, host)
    (folder / "ca.pem").write_bytes(authority.trust.ca)
    listeners = [await serve_quic(host, QUIC, tls, answer_pieces), await serve_grpc(host, GRPC, tls, answer_pieces)]
    plain = await asyncio.start_server(answer_bytes, host, TCP)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    plain.close()
    for listener in listeners:
        await listener.aclose()


@asynccontextmanager
async def pipe(folder: Path, host: str, way: str) -> AsyncIterator[Pipe]:
    """A new connection."""
    if way.startswith("TCP"):
        sock = socket.create_connection((host, TCP))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, way.split()[-1].encode())
        reader, writer = await asyncio.open_connection(sock=sock)

        async def send() -> None:
            writer.write(bytes(PIECE))
            await writer.drain()

        try:
            yield Pipe(send, lambda: reader.readexactly(1))
        finally:
            writer.transport.abort()
        return
    trust = Trust((folder / "ca.pem").read_bytes())
    if way in QUICS:
        quic_connection.NAME = QUICS[way] or quic_connection.NAME
        connection = await connect_quic(Address(host, QUIC), trust)
    else:
        connection = await connect_grpc(Address(host, GRPC), trust)
    try:
        channel = await connection.open()
        await channel.send(OPEN)
        await channel.receive()
        yield Pipe(lambda: channel.send(Hidden(0, 1, PIECE // 2, bytes(PIECE))), channel.receive)
    finally:
        await connection.aclose()


async def once(folder: Path, host: str, way: str) -> float:
    async with pipe(folder, host, way) as made:
        began = time.monotonic()
        sending = asyncio.create_task(_send(made, SIZE // PIECE))
        for _ in range(SIZE // PIECE):
            await made.answer()
        took = time.monotonic() - began
        await sending
    return took


async def _send(made: Pipe, pieces: int) -> None:
    for _ in range(pieces):
        await made.send()


async def flow(folder: Path, host: str, way: str, seconds: float) -> float:
    async with pipe(folder, host, way) as made:
        sending = asyncio.create_task(_send(made, 1 << 40))
        began, answered = time.monotonic(), 0
        try:
            while (now := time.monotonic()) < began + seconds:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + began + seconds - now):
                        await made.answer()
                        answered += time.monotonic() > began + WARM_S
        finally:
            sending.cancel()
    return answered * PIECE / (seconds - WARM_S)


async def main() -> None:
    what, folder, host, *rest = sys.argv[1:]
    if what == "serve":
        await serve(Path(folder), host)
    elif what == "once":
        for _ in range(int(rest[1])):
            print(await once(Path(folder), host, rest[0]), flush=True)
    else:
        print(await flow(Path(folder), host, rest[0], float(rest[1])))


if __name__ == "__main__":
    asyncio.run(main())
