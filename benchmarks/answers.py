"""Streamed answers of OpenAI-style endpoints, with the time of every piece."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from phones import Target

PATIENCE_S = 90.0


@dataclass(frozen=True, slots=True)
class Said:
    """A streamed answer: pieces of text, one a token, when it was asked and each came (s), and the agent's report."""

    pieces: tuple[str, ...]
    tokens: int
    asked: float
    times: tuple[float, ...]
    plan: dict[str, Any]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Refused(Exception):
    """An answer that did not begin, or broke off: with an HTTP status, or None in its middle."""

    def __init__(self, status: int | None, message: str):
        super().__init__(message)
        self.status = status


async def ask(client: httpx.AsyncClient, body: dict[str, Any], times: list[float] | None = None,
              pieces: list[str] | None = None) -> Said:  # fmt: skip
    """A streamed answer of an OpenAI-style endpoint; its pieces and their times are noted as they come.

    Raises Refused.
    """
    times, pieces = [] if times is None else times, [] if pieces is None else pieces
    tokens, plan, asked = 0, {}, time.monotonic()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Refused(answer.status_code, (await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise Refused(None, chunk["error"]["message"])
            plan = chunk.get("plan", plan)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for new in filter(None, (one["delta"].get("content") for one in chunk["choices"])):
                times.append(time.monotonic())
                pieces.append(new)
    return Said(tuple(pieces), tokens, asked, tuple(times), plan)


def unix_client(socket: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket)), base_url="http://localhost", timeout=PATIENCE_S
    )


def https_client(target: Target, trust: ssl.SSLContext) -> httpx.AsyncClient:
    """For the cloud's own endpoint."""
    headers = {"authorization": f"Bearer {target.token}"}
    return httpx.AsyncClient(base_url=target.https, verify=trust, timeout=PATIENCE_S, headers=headers)
