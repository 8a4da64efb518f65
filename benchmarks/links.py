"""Every route on every link, beside what a plain cloud endpoint gives on the same link in the same run.

The rivals are the cloud server's own /v1/chat/completions, streamed over HTTPS, and the same sessions over gRPC; cold
is a new connection for every answer, and "QUIC, ticket" one that carries the request as early data. Bytes are those of
the phone's interface, headers and handshakes included. Every text must be that of one process, or the script fails.
The models are the built-in pair, but know no end, so that all answers have the same length; the phone holds half of the
full one.

    python benchmarks/links.py [--profile wifi lte …] [--rounds 3] [--tokens 32] [--split 4] [--plot FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from answers import ask, https_client, unix_client
from netlab import FULL, PROFILES, QUESTIONS, TINY, Lab, add_flags, at, carried, endless, kept, lab, machine, ms
from phones import Phones
from rich.console import Console
from rich.table import Table

from protocol.transport.base import Connection
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import TicketStore
from split_model.runner import Runner

HELD = 6  # layers of the full model on the phone
Times = tuple[str, float, tuple[float, ...], str, str]  # text, when it was asked, when tokens came, model, route


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: seconds to the first token, between tokens and in all, bytes on the wire, and where it ran."""

    profile: str
    way: str
    first_s: float
    gaps: tuple[float, ...]
    total_s: float
    up: int
    down: int
    route: str


class Bench:
    """One server, one agent at a time, and a client that comes without an agent."""

    def __init__(self, lab: Lab, pair: tuple[Path, Path], given: argparse.Namespace):
        self._lab, self._given, self._target = lab, given, lab.target()
        self._tiny, self._full = pair
        self._phones = Phones(str(pair[1]), self._target.token)
        self._trust = ssl.create_default_context(cadata=self._target.trust.ca.decode())
        self._https: httpx.AsyncClient  # of the agent's time
        self._store = TicketStore(lab.folder / "tickets")
        self._texts = {model.name: texts(model, given.tokens) for model in pair}

    async def run(self, profile: str) -> list[Seen]:
        """All ways in some order, again and again; the first round is not counted."""
        given, found, order = self._given, [], random.Random(self._given.seed)
        pause_s = 1.2 * PROFILES[profile].rtt_ms / 1e3
        async with AsyncExitStack() as stack:
            ways = await self._ways(stack, profile)
            for number in range(given.rounds + 1):
                for way in order.sample(list(ways), len(ways)):
                    seen = await self._one(profile, way, ways[way], number % len(QUESTIONS), pause_s)
                    found += [seen] if number else []
        return sorted(found, key=lambda one: list(ways).index(one.way))

    async def _one(self, profile: str, way: str, answer: Callable[[int], Awaitable[Times]], number: int,
                   pause_s: float) -> Seen:  # fmt: skip
        if way == "HTTPS, warm":  # the server closes what was idle for longer than a round of slow answers takes
            (await self._https.get("/v1/models")).raise_for_status()
            await asyncio.sleep(pause_s)
        before = carried()
        text, asked, times, model, route = await answer(number)
        await asyncio.sleep(pause_s)  # what follows an answer belongs to it
        up, down = (late - early for early, late in zip(before, carried(), strict=True))
        if text != self._texts[model][number]:
            raise SystemExit(f"{profile}, {way}: {text!r}, in one process {self._texts[model][number]!r}")
        gaps = tuple(later - earlier for earlier, later in pairwise(times))
        return Seen(profile, way, times[0] - asked, gaps, times[-1] - asked, up, down, route)

    async def _ways(self, stack: AsyncExitStack, profile: str) -> dict[str, Callable[[int], Awaitable[Times]]]:
        given, target = self._given, self._target
        models = ("--tiny", self._tiny, "--full", self._full, "--edge-layers", HELD)
        program, socket = self._lab.agent(f"agent-{profile}", *models)
        stack.callback(program.end)
        program.wait_up()
        agent = await stack.enter_async_context(unix_client(socket))
        self._https = await stack.enter_async_context(https_client(target, self._trust))
        grpc = await connect_grpc(target.wire, target.trust)
        stack.push_async_callback(grpc.aclose)
        plans: dict[str, dict[str, object]] = {
            "local": {"route": "local", "quality": "fast"},
            "cloud": {"route": "cloud", "quality": "best"},
            f"split {given.split}": {"route": "split", "split": given.split, "quality": "best"},
            "auto": {},
            "auto, best": {"quality": "best"},
        }

        def quic() -> Awaitable[Connection]:
            return connect_quic(target.wire, target.trust, self._store)

        async def cold(number: int) -> Times:
            async with https_client(target, self._trust) as client:
                return await self._asked(client, {"model": FULL}, number)

        return {
            **{name: lambda number, plan=plan: self._asked(agent, {"model": "tandem", "plan": plan}, number)
               for name, plan in plans.items()},
            "QUIC, ticket": lambda number: self._new(quic, number),
            "gRPC, cold": lambda number: self._new(lambda: connect_grpc(target.wire, target.trust), number),
            "gRPC, warm": lambda number: self._visited(grpc, number, time.monotonic()),
            "HTTPS, cold": cold,
            "HTTPS, warm": lambda number: self._asked(self._https, {"model": FULL}, number),
        }  # fmt: skip

    async def _asked(self, client: httpx.AsyncClient, more: dict[str, Any], number: int) -> Times:
        body = {"messages": [{"role": "user", "content": QUESTIONS[number]}], "temperature": 0}
        said = await ask(client, body | {"max_tokens": self._given.tokens} | more)
        route = f"{said.plan.get('route', '')} {said.plan.get('split') or ''}".strip()
        return said.text, said.asked, said.times, said.plan.get("model", FULL), route

    async def _new(self, connect: Callable[[], Awaitable[Connection]], number: int) -> Times:
        began = time.monotonic()
        connection = await connect()
        try:
            return await self._visited(connection, number, began)
        finally:
            await connection.aclose()

    async def _visited(self, connection: Connection, number: int, began: float) -> Times:
        visit = await self._phones.visit(connection, self._phones.prompt(QUESTIONS[number]), self._given.tokens)
        return self._phones.tokenizer.decode(visit.ids), began, visit.times, FULL, ""


def texts(model: Path, tokens: int) -> list[str]:
    """The answers of one process."""
    runner = Runner(model)
    return [runner.generate([{"role": "user", "content": one}], max_tokens=tokens).text for one in QUESTIONS]


async def measure(lab: Lab, pair: tuple[Path, Path], given: argparse.Namespace) -> list[Seen]:
    bench, found = Bench(lab, pair, given), []
    for profile in given.profile:
        lab.link("set", profile)
        began = time.monotonic()
        found += await bench.run(profile)
        print(f"{profile}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def table(found: list[Seen]) -> Table:
    made = Table(title="Times in ms; medians but for the time from a token to the next")
    for column in ("link", "way", "answers", "first token", "a token p50", "p90", "p99", "total", "bytes up", "down"):
        made.add_column(column, justify="left" if column in ("link", "way") else "right")
    for profile in dict.fromkeys(one.profile for one in found):
        for way in dict.fromkeys(one.way for one in found):
            some = [one for one in found if (one.profile, one.way) == (profile, way)]
            if not some:
                continue
            gaps = [gap for one in some for gap in one.gaps]
            first, total, up, down = (statistics.median(getattr(one, name) for one in some)
                                      for name in ("first_s", "total_s", "up", "down"))  # fmt: skip
            ran = Counter(one.route for one in some).most_common(1)[0][0]
            shown = f"{way}: {ran}" if "auto" in way else way
            numbers = (first, *(at(gaps, share) for share in (0.5, 0.9, 0.99)), total)
            made.add_row(profile, shown, str(len(some)), *map(ms, numbers), f"{up:.0f}", f"{down:.0f}")
        made.add_section()
    return made


def plot(found: list[Seen], file: Path) -> None:
    from matplotlib.figure import Figure

    profiles, ways = (list(dict.fromkeys(getattr(one, name) for one in found)) for name in ("profile", "way"))
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, way in enumerate(ways):
        places = [index + (number - len(ways) / 2 + 0.5) / (len(ways) + 2) for index in range(len(profiles))]
        some = [[one for one in found if (one.profile, one.way) == (profile, way)] for profile in profiles]
        for axis, values in ((upper, lambda one: (one.first_s,)), (lower, lambda one: one.gaps)):
            pools = [[1e3 * value for one in part for value in values(one)] for part in some]
            middle = [at(pool, 0.5) for pool in pools]
            spread = [[at(pool, 0.9) - half for pool, half in zip(pools, middle, strict=True)]]
            axis.errorbar(places, middle, yerr=[[0] * len(middle), *spread], fmt="o", markersize=4, label=way)
    upper.set(yscale="log", ylabel="first token, ms: median, p90")
    lower.set(yscale="log", ylabel="token to token, ms: median, p90", xticks=range(len(profiles)), ylim=(1, None))
    lower.set_xticklabels(profiles)
    upper.legend(ncols=5, fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every route on every link, beside plain cloud endpoints.")
    parser.add_argument("--profile", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--split", type=int, default=4)
    add_flags(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with lab(given.profile[0], logs=given.logs) as made:
        tiny, full = (endless(model, made.folder) for model in (TINY, FULL))
        made.cloud(model=full).wait_up()
        new = asyncio.run(measure(made, (tiny, full), given))
    found = [Seen(**one) for one in kept(given.keep, new)]
    Console(width=120).print(table(found))
    print(f"{machine(made.words)}\nevery text is that of one process")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
