"""Runs the agent behind its HTTP endpoint until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import uvicorn

from edge_agent import agent
from edge_agent.app import make_app
from edge_agent.config import AgentConfig
from edge_agent.link import Link
from protocol.transport.base import Address

log = logging.getLogger(__name__)


class QuietUvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the program decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
        listener = stack.enter_context(_bound(config.host, config.port))
        made = await stack.enter_async_context(agent.running(config, links))
        settings = uvicorn.Config(
            make_app(made), log_config=None, lifespan="off", timeout_keep_alive=30, timeout_graceful_shutdown=1
        )
        server = QuietUvicorn(settings)
        task = asyncio.create_task(server.serve(sockets=[listener]))

        async def stop() -> None:
            server.should_exit = True
            await task

        stack.push_async_callback(stop)
        while not server.started:
            if task.done():
                task.result()
                raise OSError("the HTTP server ended at once")
            await asyncio.sleep(0.01)
        yield EdgeServer(made, Address(config.host, listener.getsockname()[1]))


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
