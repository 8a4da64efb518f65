"""How late tokens are on a lossy link: concurrent streams of one phone, on one connection over QUIC and over gRPC.

Not a model but a clock gives the tokens, each stream at a steady pace of its own, over the project's own transports
in a process of its own, so that nothing but the network makes a token late. Latency: from the server's `send` to the
phone's `receive`. With --together all streams have the same beat, as rows of one batch have; one lost packet then
delays every stream, whatever the transport.

    python benchmarks/loss.py [--profile lte] [--rtt 50] [--loss 0 2 5 10] [--seconds 20] [--plot FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from netlab import CLOUD, PROFILES, WIRE, Lab, add_flags, at, kept, lab, machine
from rich.console import Console
from rich.table import Table

from protocol.errors import LinkLost
from protocol.frames import Digests, Done, Open, Reason, Tokens, WireSampling
from protocol.transport.base import Connection, ServerChannel, ServerTls
from protocol.transport.grpc import connect_grpc, serve_grpc
from protocol.transport.quic import connect_quic, serve_quic

WAYS = {"QUIC": connect_quic, "gRPC": connect_grpc}
WRAP = 1 << 31  # microseconds; a token's id is the time at which it was sent
DIGEST = bytes(16)
AIM_LOSS, AIM = 2, 0.5  # percent; of gRPC's p90


@dataclass(frozen=True, slots=True)
class Late:
    """What one run over one transport brought: of each token how long it was on its way, s."""

    loss: float
    way: str
    together: bool
    tokens: tuple[float, ...]


def micros() -> int:
    """The clock that both programs share."""
    return time.monotonic_ns() // 1000 % WRAP


async def beat(channel: ServerChannel, pace_s: float) -> None:
    """A session whose tokens come at a steady pace; what it asks for says how many, and when in a beat."""
    opened = await channel.receive()
    assert isinstance(opened, Open)
    loop = asyncio.get_running_loop()
    begin = (loop.time() // pace_s + 1) * pace_s + opened.sampling.temperature * pace_s
    for number in range(opened.max_tokens):
        await asyncio.sleep(begin + number * pace_s - loop.time())
        await channel.send(Tokens(number, (micros(),)))
    await channel.send(Done(Reason.LENGTH, opened.max_tokens, 0.0, 0.0))
    await channel.receive()  # until the phone has all


async def serve(keys: Path, pace_s: float) -> None:
    """Until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    tls = ServerTls(keys / "server.pem", keys / "server.key")
    grpc = await serve_grpc(CLOUD, WIRE, tls, lambda channel: beat(channel, pace_s))
    quic = await serve_quic(CLOUD, WIRE, tls, lambda channel: beat(channel, pace_s))
    print("up", flush=True)
    try:
        await ended.wait()
    finally:
        await asyncio.gather(grpc.aclose(), quic.aclose())


async def stream(connection: Connection, tokens: int, offset: float) -> list[float]:
    """Seconds that each token was on its way; `offset` says when in a beat they are due, 0 to 1."""
    channel = await connection.open()
    late: list[float] = []
    try:
        asked = Open(os.urandom(16), 1, "clock", Digests(DIGEST, DIGEST, DIGEST), 0, WireSampling(temperature=offset),
                     tokens, 1, 1, (0,))  # fmt: skip
        await channel.send(asked)
        while True:
            match await channel.receive():
                case Tokens(_, (sent,)):
                    late.append((micros() - sent) % WRAP / 1e6)
                case Done():
                    return late
                case other:
                    raise SystemExit(f"the server said {other}")
    except LinkLost as lost:
        raise SystemExit(f"{connection.transport}: lost after {len(late)} of {tokens} tokens: {lost}") from None
    finally:
        await channel.aclose()


async def run(lab: Lab, way: str, loss: float, given: argparse.Namespace) -> Late:
    target, tokens = lab.target(), round(given.seconds / given.pace)
    connection = await WAYS[way](target.wire, target.trust)
    try:
        await connection.handshake()
        phases = random.Random(given.seed)
        offsets = [0.0 if given.together else phases.random() for _ in range(given.streams)]
        late = await asyncio.gather(*(stream(connection, tokens, offset) for offset in offsets))
    finally:
        await connection.aclose()
    return Late(loss, way, given.together, tuple(one for some in late for one in some))


async def measure(lab: Lab, given: argparse.Namespace) -> list[Late]:
    found = []
    for loss in given.loss:
        lab.link("set", given.profile, "--rtt", given.rtt, "--jitter", 0, "--loss", loss)
        for way in WAYS:
            found.append(await run(lab, way, loss, given))
            print(f"{loss:g} %, {way}: {len(found[-1].tokens)} tokens", file=sys.stderr)
    return found


def pooled(found: list[Late]) -> dict[tuple[bool, float, str], list[float]]:
    pools: dict[tuple[bool, float, str], list[float]] = {}
    for one in found:
        pools.setdefault((one.together, one.loss, one.way), []).extend(one.tokens)
    return dict(sorted(pools.items(), key=lambda item: item[0][:2]))


def table(found: list[Late], given: argparse.Namespace) -> Table:
    link = f"RTT {given.rtt:g} ms, rates of {given.profile}"
    made = Table(title=f"Latency of a token, ms: {given.streams} streams, one every {1e3 * given.pace:g} ms; {link}")
    for column in ("loss %", "beat", "over", "tokens", "p50", "p90", "p99", "worst", "p90 against gRPC"):
        made.add_column(column, justify="left" if column in ("beat", "over") else "right")
    pools = pooled(found)
    for (together, loss, way), late in pools.items():
        other = pools.get((together, loss, "gRPC"))
        ratio = at(late, 0.9) / at(other, 0.9) if other and way == "QUIC" else None
        aim = f" (aim {AIM:g})" if loss == AIM_LOSS and not together else ""
        numbers = (*(at(late, share) for share in (0.5, 0.9, 0.99)), max(late))
        made.add_row(f"{loss:g}", "together" if together else "apart", way, str(len(late)),
                     *(f"{1e3 * one:.1f}" for one in numbers), "" if ratio is None else f"{ratio:.2f}{aim}",
                     end_section=way == "gRPC")  # fmt: skip
    return made


def plot(found: list[Late], file: Path) -> None:
    from matplotlib.figure import Figure

    pools = {key: late for key, late in pooled(found).items() if not key[0]} or pooled(found)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    losses = sorted({loss for _, loss, _ in pools})
    for way, style in zip(WAYS, ("-", "--"), strict=True):
        for number, loss in enumerate(losses):
            late = sorted(next(some for key, some in pools.items() if key[1:] == (loss, way)))
            shares = [1 - position / len(late) for position in range(len(late))]
            axis.plot([1e3 * one for one in late], shares, style, color=f"C{number}", label=f"{way}, {loss:g} %")
    axis.axhline(0.1, color="grey", linewidth=0.5)
    axis.set(xscale="log", yscale="log", xlabel="ms", ylabel="share of tokens that are later", ylim=(1e-3, 1))
    axis.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="How late tokens are on a lossy link.")
    parser.add_argument("--profile", choices=PROFILES, default="lte", help="whose rates are taken")
    parser.add_argument("--rtt", type=float, default=50, metavar="MS")
    parser.add_argument("--loss", type=float, nargs="+", default=[0, 2, 5, 10], metavar="PERCENT", help="each way")
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--pace", type=float, default=0.02, metavar="S", help="from a stream's token to its next")
    parser.add_argument("--together", action="store_true", help="all streams have the same beat")
    parser.add_argument("--serve", type=Path, metavar="KEYS", help=argparse.SUPPRESS)
    add_flags(parser)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.pace))
        return
    with lab(given.profile, logs=given.logs) as made:
        made.start("cloud", "clock", __file__, "--serve", made.folder / "keys", "--pace", given.pace).wait_up()
        new = asyncio.run(measure(made, given))
    found = [Late(**one) for one in kept(given.keep, new)]
    Console(width=120).print(table(found, given))
    print(machine(made.words))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
