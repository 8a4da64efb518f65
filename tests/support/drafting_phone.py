"""The phone's half of speculation by hand: a path of drafts that are not confirmed yet, and its epochs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch

from protocol.errors import SessionFault
from protocol.frames import Admitted, Done, Draft, Fault, Hidden, Load, Open, Tokens
from protocol.tensor import pack
from protocol.transport.base import Connection
from split_model.attention import Span
from split_model.sampling import Sampling
from support.phone import GREEDY, Phone

Guess = Callable[[int], int | None]  # of the token at a position; None where the phone proposes nothing


@dataclass
class Path:
    """What this phone knows and what it proposed beyond; `first` is where its session's answer begins."""

    log: list[int]
    guess: Guess
    limit: int  # tokens of one draft
    ahead: int = 0  # further drafts sent without waiting
    path: deque[int] = field(default_factory=deque)
    epoch: int = 0
    alone: bool = False  # the server was told to go on without drafts
    deviations: int = 0

    def drafts(self) -> list[Draft]:
        """What to send now."""
        made: list[Draft] = []
        while len(self.path) <= self.limit * self.ahead and not self.alone:
            start = len(self.log) + len(self.path)
            tokens = []
            while len(tokens) < self.limit and (token := self.guess(start + len(tokens))) is not None:
                tokens.append(token)
            if not tokens:
                break
            self.path += tokens
            made.append(Draft(start, tuple(tokens), self.epoch))
        return made

    def told(self, frame: Tokens) -> bool:
        """Takes the server's tokens in; True when one was another than drafted."""
        assert frame.position == len(self.log)
        before = self.deviations
        for token in frame.ids:
            assert self.deviations == before, "a token behind the first that was not drafted"
            self.log.append(token)
            if self.path and self.path.popleft() != token:
                self.path.clear()
                self.epoch += 1
                self.deviations += 1
        assert frame.epoch <= self.epoch  # less when this phone had not sent what it had drafted
        return self.deviations > before


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one session with drafts brought."""

    ids: tuple[int, ...]
    done: Done
    rounds: int  # Tokens frames
    deviations: int


def guessing(right: Sequence[int], first: int, share: float, seed: int = 0, vocabulary: int = 512) -> Guess:
    """Drafts of which this share is right; `right` are the ids from position `first` on."""
    rng = Random(seed)

    def guess(position: int) -> int | None:
        at = position - first
        if 0 <= at < len(right) and rng.random() < share:
            return right[at]
        return rng.randrange(6, vocabulary)

    return guess


async def speculate(
    phone: Phone, connection: Connection, prompt: Sequence[int], guess: Guess, *, split: int = 0, draft: int = 4,
    ahead: int = 0, sampling: Sampling = GREEDY, max_tokens: int = 16, stop: tuple[str, ...] = (),
    delivered: Sequence[int] = (), request_id: bytes | None = None, attempt: int = 1, token: str = "",
) -> Spoken:  # fmt: skip
    """One whole session. Raises SessionFault when the server refuses or ends it."""
    opened = drafting(
        phone.open_frame(prompt, split=split, sampling=sampling, max_tokens=max_tokens, stop=stop,
                         delivered=delivered, request_id=request_id, attempt=attempt, token=token),
        draft,
    )  # fmt: skip
    state = Path([*prompt, *delivered], guess, draft, ahead)
    cache = phone.model.new_cache(1) if split else None
    front, rounds = 0, 0  # positions whose hidden states were sent

    def hidden() -> list[Hidden]:
        tokens = [*state.log, *state.path][front:]
        if cache is None or not tokens:
            return []
        with torch.inference_mode():
            tiles = phone.model.tiles([Span(0, front, len(tokens))])
            x = phone.model.run(phone.model.embed(torch.tensor(tokens)), 0, split, cache, tiles)
        return [replace(frame, epoch=state.epoch) for frame in pack(x, front)]

    channel = await connection.open()
    try:
        await channel.send(opened)
        while True:
            over = len(state.log) >= len(prompt) + max_tokens or (rounds and state.log[-1] == 1)
            for made in () if over else state.drafts():
                await channel.send(made)
            for made in () if over else hidden():
                await channel.send(made)
                front = made.position + made.rows
            if not over and not split and not state.path and not state.alone:
                state.alone = True
                await channel.send(Draft(len(state.log), (), state.epoch))
            while isinstance(frame := await channel.receive(), Admitted | Load):
                pass
            if isinstance(frame, Fault):
                raise SessionFault(frame.code, frame.message, frame.retry_after_s)
            if isinstance(frame, Done):
                ids = tuple(state.log[len(prompt) + len(delivered) :])
                return Spoken(ids, frame, rounds, state.deviations)
            rounds += 1
            if state.told(frame):
                front = len(state.log) - 1
            state.alone = state.alone and guess(len(state.log)) is None
    finally:
        await channel.aclose()


def drafting(opened: Open, draft: int = 4, cloud_draft: int = 0) -> Open:
    """An Open that announces drafts."""
    return replace(opened, draft=draft, cloud_draft=cloud_draft)
