"""Which keys of a long context a token reads: those of the pages that matter most to its query.

After Tang et al., "Quest: query-aware sparsity for efficient long-context LLM inference", 2024 (arXiv 2406.10774). A
page is a run of consecutive positions. The least and the greatest number of its keys in each channel bound what any of
them can score with a query; the pages with the highest bounds are read, and always the first ones, which draw
attention whatever they say, and the latest. What is read, and in which order, follows from a row's own position,
query and keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Budget:
    """Pages of `page` positions that a query reads: the `first`, the `best` by bounds, the `recent` with its own.

    `gain`: contexts of fewer than so many times what is read are read whole.
    """

    page: int = 32
    first: int = 1
    best: int = 27
    recent: int = 4
    gain: float = 2.0

    def __post_init__(self) -> None:
        if self.page not in (16, 32, 64, 128) or self.first < 0 or self.best < 1 or self.recent < 2 or self.gain < 1:
            raise ValueError(f"{self}: pages of 16, 32, 64 or 128, at least 1 best, 2 recent and a gain of 1")

    @property
    def read(self) -> int:
        """Keys that a query reads."""
        return (self.first + self.best + self.recent) * self.page

    @property
    def least(self) -> int:
        """The position from which on it chooses."""
        return round(self.read * self.gain)

    def pages(self, position: int) -> Pages:
        """For a query at `position`."""
        own = position // self.page + 1
        return Pages(self, own - self.recent, own)


@dataclass(frozen=True, slots=True)
class Pages:
    """What a query chooses from: pages `[budget.first, recent)`; it reads the first ones and `[recent, stop)` anyway.

    A span that chooses is no longer than a page, so that all it chooses from was written before its step.
    """

    budget: Budget
    recent: int
    stop: int

    @property
    def last(self) -> range:
        """Positions of the page that holds the query's own."""
        return range((self.stop - 1) * self.budget.page, self.stop * self.budget.page)

    def chosen(self, queries: Tensor, bounds: Tensor) -> Tensor:
        """Pages to read, int64 `[kv_heads, pages]`, for queries `[kv_heads, group, head_dim]`.

        `bounds` `[kv_heads, pages, 2 * head_dim]` of at least all pages that there are to choose from.
        """
        budget, heads = self.budget, len(queries)
        sides = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], 2)
        scores = torch.bmm(sides, bounds.transpose(1, 2)).float()
        scores[..., : budget.first] = float("-inf")
        scores[..., self.recent :] = float("-inf")
        best = scores.softmax(2).sum(1).topk(budget.best, sorted=False).indices
        always = torch.cat([torch.arange(budget.first), torch.arange(self.recent, self.stop)])
        always = always.expand(heads, -1)
        return torch.cat([always[:, : budget.first], best, always[:, budget.first :]], 1)


BUDGET = Budget()


def bounds_of(keys: Tensor, out: Tensor) -> None:
    """Bounds of whole pages, keys `[..., page, head_dim]`: the greatest and the least, `[..., 2 * head_dim]`."""
    width = keys.shape[-1]
    torch.amax(keys, -2, out=out[..., :width])
    torch.amin(keys, -2, out=out[..., width:])
