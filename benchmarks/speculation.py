"""When drafts on the phone pay: speed by round trip and acceptance, tokens a round, and sessions served.

    python benchmarks/speculation.py [--data FOLDER] [--part speed rounds sessions] [--pace 20 50 100] [--plot FILE]

Real sessions over netem (root), through the agent's own session code, to a server whose full model is paced to stand
for a larger one (benchmarks/paced.py), without a tiny model of its own. Drafts are recorded ones of the built-in pair,
made at 10 ms a token; other acceptances are made by putting wrong tokens, or the right ones, in their places. Every
text is checked. The pair knows no end, so that all answers have the same length.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import torch
from netlab import CLOUD, FULL, GENEROUS, HTTPS, TINY, WIRE, Lab, Program, add_flags, endless, kept, lab, machine
from recorded_phones import Phones, phones
from rich.console import Console
from speculation_lines import DRAFT_S, FIXED, Seen, plot, tables
from traces import Trace, altered, recorded

from split_model.drafting import Acceptance
from split_model.runner import Runner

PACED = Path(__file__).with_name("paced.py")
CLOUD_CORE = 1
SLOTS = 64
WIDE = ("--jitter", 0, "--loss", 0, "--down", 50, "--up", 50)
RTT_MS = (5, 10, 20, 35, 50, 75, 100, 150)
ACCEPTED = (0.5, 0.7, 0.9)  # and as the pair has it
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
SESSIONS = (1, 4, 8, 16, 24, 32, 48, 64)


class Bench:
    def __init__(self, made: Lab, given: argparse.Namespace):
        self._lab, self._given = made, given
        self._known: dict[tuple[float, float, str], Acceptance] = {}  # what a phone has learned, kept between answers
        self._tiny, self._full = (endless(model, made.folder) for model in (TINY, FULL))
        self.traces = recorded(Runner(self._tiny), Runner(self._full), given.data, given.prompts, given.tokens,
                               endless=True)  # fmt: skip

    async def run(self) -> list[Seen]:
        given, found = self._given, list[Seen]()
        if "speed" in given.part:
            for pace in given.pace:
                found += await self._with(pace, self._speed)
        if "rounds" in given.part:
            found += await self._with(given.pace[-1], self._rounds)
        if "sessions" in given.part:
            found += await self._with(given.sessions_pace, self._sessions)
        return found

    async def _with(self, pace: float, part: Callable[[float], AsyncIterator[Seen]]) -> list[Seen]:
        """One part, with a server of this pace."""
        began, program = time.monotonic(), self._server(pace)
        try:
            program.wait_up()
            found = [seen async for seen in part(pace)]
        finally:
            program.end()
        kept(self._given.keep, found)
        print(f"{found[0].part} at {pace:g} ms: {time.monotonic() - began:.0f} s", file=sys.stderr)
        return found

    def _server(self, pace: float) -> Program:
        keys = self._lab.folder / "keys"
        program = self._lab.start(
            "cloud", f"cloud-{pace:g}", PACED, "--pace", pace, "cloud", "serve", "--threads", 1, "--model", self._full,
            "--keys", keys, "--host", CLOUD, "--port", WIRE, "--http-port", HTTPS, "--slots", SLOTS,
            "--sessions-per-device", 0, *GENEROUS,
        )  # fmt: skip
        os.sched_setaffinity(program.process.pid, {CLOUD_CORE})
        return program

    async def _speed(self, pace: float) -> AsyncIterator[Seen]:
        order = random.Random(self._given.seed)
        chosen = {"pair": self.traces} | {
            str(share): [altered(trace, share, order) for trace in self.traces] for share in ACCEPTED
        }
        for rtt in self._given.rtt:
            self._known |= {(pace, rtt, name): warmed(traces) for name, traces in chosen.items()}
            async with self._at(rtt) as phones:
                for number in range(len(self.traces)):
                    for name, traces in chosen.items():
                        trace, ways = traces[number], [0, FIXED] + ([None] if name == "pair" else [])
                        for draft in order.sample(ways, len(ways)):
                            yield await self._one(phones, "speed", pace, rtt, name, trace, draft)

    async def _rounds(self, pace: float) -> AsyncIterator[Seen]:
        async with self._at(self._given.sessions_rtt) as phones:
            for trace in self.traces:
                for draft in LENGTHS:
                    yield await self._one(phones, "rounds", pace, self._given.sessions_rtt, "pair", trace, draft)

    async def _sessions(self, pace: float) -> AsyncIterator[Seen]:
        """So many at once, each again and again for a few seconds; the plain ones and the drafting ones in turn."""
        rtt = self._given.sessions_rtt
        async with self._at(rtt) as phones:
            for count in self._given.sessions:
                for draft in (None, 0):
                    some = [self.traces[number % len(self.traces)] for number in range(count)]
                    work = (self._one(phones, "sessions", pace, rtt, "pair", trace, draft, count) for trace in some)
                    for seen in await asyncio.gather(*work):
                        yield seen

    def _at(self, rtt: float) -> AbstractAsyncContextManager[Phones]:
        self._lab.link("set", "--rtt", rtt, *WIDE)
        return phones(self._lab.target(), self._tiny, self._full, self._lab.folder, DRAFT_S)

    async def _one(self, phones: Phones, part: str, pace: float, rtt: float, name: str, trace: Trace,
                   draft: int | None, count: int = 1) -> Seen:  # fmt: skip
        share = sum(trace.right) / len(trace.right)
        known = self._known.setdefault((pace, rtt, name), warmed(self.traces))
        done = await phones.answer(trace, draft, known, lambda _: known.mean)
        cloud = phones.cloud()
        looked, known = (
            (done.rounds, done.drafted, done.accepted),
            (cloud.rtt_s, cloud.rates.prefill, cloud.rates.decode),
        )
        return Seen(part, pace, rtt, name, draft, count, share, done.total_s, done.times[0], len(trace.ids), *looked,
                    cloud.rtt_s, cloud.rates.prefill, cloud.rates.decode)  # fmt: skip


def warmed(traces: Sequence[Trace]) -> Acceptance:
    """What earlier answers have taught a phone."""
    acceptance = Acceptance()
    for trace in traces:
        for drafted, accepted in trace.rounds(FIXED):
            acceptance.seen(drafted, accepted)
    return acceptance


def main() -> None:
    parser = argparse.ArgumentParser(description="When drafts on the phone pay.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of dialogues, whose dev split is asked")
    parser.add_argument("--part", nargs="+", choices=("speed", "rounds", "sessions"),
                        default=["speed", "rounds", "sessions"])  # fmt: skip
    parser.add_argument("--pace", nargs="+", type=float, default=[20, 50, 100], metavar="MS")
    parser.add_argument("--rtt", nargs="+", type=float, default=list(RTT_MS), metavar="MS")
    parser.add_argument("--sessions", nargs="+", type=int, default=list(SESSIONS))
    parser.add_argument("--sessions-pace", type=float, default=50, metavar="MS")
    parser.add_argument("--sessions-rtt", type=float, default=20, metavar="MS")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    add_flags(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with lab("wifi", *WIDE, logs=given.logs) as made:
        new = asyncio.run(Bench(made, given).run())
    found = [Seen(**one) for one in kept(given.keep, ())] if given.keep else new
    console = Console(width=150)
    for table in tables(found):
        console.print(table)
    print(f"full model paced, drafts recorded, {1e3 * DRAFT_S:g} ms each; {machine(made.words)}")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
