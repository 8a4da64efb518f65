"""Runs the agent behind its HTTP endpoint until it is told to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent import agent
from edge_agent.app import make_app
from edge_agent.config import AgentConfig
from edge_agent.dashboard import Dashboard
from edge_agent.link import Link
from edge_agent.local_rules import LocalRules
from edge_agent.state import State
from protocol.http_server import Doorway, bound, bound_unix, serving_http
from protocol.process import either
from protocol.transport.base import Address

LOOK_AGAIN_S = 0.02
NOTICE_S = 2.0  # for answers to hear that they are cancelled


@dataclass(frozen=True, slots=True)
class EdgeServer:
    """A running agent and where it listens."""

    agent: agent.Agent
    address: Address | Path  # a Unix socket's path

    async def drain(self, deadline_s: float, hurried: asyncio.Event | None = None) -> int:
        """Refuses new requests, and lets answers finish up to the deadline or until `hurried` is set.

        What is left then is told so and cancelled; returns how many those were.
        """
        self.agent.draining = True
        await self._quiet(deadline_s, hurried or asyncio.Event())
        left = len(self.agent.under_way)
        self.agent.abort()
        await self._quiet(NOTICE_S, asyncio.Event())
        return left

    async def _quiet(self, limit_s: float, hurried: asyncio.Event) -> None:
        """Until no answer is under way. Asked for again and again: one that is forgotten says nothing."""
        until = time.monotonic() + limit_s
        while self.agent.under_way and time.monotonic() < until and not hurried.is_set():
            await either(hurried, limit_s=LOOK_AGAIN_S)


@asynccontextmanager
async def serving(config: AgentConfig, links: Sequence[Link] | None = None) -> AsyncIterator[EdgeServer]:
    """Serves HTTP at once, `/ready` as soon as the models are loaded. Raises OSError, ModelError."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(bound_unix(config.unix) if config.unix else bound(config.host, config.port))
        State(config.state).probe()
        door = Doorway()
        address = await stack.enter_async_context(serving_http(door, config.host, listener, 1, limits=config.http))
        made = await stack.enter_async_context(agent.running(config, links))
        rules = LocalRules(config.host, None if config.unix else address.port, config.allow_hosts, config.api_key)
        board = Dashboard(made)
        door.app = make_app(made, rules, board)
        stack.callback(board.close)
        stack.callback(made.abort)
        yield EdgeServer(made, config.unix or address)
