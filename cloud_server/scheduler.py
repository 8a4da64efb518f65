"""Which rows run in the next step, and with how many positions each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

from cloud_server.rows import Emitted, Part, Row, Step
from split_model.cache import Cache

CHUNK = 8  # the least a prompt gets in a step, and what the ends of chunks are multiples of


class Scheduler:
    """Continuous batching: each row that can decode does, the rest of the budget goes to drafts and to prompts."""

    def __init__(self, cache: Cache, step_tokens: int, stops: frozenset[int]):
        self.rows: list[Row] = []  # hold a slot, in order of arrival
        self.waiting: deque[Row] = deque()
        self._cache, self.step_tokens, self._stops = cache, step_tokens, stops
        self._turn = 0

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def drop(self, row: Row) -> None:
        """Takes the row out and gives its slot back; does nothing the second time."""
        row.ended = True
        row.hidden.clear()
        row.drafts.pending.clear()
        if row.slot is not None:
            self._cache.free(row.slot)
            row.slot = None
            self.rows.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def hand_on(self, old: Row, new: Row) -> None:
        """Gives the old row's place to the new one: in the line, or its slot with what it holds of the same token log.

        What a slot holds is known by token ids; where either row sent hidden states instead, the slot is zeroed.
        """
        if old.slot is not None:
            self.rows[self.rows.index(old)] = new
            new.done = 0 if old.entry or new.entry else _common(old.log[: old.done], new.log[: new.length - 1])
            if not new.done:
                self._cache.free(old.slot)
                old.slot = self._cache.take()
            new.drafts.held = min(new.done, old.drafts.held)
            new.slot, new.started, old.slot = old.slot, time.monotonic(), None
        elif old in self.waiting:
            self.waiting[self.waiting.index(old)] = new
        else:
            self.add(new)
        old.ended = True

    def plan(self) -> Step | None:
        """The next step, or None when no row has anything to compute."""
        self._seat()
        prefills = [row for row in self.rows if row.ready > 1 and row.length - row.done > 1]
        parts = self._going_on(bool(prefills))
        budget = self.step_tokens - sum(part.count for part in parts)
        if prefills:  # those that a small budget leaves out come first next time
            first = self._turn % len(prefills)
            prefills = prefills[first:] + prefills[:first]
        for index, row in enumerate(prefills):
            share = max(CHUNK, budget // (len(prefills) - index))
            if budget < CHUNK and index:
                self._turn += index
                break
            part = self._part(row, self._chunk(row, share))
            parts.append(part)
            budget -= part.count
        if not parts:
            return None
        return Step(tuple(sorted(parts, key=lambda part: part.row.entry)))

    def apply(self, step: Step, tokens: Iterable[int]) -> list[tuple[Row, Emitted]]:
        """Books the step: `tokens` are the samples that its parts want, in order; rows that ended free their slots."""
        drawn, emitted = iter(tokens), []
        for part in step.parts:
            part.row.done += part.count
            if part.wanted:
                emitted.append((part.row, part.row.accept(list(islice(drawn, part.wanted)), self._stops)))
        for row, _ in emitted:
            if row.ended:
                self.drop(row)
        return emitted

    def _seat(self) -> None:
        while self.waiting and self._cache.free_slots:
            row = self.waiting.popleft()
            row.slot, row.started = self._cache.take(), time.monotonic()
            self.rows.append(row)

    def _going_on(self, prompts_wait: bool) -> list[Part]:
        """A position of every answer under way, and drafts within the budget, or half of it when prompts wait."""
        rows = [row for row in self.rows if row.ready == 1 or (row.ready and row.length - row.done == 1)]
        budget = max(0, self.step_tokens - len(rows)) // (2 if prompts_wait else 1)
        drafting = sum(row.ready > 1 for row in rows)
        parts = []
        for row in rows:
            more = min(row.ready - 1, -(-budget // max(1, drafting)))
            drafting -= row.ready > 1
            budget -= more
            parts.append(self._part(row, 1 + more))
        return parts

    def _chunk(self, row: Row, share: int) -> int:
        if row.ready <= share:
            return row.ready
        return share - (row.done + share) % CHUNK or share

    def _part(self, row: Row, count: int) -> Part:
        return Part(row, row.done, count, wanted=max(0, row.done + count - row.length + 1))


def _common(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
