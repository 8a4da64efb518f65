"""Runs one step: rows of any entry share one pass through the layers they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from cloud_server.rows import Part, Step
from split_model.attention import Span
from split_model.cache import Cache
from split_model.model import Model
from split_model.sampling import Sampling, sample


class Engine:
    """The full model and the KV memory of all sessions; used from the compute thread alone."""

    def __init__(self, model: Model, cache: Cache):
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, step: Step) -> list[int]:
        """Computes the step's positions; returns the tokens drawn behind the wanted ones, in order."""
        model, parts = self.model, step.parts
        groups = [(entry, list(group)) for entry, group in groupby(parts, key=lambda part: part.row.entry)]
        ends = [entry for entry, _ in groups[1:]] + [model.config.layers]
        rows = [(part, part.row) for part in parts]
        tiles = model.tiles(
            [Span(row.slot, part.start, part.count, row.sparse) for part, row in rows if row.slot is not None]
        )
        x: torch.Tensor | None = None
        for (entry, group), end in zip(groups, ends, strict=True):
            joining = self._joining(entry, group)
            x = joining if x is None else torch.cat([x, joining])
            if entry < end:
                x = model.run(x, entry, end, self.cache, tiles)
        assert x is not None, "a step has at least one part"
        return self._draw(x, parts)

    @torch.inference_mode()
    def fill(self, slot: int, ids: Sequence[int], step_tokens: int) -> None:
        """Computes the first positions of a slot, so many at a time."""
        model = self.model
        for start in range(0, len(ids), step_tokens):
            piece = torch.tensor(ids[start : start + step_tokens])
            tiles = model.tiles([Span(slot, start, len(piece))])
            model.run(model.embed(piece), 0, model.config.layers, self.cache, tiles)

    def _joining(self, entry: int, group: list[Part]) -> torch.Tensor:
        if entry:
            return torch.cat([part.row.hidden.take(part.count) for part in group])
        return self.model.embed(torch.tensor([i for part in group for i in part.row.ids(part.start, part.count)]))

    def _draw(self, x: torch.Tensor, parts: tuple[Part, ...]) -> list[int]:
        end, places, positions, samplings = 0, list[int](), list[int](), list[Sampling]()
        for part in parts:
            end, stop = end + part.count, part.start + part.count
            places += range(end - part.wanted, end)
            positions += range(stop - part.wanted + 1, stop + 1)
            samplings += [part.row.sampling] * part.wanted
        return sample(self.model.logits(x[places]), positions, samplings) if places else []
