"""What comes to a row before it is computed: hidden states from its phone, and drafts from either side."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from split_model.drafting import Acceptance


class HiddenQueue:
    """Hidden states of consecutive positions, in the pieces in which they came."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[torch.Tensor, int]] = deque()  # what is left of each, and its bytes on the wire
        self.rows = 0
        self.freed = 0  # bytes of pieces that were used up or dropped, in all

    def push(self, x: torch.Tensor, size: int) -> None:
        """Appends `[n, width]` that took `size` bytes."""
        self._pieces.append((x, size))
        self.rows += len(x)

    def take(self, count: int) -> torch.Tensor:
        """Removes the first `count` positions: `[count, width]`."""
        taken, left = [], count
        while left:
            first, size = self._pieces.popleft()
            if len(first) > left:
                self._pieces.appendleft((first[left:], size))
                first, size = first[:left], 0
            taken.append(first)
            left -= len(first)
            self.freed += size
        self.rows -= count
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def refuse(self, size: int) -> None:
        """Gives back the bytes of what was not taken in."""
        self.freed += size

    def clear(self) -> None:
        self.freed += sum(size for _, size in self._pieces)
        self._pieces.clear()
        self.rows = 0


@dataclass(slots=True)
class Drafts:
    """Tokens proposed for the positions behind a row's last one, and how those before them fared."""

    limit: int = 0  # verified at a time; 0: this row has none
    local: bool = False  # made on this server, not by the phone
    pending: deque[int] = field(default_factory=deque)
    epoch: int = 0  # how often a token was another than the phone drafted
    alone: bool = False  # the phone proposes nothing for now
    drafted: int = 0  # tokens up to the first wrong one of each draft, in all, and those of them that were right
    accepted: int = 0
    held: int = 0  # positions that this server's tiny model has keys and values of
    acceptance: Acceptance | None = None  # of local ones

    @property
    def by_phone(self) -> bool:
        return self.limit > 0 and not self.local

    @property
    def waits(self) -> bool:
        """Without drafts the row stands still."""
        return self.by_phone and not self.alone

    def first(self, count: int) -> list[int]:
        return [self.pending[place] for place in range(count)]

    def settle(self, token: int) -> bool:
        """Whether the first draft was this token, which was drawn in its place; a wrong one voids those behind it."""
        if self.pending and self.pending[0] == token:
            self.pending.popleft()
            return True
        if self.pending:
            self.deviate()
        return False

    def deviate(self) -> None:
        """A token was another than drafted: what follows the draft is void."""
        self.pending.clear()
        if not self.local:
            self.epoch += 1
