"""The first request after idle: how long until the server's first word, by early data and by everything else.

To `Admitted`, which a server sends before its model runs; over HTTPS to the first byte of the answer to a GET. No
jitter, no loss. The bound beside early data: one round trip, both first flights at the link's rate, and 10 ms.

    python benchmarks/zero_rtt.py [--profile lte] [--rtt 50 150] [--rounds 20] [--plot FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from answers import https_client
from netlab import FULL, PROFILES, Lab, add_flags, at, carried, kept, lab, machine
from phones import Phones
from rich.console import Console
from rich.table import Table

from protocol.errors import LinkLost
from protocol.frames import Admitted, Open
from protocol.transport.base import Address, Connection, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import Kept, TicketStore

SLACK_S = 0.010
QUESTION = "I want to find a restaurant in San Jose. I would like some Mexican food."
EARLY = "QUIC, early data"
WAYS = (EARLY, "QUIC, full handshake", "HTTPS, cold", "gRPC, cold", "QUIC, warm", "gRPC, warm")


@dataclass(frozen=True, slots=True)
class First:
    """Seconds to the first word; of early data also bytes on the wire: the first flight, and what came until then."""

    profile: str
    rtt_ms: float
    way: str
    seconds: float
    up: int = 0
    down: int = 0

    @property
    def bound_s(self) -> float:
        """For one round trip."""
        link = PROFILES[self.profile]
        serialised = 8e-6 * (self.up / link.up_mbit + self.down / link.down_mbit)
        return self.rtt_ms / 1e3 + serialised + SLACK_S


class Store(TicketStore):
    """Tells when a ticket has come."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.added = asyncio.Event()

    def add(self, address: Address, trust: Trust, kept: Kept) -> None:
        super().add(address, trust, kept)
        self.added.set()


class Bench:
    """One server, and a client that comes to it by every way."""

    def __init__(self, lab: Lab):
        self._target = lab.target()
        phones = Phones(FULL, self._target.token)
        prompt = phones.prompt(QUESTION)
        self._opening: Callable[[], Open] = lambda: phones.opening(prompt, 1)
        self._store = Store(lab.folder / "tickets")
        self._trust = ssl.create_default_context(cadata=self._target.trust.ca.decode())
        self._warm: dict[str, Connection] = {}
        self._left = 0  # bytes up by the time that the first flight was out

    async def run(self, profile: str, rtt_ms: float, rounds: int, seed: int) -> list[First]:
        """All ways in some order, again and again; the first round brings a ticket, and is not counted."""
        found, order = [], random.Random(seed)
        self._store.drop(self._target.wire, self._target.trust)
        for name, connect in (("QUIC", connect_quic), ("gRPC", connect_grpc)):
            self._warm[name] = await connect(self._target.wire, self._target.trust)
            await self._warm[name].handshake()
        try:
            for number in range(rounds + 1):
                for way in order.sample(WAYS, len(WAYS)):
                    before = carried()
                    seconds, came = await self._first(way, ticket=number > 0)
                    flight = (self._left - before[0], came - before[1]) if way == EARLY else (0, 0)
                    if number:
                        found.append(First(profile, rtt_ms, way, seconds, *flight))
                    await asyncio.sleep(max(0.05, 2e-3 * rtt_ms))  # what follows an answer is not the next one's
        finally:
            for connection in self._warm.values():
                await connection.aclose()
        return found

    async def _first(self, way: str, *, ticket: bool) -> tuple[float, int]:
        target = self._target
        match way:
            case zero if zero == EARLY:
                self._store.added.clear()
                return await self._cold(lambda: connect_quic(target.wire, target.trust, self._store), early=ticket)
            case "QUIC, full handshake":
                return await self._cold(lambda: connect_quic(target.wire, target.trust))
            case "gRPC, cold":
                return await self._cold(lambda: connect_grpc(target.wire, target.trust))
            case "HTTPS, cold":
                return await self._https()
            case _:
                began = time.monotonic()
                await self._admitted(self._warm[way.partition(",")[0]])
                return time.monotonic() - began, carried()[1]

    async def _cold(self, connect: Callable[[], Awaitable[Connection]], early: bool | None = None
                    ) -> tuple[float, int]:  # fmt: skip
        """By a new connection; `early`: it brings a ticket, and was to be early data or not."""
        began = time.monotonic()
        connection = await connect()
        try:
            admitted = await self._admitted(connection)
            took = time.monotonic() - began, carried()[1]
            if early is not None:
                if admitted.early != early:
                    raise SystemExit(f"the request was read as early data: {admitted.early}, expected: {early}")
                async with asyncio.timeout(10):
                    await self._store.added.wait()
            return took
        finally:
            await connection.aclose()

    async def _admitted(self, connection: Connection) -> Admitted:
        channel = await connection.open()
        try:
            await channel.send(replace(self._opening(), ticket_age_s=connection.ticket_age_s))
            await self._flushed()
            frame = await channel.receive()
            if not isinstance(frame, Admitted):
                raise SystemExit(f"the server said {frame}")
            return frame
        except LinkLost as lost:
            raise SystemExit(f"the server was lost: {lost}") from None
        finally:
            await channel.aclose()

    async def _flushed(self) -> None:
        for _ in range(2):  # what is queued leaves at the end of the loop's turn
            await asyncio.sleep(0)
        self._left = carried()[0]

    async def _https(self) -> tuple[float, int]:
        async with https_client(self._target, self._trust) as client:
            began = time.monotonic()
            async with client.stream("GET", "/v1/models") as answer:
                took = time.monotonic() - began, carried()[1]
                if answer.status_code != 200:
                    raise SystemExit(f"HTTPS: status {answer.status_code}")
                await answer.aread()
        return took


async def measure(lab: Lab, profile: str, rtts: list[float], rounds: int, seed: int) -> list[First]:
    bench, found = Bench(lab), []
    for rtt in rtts:
        lab.link("set", profile, "--rtt", rtt, "--jitter", 0, "--loss", 0)
        found += await bench.run(profile, rtt, rounds, seed)
    return found


def table(found: list[First]) -> Table:
    made = Table(title="Time to the server's first word, ms")
    for column in ("link", "way", "median", "p90", "in RTTs", "bound", "within", "bytes up / down"):
        made.add_column(column, justify="left" if column in ("link", "way") else "right")
    for place in dict.fromkeys((one.profile, one.rtt_ms) for one in found):
        for way in WAYS:
            some = [one for one in found if (one.profile, one.rtt_ms, one.way) == (*place, way)]
            median = statistics.median(one.seconds for one in some)
            bound = statistics.median(one.bound_s for one in some)
            up, down = (statistics.median(getattr(one, name) for one in some) for name in ("up", "down"))
            verdict = f"{1e3 * bound:.1f}", "yes" if median <= bound else "no", f"{up:.0f} / {down:.0f}"
            made.add_row(f"{place[0]}, RTT {place[1]:g}", way, f"{1e3 * median:.1f}",
                         f"{1e3 * at([one.seconds for one in some], 0.9):.1f}", f"{1e3 * median / place[1]:.2f}",
                         *(verdict if way == EARLY else ()))  # fmt: skip
        made.add_section()
    return made


def plot(found: list[First], file: Path) -> None:
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((one.profile, one.rtt_ms) for one in found))
    figure = Figure(figsize=(8, 2 + 2 * len(places)), layout="constrained")
    for axis, place in zip(figure.subplots(len(places), 1, squeeze=False)[:, 0], places, strict=True):
        some = [one for one in found if (one.profile, one.rtt_ms) == place]
        columns = [[1e3 * one.seconds for one in some if one.way == way] for way in WAYS]
        axis.boxplot(columns, orientation="horizontal", tick_labels=WAYS, whis=(5, 95), showfliers=False)
        bound = 1e3 * statistics.median(one.bound_s for one in some if one.way == EARLY)
        axis.axvline(bound, linestyle=":", label=f"bound of early data, {bound:.0f} ms")
        axis.set(title=f"{place[0]}, RTT {place[1]:g} ms", xlim=(0, None))
        axis.invert_yaxis()
        axis.legend(loc="lower right")
    axis.set_xlabel("ms to the server's first word")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the server's first word, after idle.")
    parser.add_argument("--profile", choices=PROFILES, default="lte", help="whose rates are taken")
    parser.add_argument("--rtt", type=float, nargs="+", default=[50, 150], metavar="MS")
    parser.add_argument("--rounds", type=int, default=20)
    add_flags(parser)
    given = parser.parse_args()
    with lab(given.profile, logs=given.logs) as made:
        made.cloud().wait_up()
        new = asyncio.run(measure(made, given.profile, given.rtt, given.rounds, given.seed))
    found = [First(**one) for one in kept(given.keep, new)]
    Console(width=110).print(table(found))
    print(machine(made.words))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
