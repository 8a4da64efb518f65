"""Honest phones beside hostile ones: token latency and the server's memory, quiet against under each kind of abuse.

The server, the honest phones and the abuser are three processes. What the honest phones get is compared with the
quiet run's token ids.

    python benchmarks/abuse.py [--seconds 10] [--only NAME …]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from phones import Phones, Visit
from rich.console import Console
from rich.table import Table

from protocol.errors import WireError
from protocol.transport.base import Address, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.quic_connection import MendedConnection, configuration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL, QUESTIONS, Place, cloud, make_keys, wait_ready

HONEST, ANSWER = 4, 48
GENEROUS = ("--requests-per-minute", 6000, "--prompt-tokens-per-minute", 0, "--output-tokens-per-minute", 0)


@dataclass(frozen=True, slots=True)
class Target:
    """What an abuser knows: the addresses, the CA, and, being a customer too, a device token of its own."""

    wire: Address
    https: str
    trust: Trust
    token: str

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.https, verify=ssl.create_default_context(cadata=self.trust.ca.decode()),
                                 timeout=30)  # fmt: skip


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
    """Runs one kind of abuse until it is told to stop, and prints how much of it there was."""
    task = asyncio.ensure_future(ATTACKS[name](target))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    print("begun", flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    print(done, flush=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the honest phones met: waits for tokens (s), sessions and failures, the server's memory (MB) at the end."""

    gaps: tuple[float, ...]
    sessions: int
    failed: int
    resident_mb: float
    did: int = 0

    def at(self, share: float) -> float:
        return statistics.quantiles(self.gaps, n=100)[round(share * 100) - 1] if len(self.gaps) > 1 else float("nan")


class Bench:
    """One server under test and its honest phones."""

    def __init__(self, place: Place, server: int, target: Target):
        self._place, self._server, self._target = place, psutil.Process(server), target
        self._phones = Phones(FULL, target.token)
        self._prompts = [self._phones.prompt(question) for question in QUESTIONS]
        self._answers: dict[int, tuple[int, ...]] = {}

    async def honest(self, number: int, until: float, visits: list[Visit], failures: list[str]) -> None:
        """One phone that keeps its connection, asks again and again, and reconnects when it is lost."""
        prompt = self._prompts[number % len(self._prompts)]
        link = None
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(10):
                    if link is None or link.closed:
                        link = await connect_quic(self._target.wire, self._target.trust)
                    visit = await self._phones.visit(link, prompt, ANSWER)
            except (WireError, TimeoutError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if self._answers.setdefault(number % len(self._prompts), visit.ids) != visit.ids:
                raise SystemExit("an honest phone got another text than in the quiet run")
            visits.append(visit)
        if link is not None:
            await link.aclose()

    async def measure(self, seconds: float, name: str | None) -> Seen:
        """All honest phones for `seconds`, with or without one kind of abuse beside them."""
        abuser = await self._abuser(name) if name else None
        visits: list[Visit] = []
        failures: list[str] = []
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.honest(number, until, visits, failures) for number in range(HONEST)))
        memory = self._server.memory_info().rss / 1e6
        did = 0
        if abuser is not None:
            abuser.terminate()
            out, _ = await abuser.communicate()
            did = int(out)
        for text in sorted(set(failures)):
            print(f"  {name}: {failures.count(text)} x {text}", file=sys.stderr)
        return Seen(tuple(gap for visit in visits for gap in visit.gaps), len(visits), len(failures), memory, did)

    async def _abuser(self, name: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--attack", name, "--place", str(self._place.folder), "--wire",
            str(self._place.wire), "--https", str(self._place.https), stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await process.stdout.readline()
        await asyncio.sleep(1)
        return process


def target_in(folder: Path, wire: int, https: int, token: str) -> Target:
    trust = Trust((folder / "keys" / "ca.pem").read_bytes(), "localhost")
    return Target(Address("127.0.0.1", wire), f"https://localhost:{https}", trust, (folder / token).read_text().strip())


def issue(folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "cloud_server", "token", "--keys", folder / "keys", "--device", device]
    subprocess.run([*command, "--ttl", "7200", "--out", folder / device], check=True)


async def run(names: list[str], seconds: float) -> list[tuple[str, Seen]]:
    with tempfile.TemporaryDirectory(prefix="tandem-abuse-") as name:
        place = Place.in_folder(Path(name))
        make_keys(place)
        for device in ("honest", "abuser"):
            issue(place.folder, device)
        with cloud(place, *GENEROUS) as server:
            wait_ready(server, place.https_url, place.ca, place.log("cloud_server"))
            bench = Bench(place, server.pid, target_in(place.folder, place.wire, place.https, "honest"))
            await bench.measure(3, None)
            seen = [("quiet", await bench.measure(seconds, None))]
            for attack_name in names:
                seen.append((attack_name, await bench.measure(seconds, attack_name)))
                print(f"{attack_name}: {seen[-1][1].sessions} honest answers", file=sys.stderr)
                await asyncio.sleep(2)
            seen.append(("quiet again", await bench.measure(seconds, None)))
            if server.poll() is not None:
                raise SystemExit("the server has ended")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="Honest phones beside hostile ones.")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--attack", choices=sorted(ATTACKS), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wire", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--https", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        asyncio.run(attack(given.attack, target_in(given.place, given.wire, given.https, "abuser")))
        return
    seen = asyncio.run(run(given.only, given.seconds))
    quiet = seen[0][1]
    table = Table(title=f"{HONEST} honest phones, {ANSWER} tokens an answer, beside each kind of abuse")
    for column in ("beside", "abuse done", "answers", "failed", "p50 ms", "p99 ms", "p99 against quiet", "server MB"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for name, one in seen:
        p50, p99 = (f"{1e3 * one.at(share):.1f}" for share in (0.5, 0.99))
        table.add_row(name, str(one.did or ""), str(one.sessions), str(one.failed), p50, p99,
                      f"{one.at(0.99) / quiet.at(0.99):.1f}", f"{one.resident_mb:.0f}")  # fmt: skip
    Console(width=120).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores for all three processes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
