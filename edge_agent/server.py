"""Runs the agent behind its HTTP endpoint until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from edge_agent import agent
from edge_agent.app import make_app
from edge_agent.config import AgentConfig
from edge_agent.link import Link
from protocol.http_server import bound, serving_http
from protocol.transport.base import Address


@dataclass(frozen=True, slots=True)
class EdgeServer:
    """A running agent and where it listens."""

    agent: agent.Agent
    address: Address

    async def drain(self, deadline_s: float) -> int:
        """Waits for the answers under way, up to the deadline, and says how many are left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self.agent.drain()
        return len(self.agent.under_way)


@asynccontextmanager
async def serving(config: AgentConfig, links: Sequence[Link] | None = None) -> AsyncIterator[EdgeServer]:
    """Port first, so that one in use is found before a model is loaded. Raises OSError, ModelError."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(bound(config.host, config.port))
        made = await stack.enter_async_context(agent.running(config, links))
        address = await stack.enter_async_context(serving_http(make_app(made), config.host, listener, 1))
        yield EdgeServer(made, address)
