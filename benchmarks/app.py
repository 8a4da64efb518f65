"""An app that asks one long answer after the other, and compares each with the undisturbed one, token for token."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass
from difflib import SequenceMatcher

import httpx
from answers import Refused, Said, ask
from netlab import QUESTIONS

SPLIT = 4
PLANS = {"cloud": ({"route": "cloud", "quality": "best"}, 500),
         "split": ({"route": "split", "split": SPLIT, "quality": "best"}, 150)}  # fmt: skip  # and tokens of an answer
VARIANTS, BEGUN = len(QUESTIONS), 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """One whole answer, beside the undisturbed one: tokens, and why it failed if it did."""

    route: str
    tokens: int
    lost: int
    repeated: int
    changed: int
    failed: str = ""


def verdict(route: str, want: tuple[str, ...], got: tuple[str, ...], failed: str = "") -> Verdict:
    """Piece by piece; of an answer that failed, the rest is lost."""
    parts = SequenceMatcher(None, want, got, autojunk=False).get_opcodes() if want != got else []
    size = {"delete": 0, "insert": 0, "replace": 0}
    for tag, here, until, there, to in parts:
        if tag != "equal":
            size[tag] += max(until - here, to - there)
    return Verdict(route, len(want), size["delete"], size["insert"], size["replace"], failed)


class App:
    """Asks one answer after the other."""

    def __init__(self, client: httpx.AsyncClient, route: str, order: random.Random):
        self.route, self._client, self._order = route, client, order
        self._plan, self.limit = PLANS[route]
        self._expected: list[tuple[str, ...]] = []
        self.verdicts: list[Verdict] = []
        self.times: list[float] = []  # of the answer under way
        self.refused = 0
        self.stopping = False

    async def prepare(self) -> None:
        """Learns the undisturbed answers."""
        said = await asyncio.gather(*(self._ask(number, []) for number in range(VARIANTS)))
        self._expected = [one.pieces for one in said]

    async def go_on(self) -> None:
        while not self.stopping:
            number, self.times = self._order.randrange(VARIANTS), []
            pieces: list[str] = []
            try:
                said = await self._ask(number, pieces)
            except (Refused, httpx.HTTPError) as error:
                if isinstance(error, Refused) and error.status:
                    self.refused += 1
                    print(f"{self.route}: {error.status} {error}", file=sys.stderr)
                    await asyncio.sleep(0.3)
                    continue
                self._judge(number, tuple(pieces), f"{type(error).__name__} {error}")
            else:
                self._judge(number, said.pieces, "" if said.tokens == self.limit else f"{said.tokens} tokens")

    @property
    def in_the_middle(self) -> bool:
        return BEGUN <= len(self.times) <= self.limit // 2

    async def _ask(self, number: int, pieces: list[str]) -> Said:
        body = {"model": "tandem", "messages": [{"role": "user", "content": QUESTIONS[number]}], "plan": self._plan,
                "max_tokens": self.limit, "temperature": 1.0, "seed": 100 + number}  # fmt: skip
        return await ask(self._client, body, self.times, pieces)

    def _judge(self, number: int, got: tuple[str, ...], failed: str) -> None:
        want = self._expected[number]
        self.verdicts.append(verdict(self.route, want, got, failed))
        if want != got:
            pairs = enumerate(zip(want, got, strict=False))
            same = next((place for place, (a, b) in pairs if a != b), min(len(want), len(got)))
            end = same + 8
            print(f"{time.monotonic():.2f} {self.route} {number}: another from token {same} on: {want[same:end]} "
                  f"became {got[same:end]}; {len(got)} tokens, expected {len(want)}; {failed}",
                  file=sys.stderr)  # fmt: skip
