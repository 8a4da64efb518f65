"""Phones for the load scripts: whole-model sessions over fresh or kept connections, every token's time noted."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import SessionFault
from protocol.frames import Digests, Done, Fault, Open, Tokens, WireSampling
from protocol.transport.base import Connection
from split_model.model import Model
from split_model.runner import find_model
from split_model.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Visit:
    """One session: the answer's ids, and when it was asked and each of them came (seconds, monotonic)."""

    ids: tuple[int, ...]
    asked: float
    times: tuple[float, ...]

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next, the first one's wait left out."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Phones:
    """What every phone of one device shares: the model's name and digests, and the device's token."""

    def __init__(self, model: str, token: str):
        folder: Path = find_model(model)
        empty = Model.load(folder, 0, 0, embedding=False, head=False, check=False)
        self.tokenizer, self.token = ChatTokenizer.load(folder), token
        self.name = empty.config.name
        self.digests = Digests(empty.weights_digest, self.tokenizer.digest, empty.numerics)

    def prompt(self, question: str) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": question}])

    def opening(self, prompt: list[int], answer: int, *, split: int = 0) -> Open:
        """A greedy request for `answer` tokens."""
        return Open(os.urandom(16), 1, self.name, self.digests, split, WireSampling(), answer, len(prompt), len(prompt),
                    () if split else tuple(prompt), token=self.token)  # fmt: skip

    async def visit(
        self, connection: Connection, prompt: list[int], answer: int, leave_after: int | None = None
    ) -> Visit:
        """A session, left early after `leave_after` tokens. Raises SessionFault, LinkLost."""
        channel, asked = await connection.open(), time.monotonic()
        ids: list[int] = []
        times: list[float] = []
        try:
            await channel.send(self.opening(prompt, answer))
            while leave_after is None or len(ids) < leave_after:
                match await channel.receive():
                    case Tokens(_, got):
                        ids += got
                        times += [time.monotonic()] * len(got)
                    case Fault(code, message, retry):
                        raise SessionFault(code, message, retry)
                    case Done():
                        break
        finally:
            await channel.aclose()
        return Visit(tuple(ids), asked, tuple(times))
