"""What `edge-agent ask`, `plan` and `decisions` do: ask a running agent over HTTP, and show what it says."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

TIMEOUT = httpx.Timeout(10.0, read=120.0)
WIDTH = 110  # of tables, at least


class BrokenOff(Exception):
    """An answer that ended in an error; the message says which."""


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
    return settings(given) | {"messages": [{"role": "user", "content": given.question}]}


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """All of a request but its messages."""
    plan = {"route": given.route, "quality": given.quality, "privacy": given.privacy}
    names = ("split", "hidden_bits", "draft", "deadline_ms", "max_bytes", "sparse")
    plan |= {name: value for name in names if (value := getattr(given, name)) is not None}
    found: dict[str, Any] = {
        "model": given.model,
        "max_tokens": given.max_tokens,
        "temperature": given.temperature,
        "plan": plan,
    }
    return found if given.seed is None else found | {"seed": given.seed}


def ask(agent: AgentPlace, request: dict[str, Any]) -> int:
    """Prints the answer as it comes, and its plan on stderr. Returns the exit code; raises OSError without an agent."""
    turn = Turn()
    try:
        for chunk in streamed(agent, request):
            print(turn.take(chunk), end="", flush=True)
    except BrokenOff as error:
        print(f"\nedge-agent: {error}", file=sys.stderr)
        return 1
    print()
    print(f"[{turn.line} · {turn.plan.get('reason', '')}]", file=sys.stderr)
    return 0


def plan(agent: AgentPlace, request: dict[str, Any]) -> int:
    """Prints a table of every candidate's score."""
    with asked(agent, "POST", "/v1/plan", json=request) as lines:
        show_plan(json.loads("".join(lines))["plan"])
    return 0


def show_plan(found: dict[str, Any]) -> None:
    """A plan's candidates as a table."""
    table = Table(title=Text(f"{place(found)}: {found['reason']}"))
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
    show(table)


def decisions(agent: AgentPlace, limit: int, jsonl: bool) -> int:
    """Prints the latest decisions, the newest last; with `jsonl` as the agent exports them, the newest first."""
    with asked(agent, "GET", "/v1/decisions", params={"limit": limit, "format": "jsonl" if jsonl else "json"}) as lines:
        if jsonl:
            for line in lines:
                print(line)
            return 0
        found = json.loads("".join(lines))["data"]
    table = Table(title=f"{len(found)} decisions; in brackets what was predicted, ms", box=SIMPLE_HEAD)
    for name in ("when", "tokens", "route", "first token", "total", "error", "reason"):
        table.add_column(
            name, justify="left" if name in ("when", "route", "reason") else "right", no_wrap=name == "when"
        )
    for one in reversed(found):
        table.add_row(*_decision(one), style=None if one["measured"]["finish"] in ("stop", "length") else "dim")
    show(table)
    return 0


def _decision(one: dict[str, Any]) -> tuple[str | Text, ...]:
    plan, measured = one["plan"], one["measured"]
    when = datetime.fromtimestamp(one["at"]).strftime("%H:%M:%S")
    predicted, first, total = plan["predicted"], measured["first_token_ms"], measured["total_ms"]
    off = "" if first is None else f"{100 * (predicted['first_token_ms'] / first - 1):+.0f} %"
    complete = measured["finish"] in ("stop", "length")
    return (
        when, f"{one['prompt_tokens']} + {measured['tokens']}", Text(" → ".join(map(_short, measured["legs"]))),
        f"{'–' if first is None else f'{first:.0f}'} ({predicted['first_token_ms']:.0f})",
        f"{total:.0f} ({predicted['total_ms']:.0f})", off, Text(measured["reason" if complete else "finish"]),
    )  # fmt: skip


def _short(leg: dict[str, Any]) -> str:
    """A leg in few words: the full model goes without saying where the cloud has a part."""
    parts = [leg["route"], str(leg["split"] or ""), "+ drafts" if leg["draft"] else ""]
    return " ".join(filter(None, [*parts, leg["model"] if leg["route"] == "local" else ""]))


def show(table: Table) -> None:
    """On a terminal, or wherever the output goes."""
    Console(width=max(WIDTH, Console().width)).print(table)


def streamed(agent: AgentPlace, request: dict[str, Any]) -> Generator[dict[str, Any]]:
    """An answer's chunks as they come. Raises BrokenOff, and as `asked` does."""
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    with asked(agent, "POST", "/v1/chat/completions", json=request | streaming) as lines:
        for line in lines:
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise BrokenOff(chunk["error"]["message"])
                yield chunk


@dataclass(slots=True)
class Turn:
    """One answer as its chunks come: its text, its plan, its tokens."""

    text: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def take(self, chunk: dict[str, Any]) -> str:
        """The chunk's text, without what a terminal would take for commands."""
        new = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        self.text += new
        self.plan = chunk.get("plan", self.plan)
        self.tokens = (chunk.get("usage") or {}).get("completion_tokens", self.tokens)
        return "".join(one for one in new if one in "\n\t" or not (one < " " or "\x7f" <= one < "\xa0"))

    @property
    def line(self) -> str:
        """How it was made, in one line."""
        plan = self.plan
        if not plan:
            return "no plan was told"
        first, total = plan["first_token_ms"], plan["total_ms"]
        parts = [" → ".join(f"{place(leg)}" for leg in plan["legs"]) or place(plan)]
        parts += [f"drafts {plan['accepted']} of {plan['drafted']}"] if plan["drafted"] else []
        parts += [f"first token {first:.0f} ms"] if first is not None else []
        parts += (
            [f"{1000 * (self.tokens - 1) / (total - first):.0f} tokens/s"] if self.tokens > 1 and total > first else []
        )
        parts += [f"total {total:.0f} ms"]
        if plan["transport"]:
            early = ", early data" if plan["early_data"] else ""
            parts.append(f"{plan['transport']}{early}, {_size(plan['bytes_up'])} up, {_size(plan['bytes_down'])} down")
        parts += [f"{plan['moves']} moves"] if plan["moves"] else []
        return " · ".join(parts + (["degraded"] if plan["degraded"] else []))


@contextmanager
def asked(agent: AgentPlace, method: str, path: str, **request: Any) -> Iterator[Iterator[str]]:
    """The answer's lines. Raises OSError where no agent answers, ValueError with what it refused."""
    try:
        with agent.client() as client, client.stream(method, path, **request) as answer:
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


def place(plan: dict[str, Any]) -> str:
    """Where a plan runs, in words."""
    split = f" at layer {plan['split']}" if plan["split"] else ""
    drafts = " with drafts" if plan["draft"] and plan["route"] == "cloud" else ""
    return f"{plan['route']}{split}{drafts} by {plan['model']}"


def _size(count: float) -> str:
    return f"{count / 1000:.1f} kB" if count >= 1000 else f"{count:.0f} B"
