"""The cloud's side of an answer in virtual time: a row among others, and what comes to it from the phone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloud_server.drafter import HOPE
from split_model.drafting import Acceptance, Wanting, best_together

if TYPE_CHECKING:
    from virtual_session import Answer

BUDGET, LONGEST = 128, 16  # positions of a step; tokens of a draft
TOKEN_BYTES = 14  # of a frame of one token


class Row:
    """The cloud's side: steps one after the other while there is work, or other sessions' work."""

    def __init__(self, answer: Answer):
        self._answer, self._site = answer, answer.cloud_site
        self._prompt = len(answer.trace.prompt)
        self.length, self.done, self.hidden = self._prompt, 0, 0
        self.pending: list[bool] = []
        self.epoch = self.drafted = self.accepted = 0
        self._there = self._stepping = self._alone = False
        self._inbox: list[Callable[[], None]] = []  # what came while a step runs
        self._limit = answer.way.draft or LONGEST if answer.way.draft is not None else 0
        self._acceptance = Acceptance(max(HOPE, answer.acceptance.mean))  # of drafts made here
        self._unread_s = self._site.tiny_s(self._prompt, answer.order) if self._drafts_here else 0.0

    @property
    def _drafts_here(self) -> bool:
        return self._answer.way.route == "cloud" and self._limit > 0

    def begin(self) -> None:
        if self._site.others:  # a step is under way when a request comes
            self._stepping = True
            self._answer.clock.at(self._answer.order.random() * self._step_s(0, 0), self._step)

    def opened(self) -> None:
        self._there = True
        self._take(lambda: None)

    def hidden_came(self, rows: int, epoch: int) -> None:
        self._take(lambda: self._hidden_came(rows, epoch))

    def proposed(self, position: int, right: list[bool], epoch: int) -> None:
        """A draft from a position of the answer on; none: go on alone."""
        self._take(lambda: self._proposed(position, right, epoch))

    def _take(self, change: Callable[[], None]) -> None:
        self._inbox.append(change)
        if not self._stepping:
            self._stepping = True
            self._step()

    def _hidden_came(self, rows: int, epoch: int) -> None:
        if epoch >= self.epoch:
            self._adopt(epoch)
            self.hidden += rows

    def _proposed(self, position: int, right: list[bool], epoch: int) -> None:
        if not right:
            self._alone = True
        elif epoch >= self.epoch:
            self._adopt(epoch)
            self._alone = False
            known = max(0, self.length - self._prompt - position)
            if all(right[:known]):
                self.pending += right[known:]
            else:
                self._deviate()

    def _adopt(self, epoch: int) -> None:
        if epoch > self.epoch:
            self._deviate()
            self.epoch = epoch

    def _deviate(self) -> None:
        self.pending, self.hidden, self.epoch = [], 0, self.epoch + 1

    def _at_hand(self) -> int:
        known, left = self.length - self.done, self._prompt + self._answer.most - self.length
        if not self._there or left <= 0:
            return 0
        drafted = min(len(self.pending), self._limit, left - 1)
        if self._answer.way.split:
            return min(self.hidden, known + drafted)
        waits = self._answer.way.route == "speculative" and not self._alone
        if known == 1 and not drafted and waits and self.length > self._prompt:
            return 0
        return known + drafted

    def _step(self) -> None:
        for change in self._inbox:
            change()
        self._inbox.clear()
        drafting_s = self._draft() if self._drafts_here else 0.0
        budget = BUDGET - self._site.others
        count = min(self._at_hand(), budget)
        if not count and not self._site.others:
            self._stepping = False
            return
        wanted = max(0, self.done + count - self.length + 1) if count else 0
        self.hidden -= count if self._answer.way.split else 0
        clock = self._answer.clock
        clock.at(clock.now + drafting_s + self._step_s(count, wanted), lambda: self._stepped(count, wanted))

    def _step_s(self, count: int, wanted: int) -> float:
        """Other sessions run all layers, this one those from its entry on."""
        site, split, order = self._site, self._answer.way.split, self._answer.order
        depth = site.speeds.depth
        if not count:
            return site.full_s(depth, 1, 1, order)
        first = site.full_s(split, 1, 0, order) if split and site.others else 0.0
        return first + site.full_s(depth - split, count, wanted, order)

    def _draft(self) -> float:
        """The cloud's own tiny model proposes; seconds that it takes."""
        answer, site, parts = self._answer, self._site, self._answer.parts
        if self.length == self._prompt or self.length - self.done != 1 or self.pending:
            return 0.0
        at, left = self.length - self._prompt, self._prompt + answer.most - self.length
        limit = min(self._limit, left - 1)
        if limit <= 0:
            return 0.0
        wanting, budget = Wanting(limit, self._acceptance, self._unread_s / left), BUDGET - site.others
        _, most = best_together([wanting], 1, budget, lambda _: parts.draft_s, parts.verify_s)
        count = min(limit, most)
        self.pending = path(answer.right, at, count)
        seconds = sum(site.tiny_s(1, answer.order) for _ in range(count))
        if count:
            seconds, self._unread_s = seconds + self._unread_s, 0.0
        return seconds

    def _stepped(self, count: int, wanted: int) -> None:
        self.done += count
        if wanted:
            self._emit(wanted)
        self._step()

    def _emit(self, drawn: int) -> None:
        answer, verified = self._answer, drawn - 1
        right = leading(self.pending[:drawn])
        deviates = right < min(drawn, len(self.pending))
        self.pending = self.pending[right:]
        if deviates:
            self._deviate()
        tokens = min(right + 1, drawn)
        self.length += tokens
        self.done = self.length - 1
        self.drafted, self.accepted = self.drafted + right + deviates, self.accepted + right
        if self._drafts_here and verified:
            self._acceptance.seen(verified, right)
        epoch, next_s = self.epoch, math.inf if answer.way.split or answer.feed else answer.parts.first_s
        answer.down.send(TOKEN_BYTES + 2 * (tokens - 1), lambda: answer.heard(tokens, epoch), next_s)


def path(right: tuple[bool, ...], at: int, count: int) -> list[bool]:
    """What is drafted from a place of the answer on: behind a wrong one nothing is right."""
    made: list[bool] = []
    for one in right[at : at + count]:
        made.append(one and all(made))
    return made


def leading(flags: list[bool]) -> int:
    """How many are true before one is not."""
    return flags.index(False) if False in flags else len(flags)
