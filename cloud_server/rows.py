"""A row: one session's place in the batch, with the stream that carries its tokens back to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from protocol.errors import WireError
from protocol.frames import Reason
from split_model.sampling import Sampling
from split_model.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one step made for one row: the token at `position`, and why the answer ended if it did."""

    position: int
    token: int
    finish: Reason | None


class RowStream:
    """A row's tokens on the event loop's side; never longer than the answer."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Emitted | WireError] = asyncio.Queue()
        self.computed = asyncio.Event()  # more positions were, with or without a token

    def put(self, item: Emitted | WireError) -> None:
        self._items.put_nowait(item)

    async def next(self) -> Emitted:
        """The next token. Raises the WireError that ended the row, if one did."""
        item = await self._items.get()
        if isinstance(item, WireError):
            raise item
        return item


@dataclass(eq=False, slots=True)
class Row:
    """The only mutable record of a session; after `Worker.submit` the compute thread alone writes it."""

    entry: int  # the first layer that runs here
    log: list[int]  # prompt and answer; for entry > 0 only the answer
    length: int  # positions known, the answer's included
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    text: TextStream | None  # watches for stop strings
    stream: RowStream = field(default_factory=RowStream)
    slot: int | None = None
    done: int = 0  # positions whose keys and values are in the slot
    hidden: deque[torch.Tensor] = field(default_factory=deque)  # of positions from `done` on, when entry > 0
    hidden_rows: int = 0
    paused: bool = False
    ended: bool = False
    first: int = field(init=False)  # position of the first token that is made here
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it got its slot
    compute_s: float = 0.0
    left: float = -math.inf  # when its latest token left, on the performance counter
    away_s: float = math.inf  # from there to the hidden states that came back for it

    def __post_init__(self) -> None:
        self.first = self.length

    @property
    def ready(self) -> int:
        """Positions that could be computed now."""
        if self.ended or self.paused:
            return 0
        return self.hidden_rows if self.entry else self.length - self.done

    @property
    def answer_tokens(self) -> int:
        return self.length - self.prompt_length

    @property
    def queue_s(self) -> float:
        return (self.started or time.monotonic()) - self.arrived

    def ids(self, start: int, count: int) -> list[int]:
        """Token ids of computed-next positions (entry 0 only)."""
        return self.log[start : start + count]

    def take_hidden(self, count: int) -> torch.Tensor:
        """Removes the next `count` hidden states: `[count, width]`."""
        taken, left = [], count
        while left:
            first = self.hidden.popleft()
            if len(first) > left:
                self.hidden.appendleft(first[left:])
                first = first[:left]
            taken.append(first)
            left -= len(first)
        self.hidden_rows -= count
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def accept(self, token: int, stops: frozenset[int], context: int) -> Emitted:
        """Appends the sampled token and says whether it ends the answer."""
        position = self.length
        self.log.append(token)
        self.length += 1
        finish: Reason | None = None
        if token in stops or self._meets_stop_string(token):
            finish = Reason.STOP
        elif self.answer_tokens >= self.max_tokens or self.length >= context:
            finish = Reason.LENGTH
        self.ended = finish is not None
        return Emitted(position, token, finish)

    def _meets_stop_string(self, token: int) -> bool:
        if self.text is None:
            return False
        self.text.push(token)
        return self.text.stopped


@dataclass(frozen=True, slots=True)
class Part:
    """A row's share of a step: positions `[start, start + count)`; `wanted` when its next token is to be drawn."""

    row: Row
    start: int
    count: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the batch; parts are sorted by entry."""

    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)
