"""The kinds of abuse that `abuse.py` compares.

Each is a process of its own, which ends at SIGTERM and says how much it did.

    python benchmarks/attacks.py NAME --place DIR --wire PORT --https PORT
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
from phones import Phones, Target, target_in

from protocol.errors import WireError
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.quic_connection import MendedConnection, configuration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL

Attack = Callable[[Target], Awaitable[None]]
done = 0  # what the abuser has done so far


def count() -> None:
    global done
    done += 1


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


async def garbage(target: Target) -> None:
    """2,000 datagrams a second of random bytes, some dressed as long headers."""
    with udp() as sock:
        while True:
            for _ in range(20):
                head = random.choice([b"", b"\xc0\x00\x00\x00\x01", b"\xff\x00\x00\x00\x02"])
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(head + os.urandom(random.randrange(1, 1250)), (target.wire.host, target.wire.port))
                count()
            await asyncio.sleep(0.01)


async def half_open(target: Target) -> None:
    """First flights of real handshakes that are never continued, each from a new port."""
    while True:
        config = configuration(is_client=True, idle_timeout=10)
        config.server_name = "localhost"
        quic = MendedConnection(configuration=config)
        quic.connect((target.wire.host, target.wire.port), now=time.monotonic())
        with udp() as sock:
            for data, _ in quic.datagrams_to_send(now=time.monotonic()):
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(data, (target.wire.host, target.wire.port))
        count()
        await asyncio.sleep(0.002)


async def handshakes(target: Target) -> None:
    """Whole handshakes, and nothing after them."""
    while True:
        with contextlib.suppress(WireError, TimeoutError):
            link = await connect_quic(target.wire, target.trust)
            try:
                async with asyncio.timeout(3):
                    await link.handshake()
            finally:
                await link.aclose()
        count()


async def silent_connections(target: Target) -> None:
    """Two hundred connections that stay and say nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(200):
            with contextlib.suppress(WireError, TimeoutError):
                link = await connect_quic(target.wire, target.trust)
                stack.push_async_callback(link.aclose)
                async with asyncio.timeout(3):
                    await link.handshake()
                count()
        await asyncio.Event().wait()


async def broken_frames(target: Target) -> None:
    """Sessions whose frames are noise, over gRPC."""
    while True:
        connection = await connect_grpc(target.wire, target.trust)
        try:
            for _ in range(50):
                with contextlib.suppress(WireError):
                    channel = await connection.open()
                    try:
                        await channel._up.put(os.urandom(random.randrange(1, 4000)))  # type: ignore[attr-defined]
                        await channel.receive()
                    finally:
                        await channel.aclose()
                count()
        finally:
            await connection.aclose()


async def vanishing(target: Target) -> None:
    """Phones that ask for a long answer and are never heard of again."""
    phones = Phones(FULL, target.token)
    prompt = phones.prompt("I would like to book a table")
    while True:
        with contextlib.suppress(WireError, TimeoutError):
            async with asyncio.timeout(3):
                link = await connect_quic(target.wire, target.trust)
                channel = await link.open()
                await channel.send(phones.opening(prompt, 400))
                await channel.receive()
                assert link._transport is not None
                link._transport.abort()
        count()
        await asyncio.sleep(0.05)


async def bad_tokens(target: Target) -> None:
    """Requests with forged tokens of unknown key ids."""
    head = "eyJhbGciOiJFZERTQSIsImtpZCI6"
    async with target.client() as client:
        while True:
            forged = f"{head}{os.urandom(6).hex()}.eyJzdWIiOiJ4In0.{os.urandom(32).hex()}"
            with contextlib.suppress(httpx.HTTPError):
                await client.get("/v1/models", headers={"authorization": f"Bearer {forged}"})
            count()


async def big_bodies(target: Target) -> None:
    """Bodies of 100 MB, in pieces, with a good token."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1600):
            yield b"x" * 65536

    async with target.client() as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                await client.post("/v1/chat/completions", content=body(),
                                  headers={"authorization": f"Bearer {target.token}"})  # fmt: skip
            count()


async def slow_bodies(target: Target) -> None:
    """A hundred connections that send one byte of their body a second."""

    async def dribble() -> AsyncIterator[bytes]:
        while True:
            yield b"{"
            await asyncio.sleep(1)

    async def one(client: httpx.AsyncClient) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                count()
                await client.post("/v1/chat/completions", content=dribble(),
                                  headers={"authorization": f"Bearer {target.token}"})  # fmt: skip
            await asyncio.sleep(0.5)

    async with target.client() as client, asyncio.TaskGroup() as tasks:
        for _ in range(100):
            tasks.create_task(one(client))


async def stalled_readers(target: Target) -> None:
    """Streams of answers whose readers have stopped reading."""
    body = {"model": FULL, "prompt": "Hello", "stream": True, "max_tokens": 400, "n": 2}
    headers = {"authorization": f"Bearer {target.token}"}
    async with target.client() as client, contextlib.AsyncExitStack() as stack:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                await stack.enter_async_context(client.stream("POST", "/v1/completions", json=body, headers=headers))
                count()
            await asyncio.sleep(0.2)


ATTACKS: dict[str, Attack] = {
    one.__name__.replace("_", "-"): one
    for one in (garbage, half_open, handshakes, silent_connections, broken_frames, vanishing, bad_tokens, big_bodies,
                slow_bodies, stalled_readers)
}  # fmt: skip


async def attack(name: str, target: Target) -> None:
    """Runs one kind of abuse until SIGTERM, and prints how much of it there was."""
    task = asyncio.ensure_future(ATTACKS[name](target))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    print("begun", flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    print(done, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="One kind of abuse.")
    parser.add_argument("name", choices=sorted(ATTACKS))
    parser.add_argument("--place", type=Path, required=True, help="with the server's keys and the abuser's token")
    parser.add_argument("--wire", type=int, required=True)
    parser.add_argument("--https", type=int, required=True)
    given = parser.parse_args()
    os.nice(19)  # a real one has a machine of its own
    asyncio.run(attack(given.name, target_in(given.place, given.wire, given.https, "abuser")))


if __name__ == "__main__":
    main()
