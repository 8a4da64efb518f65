"""Drafts made here: a tiny model beside the full one, for rows whose phones leave drafting to the cloud."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cloud_server.rows import Emitted, Row, Step
from split_model.attention import Span
from split_model.drafting import Acceptance, Wanting, best_together
from split_model.flops import head_flops, layer_flops
from split_model.model import Model
from split_model.sampling import sample

MEMORY = 0.95  # weight of the past in what was measured
OUTLIER = 3.0  # times what was expected: beyond, the machine did something else
HOPE = 0.5  # a new answer's drafts are expected to be right at least so often, so that each answer tries a few


class Line:
    """Seconds of a pass by its positions: a straight line through what was measured, 0 before anything was."""

    def __init__(self) -> None:
        self._weight = self._count = self._seconds = 0.0  # how much was seen, and its means
        self._spread = self._common = self._slope = 0.0  # squares of counts, and products with seconds, about the means

    def seen(self, count: int, seconds: float) -> None:
        if self._weight > 5:
            seconds = min(seconds, OUTLIER * self.at(count))
        self._weight = MEMORY * self._weight + 1
        off_count, off_seconds = count - self._count, seconds - self._seconds
        self._count += off_count / self._weight
        self._seconds += off_seconds / self._weight
        self._spread = MEMORY * self._spread + off_count * (count - self._count)
        self._common = MEMORY * self._common + off_count * (seconds - self._seconds)
        if self._spread > 1e-6:
            self._slope = max(0.0, self._common / self._spread)

    def at(self, count: float) -> float:
        return max(0.0, self._seconds + self._slope * (count - self._count))


@dataclass(frozen=True, slots=True)
class Work:
    """Positions of one row for the tiny model to compute, from `start` on."""

    row: Row
    start: int
    ids: Sequence[int]


class Drafter:
    """The tiny model and its KV memory, in the rows' own slots; used from the compute thread alone.

    `vocabulary` is the full model's: padding may differ. Nothing here can change an answer, only how fast it comes.
    """

    def __init__(self, model: Model, slots: int, context: int, vocabulary: int):
        self._model, self._vocabulary = model, min(vocabulary, model.config.vocabulary)
        self.cache = model.new_cache(slots, context)
        self.forget()
        self.rate = 0.0  # FLOP/s, one row alone

    def forget(self, times: bool = True) -> None:
        """How often drafts were right, and how long they took."""
        self._shared = (Acceptance(), Acceptance())  # of greedy and of sampled answers
        if times:  # of the tiny model's passes, and of the full one's where no prompt is computed
            self._passes, self._steps = Line(), Line()

    def propose(self, rows: Sequence[Row], budget: int) -> None:
        """Drafts for those of the rows that want it and are about to go on; `budget` positions may be verified."""
        wanted = self._wanted([row for row in rows if row.ready == 1 and row.length - row.done == 1], budget)
        todo = self._behind(list(wanted), budget)
        while todo:
            more = []
            for work, token in zip(todo, self._pass(todo), strict=True):
                row, pending = work.row, work.row.drafts.pending
                row.drafts.held = work.start + len(work.ids)
                if row.drafts.held < row.length:
                    continue
                pending.append(token)
                if len(pending) < wanted[row] and token not in self._model.config.stops:
                    more.append(Work(row, row.drafts.held, [token]))
            todo = more

    def learn(self, step: Step, seconds: float, emitted: Sequence[tuple[Row, Emitted]]) -> None:
        """Takes in what became of a step."""
        if all(part.wanted == part.count for part in step.parts):
            self._steps.seen(step.tokens, seconds)
        for row, item in emitted:
            if row.drafts.local and item.drafted:
                self._acceptance(row).seen(item.drafted, item.accepted)
                self._shared[row.sampling.temperature > 0].seen(item.drafted, item.accepted)

    def _wanted(self, rows: list[Row], budget: int) -> dict[Row, int]:
        """Drafts of one length for the likeliest rows: as many as bring all that want some the most tokens a second.

        A pass of the tiny model holds up every row, whoever it is for. Rows that are to get none are left out.
        """
        limits = {row: min(row.most_drafts, self.cache.context - row.length) for row in rows if row.drafts.local}
        likely = [row for row, limit in limits.items() if limit > 0]
        likely.sort(key=lambda row: self._acceptance(row).mean, reverse=True)
        wanting = [Wanting(limits[row], self._acceptance(row), self._read_s(row)) for row in likely]
        many, draft = best_together(wanting, len(rows), budget, self._passes.at, self._steps.at)
        return {row: min(draft, limits[row]) for row in likely[:many]}

    def _read_s(self, row: Row) -> float:
        """Seconds a token of the rest, for what the tiny model has yet to read before it can draft."""
        behind = row.length - row.drafts.held - 1
        return self._passes.at(behind) / (row.max_tokens - row.answer_tokens) if behind > 0 else 0.0

    def _acceptance(self, row: Row) -> Acceptance:
        if row.drafts.acceptance is None:
            row.drafts.acceptance = Acceptance(max(HOPE, self._shared[row.sampling.temperature > 0].mean))
        return row.drafts.acceptance

    def _behind(self, rows: list[Row], budget: int) -> list[Work]:
        """What the tiny model has yet to see of these rows, as far as the budget goes."""
        work = []
        for row in rows:
            ids = row.log[row.drafts.held : row.drafts.held + budget]
            if ids:
                work.append(Work(row, row.drafts.held, ids))
            budget -= len(ids)
        return work

    @torch.inference_mode()
    def _pass(self, todo: list[Work]) -> list[int]:
        """Computes it; returns the token drawn behind each row's last position."""
        began, model, ends, count = time.perf_counter(), self._model, [], 0
        for work in todo:
            count += len(work.ids)
            ends.append(count - 1)
        rows = [(work, work.row) for work in todo]
        spans = [Span(row.slot, at.start, len(at.ids), row.sparse) for at, row in rows if row.slot is not None]
        ids = torch.tensor([id for work in todo for id in work.ids]).clamp_(max=model.config.vocabulary - 1)
        x = model.run(model.embed(ids), 0, model.config.layers, self.cache, model.tiles(spans))
        logits = model.logits(x[ends])[:, : self._vocabulary]
        places = [work.start + len(work.ids) for work in todo]
        drawn = sample(logits, places, [work.row.sampling for work in todo])
        self._measure(todo, count, time.perf_counter() - began)
        return drawn

    def _measure(self, todo: list[Work], count: int, seconds: float) -> None:
        self._passes.seen(count, seconds)
        if count == len(todo):
            config, start = self._model.config, todo[0].start
            rate = (config.layers * layer_flops(config, start, 1) + head_flops(config)) / seconds
            self.rate = rate if not self.rate else MEMORY * self.rate + (1 - MEMORY) * rate
