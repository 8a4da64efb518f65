"""The phone's drafting in virtual time: ahead, within a window, as long as it pays (as edge_agent/runs does it)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from virtual_batch import LONGEST, leading, path

from split_model.drafting import best_draft, token_seconds

if TYPE_CHECKING:
    from virtual_session import Answer

AHEAD, PENDING = 4, 64  # drafts, and tokens, that may wait for their verification
DRAFT_BYTES = 12


class Drafts:
    """The phone's drafting: ahead, within a window, as long as it pays."""

    def __init__(self, answer: Answer):
        self._answer, self._site = answer, answer.phone_site
        self._path: list[bool] = []  # proposed and not confirmed: right or not
        self._chances: list[float] = []
        self.epoch, self._fed, self._read, self._busy, self._told = 0, 0, False, True, False
        self._parts = answer.parts

    def begin(self) -> None:
        answer, prompt = self._answer, len(self._answer.trace.prompt)

        def ready() -> None:
            self._fed = prompt
            self._go_on()

        if answer.way.split:
            answer.front(prompt, ready)
        else:
            ready()

    def heard(self, tokens: int, epoch: int) -> None:
        answer = self._answer
        right = leading(self._path[:tokens])
        deviates = right < min(tokens, len(self._path))
        if self._path:
            answer.acceptance.seen(right + deviates, right)
        if deviates or len(self._path) < tokens or epoch > self.epoch:
            if deviates or epoch > self.epoch:
                first = len(answer.trace.prompt) + answer.known - tokens + right
                self._fed = min(self._fed, first)
                self.epoch = max(self.epoch + deviates, epoch)
            self._path, self._chances = [], []
        else:
            del self._path[:tokens], self._chances[:tokens]
        if not self._busy:
            self._go_on()

    def _length(self) -> tuple[int, float]:
        """Tokens to propose at a time, and seconds that a token then takes."""
        answer, parts = self._answer, self._parts
        if answer.way.draft:
            return answer.way.draft, math.inf
        count = best_draft(answer.acceptance, parts.draft_s, parts.verify_s, parts.away_s, parts.alone_s, LONGEST,
                           ahead=True)  # fmt: skip
        if not count:
            return 0, parts.alone_s
        args = (answer.acceptance, count, parts.draft_s, parts.verify_s, parts.away_s)
        return count, token_seconds(*args, ahead=True)

    def _go_on(self) -> None:
        answer, parts = self._answer, self._parts
        self._busy = False
        count, token_s = self._length()
        left = answer.most - 1 - answer.known - len(self._path)
        window = math.ceil((parts.away_s + parts.verify_s(count + 1)) / max(parts.draft_s, 1e-6)) + count
        window = min(window, AHEAD * count, PENDING)
        worth = not self._path or self._worth(self._chances, token_s)
        if answer.known >= answer.most:
            return
        if count and left > 0 and (not self._path or (len(self._path) + count <= window and worth)):
            self._busy, self._told = True, False
            self._make(min(count, left), [], list(self._chances), token_s, self.epoch)
        elif not self._path:
            self._alone()

    def _alone(self) -> None:
        answer = self._answer
        if answer.way.split:
            self._feed()
        elif not self._told:
            self._told = True
            answer.up.send(DRAFT_BYTES, lambda: answer.row.proposed(0, [], 0))

    def _worth(self, chances: list[float], token_s: float) -> bool:
        return bool(self._answer.way.draft) or math.prod(chances) * token_s > self._parts.draft_s

    def _make(self, count: int, made: list[float], chances: list[float], token_s: float, epoch: int) -> None:
        """One token after the other, until it does not pay or is stale."""
        answer, at = self._answer, self._answer.known + len(self._path)
        reading_s = 0.0 if self._read else self._site.tiny_s(len(answer.trace.prompt), answer.order)
        self._read = True

        def drafted() -> None:
            if epoch != self.epoch:
                self._go_on()
                return
            entropy = answer.trace.entropies[min(at + len(made), answer.most - 1)]
            made.append(entropy)
            chances.append(self._answer.chance(entropy))
            if len(made) < count and self._worth(chances, token_s):
                self._make(count, made, chances, token_s, epoch)
            else:
                self._propose(at, made)

        answer.phone.do(reading_s + self._site.tiny_s(1, answer.order), drafted)

    def _propose(self, began: int, made: list[float]) -> None:
        answer, epoch = self._answer, self.epoch
        at = answer.known + len(self._path)
        missed = max(0, at - began)  # tokens that became known meanwhile
        new = path(answer.right, at, len(made) - missed)
        if not all(answer.right[began : began + missed]) or not new:
            self._go_on()
            return
        if leading(self._path) != len(self._path):
            new = [False] * len(new)
        self._path += new
        self._chances += [self._answer.chance(one) for one in made[missed:]]
        answer.up.send(DRAFT_BYTES + 2 * len(new), lambda: answer.row.proposed(at, new, epoch))
        if answer.way.split:
            self._feed()
        else:
            self._go_on()

    def _feed(self) -> None:
        """Hidden states of all that is known and proposed."""
        answer = self._answer
        until = len(answer.trace.prompt) + answer.known + len(self._path)
        fed = self._fed
        if until <= fed:
            return
        self._busy = True
        epoch = self.epoch

        def ready() -> None:
            if epoch == self.epoch:
                self._fed = max(self._fed, until)
            self._go_on()

        answer.front(until - fed, ready, lambda: self.epoch)
