"""Which rows run in the next step, and with how many positions each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

from cloud_server.rows import Emitted, Part, Row, Step
from split_model.cache import OutOfSlots
from split_model.prefix import Place, Prefixes, Seated, common

CHUNK = 8  # the least a prompt gets in a step, and what the ends of chunks are multiples of


class Scheduler:
    """Continuous batching: each row that can decode does, the rest of the budget goes to drafts and to prompts."""

    def __init__(self, prefixes: Prefixes, step_tokens: int, stops: frozenset[int]):
        self.rows: list[Row] = []  # hold a slot, in order of arrival
        self.waiting: deque[Row] = deque()
        self._prefixes, self.step_tokens, self._stops = prefixes, step_tokens, stops
        self._turn = 0

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def drop(self, row: Row, keep: bool = True) -> None:
        """Takes the row out; its slot is kept for the device's next session, or freed. Does nothing the second time."""
        row.ended = True
        row.hidden.clear()
        row.drafts.pending.clear()
        if row.slot is not None:
            self._leave(row, row.slot, keep)
            self.rows.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        self._prefixes.give_back(row.place)
        row.place = Place()

    def hand_on(self, old: Row, new: Row) -> None:
        """Gives the old row's place to the new one: in the line, or its slot with what it holds of the same token log.

        What a slot holds is known by token ids; where either row sent hidden states instead, nothing is handed on.
        """
        if old.slot is not None:
            self.rows[self.rows.index(old)] = new
            same = not old.entry and not new.entry and old.sparse == new.sparse
            held = common(old.log[: old.done], new.log[: new.length - 1]) if same else 0
            if held:
                self._occupy(new, Seated(old.slot, held, min(held, old.drafts.held)))
                old.slot = None
            else:
                self._leave(old, old.slot)
                self.rows.remove(new)
                self.waiting.appendleft(new)
                self._seat()
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
        while self.waiting and (self.waiting[0].place.has_slot or self._prefixes.free_slots):
            row = self.waiting.popleft()
            place = row.place if row.place.has_slot else self._prefixes.claim(self._known(row), row.key)
            row.place = Place()
            try:
                self._occupy(row, self._prefixes.seat(place))
            except OutOfSlots:  # a session on its way here has claimed the last kept one meanwhile
                self.waiting.appendleft(row)
                return
            self.rows.append(row)

    def _occupy(self, row: Row, seated: Seated) -> None:
        row.slot, row.done, row.drafts.held = seated
        row.reused, row.started = row.done, time.monotonic()

    def _leave(self, row: Row, slot: int, keep: bool = True) -> None:
        """What was computed of token ids is kept, and nothing that came as hidden states."""
        row.slot = None
        self._prefixes.keep(slot, row.log[: row.done] if keep else (), row.key, min(row.done, row.drafts.held))

    def _known(self, row: Row) -> list[int]:
        return [] if row.entry else row.log

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
