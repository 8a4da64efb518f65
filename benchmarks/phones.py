"""Phones for the load scripts: whole-model sessions over fresh or kept connections, every token's time noted.

And what such scripts need of a server: device tokens, quotas that do not bind, and where it is.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from protocol.errors import SessionFault
from protocol.frames import Digests, Done, Fault, Open, Tokens, WireSampling
from protocol.transport.base import Address, Connection, Trust
from split_model.model import Model
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer

GENEROUS = ("--requests-per-minute", 6000, "--prompt-tokens-per-minute", 0, "--output-tokens-per-minute", 0)


@dataclass(frozen=True, slots=True)
class Target:
    """What a customer knows of a server: the addresses, the CA, and a device token of its own."""

    wire: Address
    https: str
    trust: Trust
    token: str

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.https, verify=ssl.create_default_context(cadata=self.trust.ca.decode()),
                                 timeout=30)  # fmt: skip


def target_in(folder: Path, wire: int, https: int, token: str) -> Target:
    trust = Trust((folder / "keys" / "ca.pem").read_bytes(), "localhost")
    return Target(Address("127.0.0.1", wire), f"https://localhost:{https}", trust, (folder / token).read_text().strip())


def issue(folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "cloud_server", "token", "--keys", folder / "keys", "--device", device]
    subprocess.run([*command, "--ttl", "7200", "--out", folder / device], check=True)


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
            await channel.send(replace(self.opening(prompt, answer), ticket_age_s=connection.ticket_age_s))
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
