"""A plain phone for tests: it speaks the session protocol by hand, with none of the edge agent's code."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from protocol.errors import SessionFault
from protocol.frames import Admitted, Digests, Done, Fault, Frame, Hidden, Load, Open, Tokens, WireSampling
from protocol.tensor import pack
from protocol.transport.base import ClientChannel, Connection
from split_model.attention import Span
from split_model.model import Model
from split_model.runner import Runner
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer

GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Heard:
    """What one session brought."""

    ids: tuple[int, ...]
    admitted: Admitted
    done: Done
    loads: int


@cache
def runner(folder: Path) -> Runner:
    """The reference: the whole model in this process."""
    return Runner(folder)


def expected(folder: Path, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> tuple[int, ...]:
    """The reference answer's ids."""
    return tuple(runner(folder).tokens(prompt, max_tokens=max_tokens, sampling=sampling))


def logits(model: Model) -> torch.Tensor:
    """Of 34 positions, in memory of its own."""
    x = model.embed(torch.arange(6, 40))
    return model.logits(model.run(x, 0, model.stop, model.new_cache(1), model.tiles([Span(0, 0, 34)])))


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random ids of the vocabulary of `support.checkpoints`, none of them special."""
    draw = random.Random(seed)
    return tuple(draw.randrange(6, 512) for _ in range(length))


async def until(channel: ClientChannel, kind: type[Frame]) -> Frame:
    """The next frame of that kind, if the session does not end before."""
    while not isinstance(frame := await channel.receive(), kind):
        if isinstance(frame, Fault | Done):
            raise AssertionError(f"{frame} before a {kind.__name__}")
    return frame


class Phone:
    """Holds all layers of the model, and runs as many as a session asks for."""

    def __init__(self, folder: Path):
        self.model = Model.load(folder, check=False)
        self.digests = Digests(self.model.weights_digest, ChatTokenizer.load(folder).digest, self.model.numerics)

    def open_frame(self, prompt: Sequence[int], *, split: int = 0, sampling: Sampling = GREEDY, max_tokens: int = 8,
                   stop: tuple[str, ...] = (), request_id: bytes | None = None, attempt: int = 1,
                   delivered: Sequence[int] = (), token: str = "", ticket_age_s: float | None = None,
                   digests: Digests | None = None) -> Open:  # fmt: skip
        log = (*prompt, *delivered)
        return Open(
            request_id or os.urandom(16), attempt, self.model.config.name, digests or self.digests, split,
            WireSampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed), max_tokens, len(prompt),
            len(log), () if split else log, stop, ticket_age_s, token,
        )  # fmt: skip

    def hidden(self, tokens: Sequence[int], *, split: int, rows: int) -> list[Hidden]:
        """Hidden states of a whole prompt, so many positions in each frame."""
        with torch.inference_mode():
            tiles = self.model.tiles([Span(0, 0, len(tokens))])
            x = self.model.run(self.model.embed(torch.tensor(tokens)), 0, split, self.model.new_cache(1), tiles)
        return [frame for at in range(0, len(tokens), rows) for frame in pack(x[at : at + rows], at)]

    async def ask(self, connection: Connection, prompt: Sequence[int], **wanted: object) -> Heard:
        """One whole session. Raises SessionFault when the server refuses or ends it."""
        frame = self.open_frame(prompt, **wanted)  # type: ignore[arg-type]
        channel = await connection.open()
        try:
            await channel.send(frame)
            delivered = wanted.get("delivered", ())
            assert isinstance(delivered, tuple)
            return await self._converse(channel, frame, [*prompt, *delivered])
        finally:
            await channel.aclose()

    async def _converse(self, channel: ClientChannel, frame: Open, log: list[int]) -> Heard:
        cache = self.model.new_cache(1) if frame.split else None
        admitted: Admitted | None = None
        ids: list[int] = []
        loads = 0

        async def send_hidden(tokens: list[int], position: int) -> None:
            if cache is None:
                return
            tiles = self.model.tiles([Span(0, position, len(tokens))])
            with torch.inference_mode():
                x = self.model.run(self.model.embed(torch.tensor(tokens)), 0, frame.split, cache, tiles)
            for hidden in pack(x, position):
                await channel.send(hidden)

        await send_hidden(log, 0)
        while True:
            match await channel.receive():
                case Admitted() as admitted:
                    pass
                case Tokens(position, got):
                    assert position == len(log)
                    ids += got
                    log += got
                    if len(ids) + frame.log_length - frame.prompt_length < frame.max_tokens and got[-1] != 1:
                        await send_hidden(list(got), position)
                case Load():
                    loads += 1
                case Fault(code, message, retry):
                    raise SessionFault(code, message, retry)
                case Done() as done:
                    assert admitted is not None
                    return Heard(tuple(ids), admitted, done, loads)
