"""What `edge-agent ask` and `edge-agent plan` do: ask a running agent over HTTP, and show what it says."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

TIMEOUT = httpx.Timeout(10.0, read=120.0)


@dataclass(frozen=True, slots=True)
class AgentPlace:
    """Where an agent is asked, over a Unix socket if it has one, and the key that it wants."""

    url: str
    unix: Path | None = None
    key: str = ""

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.unix)) if self.unix else None
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, transport=transport, timeout=TIMEOUT)


def body(given: argparse.Namespace) -> dict[str, Any]:
    """The request of the command line; what is missing is left to the agent."""
    plan = {"route": given.route, "quality": given.quality, "privacy": given.privacy}
    names = ("split", "hidden_bits", "draft", "deadline_ms", "max_bytes")
    plan |= {name: value for name in names if (value := getattr(given, name)) is not None}
    found: dict[str, Any] = {
        "model": given.model,
        "messages": [{"role": "user", "content": given.question}],
        "max_tokens": given.max_tokens,
        "temperature": given.temperature,
        "plan": plan,
    }
    return found if given.seed is None else found | {"seed": given.seed}


def ask(agent: AgentPlace, request: dict[str, Any]) -> int:
    """Prints the answer as it comes, and its plan on stderr. Returns the exit code; raises OSError without an agent."""
    plan: dict[str, Any] = {}
    with _posted(agent, "/v1/chat/completions", request | {"stream": True}) as lines:
        for chunk in _events(lines):
            if "error" in chunk:
                print(f"\nedge-agent: {chunk['error']['message']}", file=sys.stderr)
                return 1
            for choice in chunk["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
            plan = chunk.get("plan", plan)
    print()
    print(f"[{_line(plan)}]", file=sys.stderr)
    return 0


def plan(agent: AgentPlace, request: dict[str, Any]) -> int:
    """Prints a table of every candidate's score."""
    with _posted(agent, "/v1/plan", request) as lines:
        found = json.loads("".join(lines))["plan"]
    table = Table(title=f"{_place(found)}: {found['reason']}")
    for name in ("route", "split", "draft", "model", "cost ms", "first token ms", "total ms", "up", "down", "refused"):
        table.add_column(name, justify="left" if name in ("route", "model", "refused") else "right")
    for one in sorted(found["candidates"], key=lambda one: one["cost"]):
        chosen = all(one[key] == found[key] for key in ("route", "split", "model"))
        chosen = chosen and bool(one["draft"]) == bool(found["draft"])
        table.add_row(
            one["route"], str(one["split"] or ""), str(one["draft"] or ""), one["model"], f"{one['cost'] * 1000:.1f}",
            f"{one['first_token_ms']:.1f}", f"{one['total_ms']:.1f}", _size(one["bytes_up"]), _size(one["bytes_down"]),
            one["refused"] or "", style="bold" if chosen else "dim" if one["refused"] else None,
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table)
    return 0


@contextmanager
def _posted(agent: AgentPlace, path: str, request: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The answer's lines. Raises OSError where no agent answers, ValueError with what it refused."""
    try:
        with agent.client() as client, client.stream("POST", path, json=request) as answer:
            if answer.status_code != 200:
                raise ValueError(_refusal(answer.read(), answer.status_code))
            yield answer.iter_lines()
    except httpx.InvalidURL as error:
        raise ValueError(f"--url {agent.url}: {error}") from None
    except httpx.HTTPError as error:
        raise OSError(f"no agent answers at {agent.unix or agent.url}: {error}") from None


def _refusal(answer: bytes, status: int) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the agent answered with status {status}"


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _line(plan: dict[str, Any]) -> str:
    """A finished answer's plan in one line."""
    if not plan:
        return "no plan was told"
    parts = [_place(plan), f"first token {plan['first_token_ms'] or 0:.0f} ms", f"total {plan['total_ms']:.0f} ms"]
    if plan["transport"]:
        early = ", early data" if plan["early_data"] else ""
        parts.append(f"{plan['transport']}{early}, {plan['bytes_up']} bytes up, {plan['bytes_down']} down")
    parts += ["degraded"] if plan["degraded"] else []
    return " · ".join([*parts, plan["reason"]])


def _place(plan: dict[str, Any]) -> str:
    split = f" at layer {plan['split']}" if plan["split"] else ""
    return f"{plan['route']}{split} by {plan['model']}"


def _size(count: float) -> str:
    return f"{count / 1000:.1f} kB" if count >= 1000 else f"{count:.0f} B"
