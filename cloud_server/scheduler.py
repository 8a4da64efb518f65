"""Which rows run in the next step, and with how many positions each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from cloud_server.rows import Emitted, Part, Row, Step
from split_model.cache import Cache

TILE = 8  # chunks end on attention tiles, so that no tile is computed twice


class Scheduler:
    """Continuous batching: each row that can decode does, the rest of the budget goes to prefill in equal shares."""

    def __init__(self, cache: Cache, step_tokens: int, stops: frozenset[int], context: int):
        self.rows: list[Row] = []  # hold a slot, in order of arrival
        self.waiting: deque[Row] = deque()
        self._cache, self._step_tokens, self._stops, self._context = cache, step_tokens, stops, context

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def drop(self, row: Row) -> None:
        """Takes the row out and gives its slot back; does nothing the second time."""
        row.ended = True
        row.hidden.clear()
        row.hidden_rows = 0
        if row.slot is not None:
            self._cache.free(row.slot)
            row.slot = None
            self.rows.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def hand_on(self, old: Row, new: Row) -> None:
        """Gives the old row's slot to the new one, with what it holds of the same token log; `old` is then out."""
        if old.slot is None or old.entry or new.entry:
            self.drop(old)
            return
        same = 0
        for a, b in zip(old.log[: old.done], new.log[: new.length - 1], strict=False):
            if a != b:
                break
            same += 1
        new.slot, new.done, new.started = old.slot, same, time.monotonic()
        self.rows[self.rows.index(old)] = new
        old.slot, old.ended = None, True

    def plan(self) -> Step | None:
        """The next step, or None when no row has anything to compute."""
        self._seat()
        parts = [self._part(row, 1) for row in self.rows if row.ready == 1]
        prefills = [row for row in self.rows if row.ready > 1]
        budget = self._step_tokens - len(parts)
        for index, row in enumerate(prefills):
            share = max(TILE, budget // (len(prefills) - index))
            part = self._part(row, self._chunk(row, share))
            parts.append(part)
            budget = max(0, budget - part.count)
        if not parts:
            return None
        return Step(tuple(sorted(parts, key=lambda part: part.row.entry)))

    def apply(self, step: Step, tokens: Iterable[int]) -> list[tuple[Row, Emitted]]:
        """Books the step: `tokens` are the wanted parts' samples, in order; rows that ended give their slots back."""
        drawn, emitted = iter(tokens), []
        for part in step.parts:
            part.row.done += part.count
            if part.wanted:
                emitted.append((part.row, part.row.accept(next(drawn), self._stops, self._context)))
        for row, _ in emitted:
            if row.ended:
                self.drop(row)
        return emitted

    def _seat(self) -> None:
        while self.waiting and self._cache.free_slots:
            row = self.waiting.popleft()
            row.slot, row.started = self._cache.take(), time.monotonic()
            self.rows.append(row)

    def _chunk(self, row: Row, share: int) -> int:
        if row.ready <= share:
            return row.ready
        return share - (row.done + share) % TILE or share

    def _part(self, row: Row, count: int) -> Part:
        return Part(row, row.done, count, wanted=row.done + count == row.length)
