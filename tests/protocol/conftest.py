"""What the transports' tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import settings

from protocol.transport.base import Handler, ServerTls, Trust
from protocol.transport.quic import serve_quic
from protocol.transport.quic_server import QuicListener
from support.certificates import Authority
from support.wires import KINDS, Serve, Wire, echo

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="session")
def tls(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return authority.issue(tmp_path_factory.mktemp("tls"), "127.0.0.1", "localhost")


@pytest.fixture(scope="session")
def trust(authority: Authority) -> Trust:
    return authority.trust


@pytest.fixture
async def tidy() -> AsyncIterator[None]:
    """No task outlives its test, but for the moment that gRPC's own take to end with their calls."""
    before = asyncio.all_tasks()
    yield
    left = [task for task in asyncio.all_tasks() - before if "TestRunner" not in repr(task.get_coro())]
    if left:
        _, left = await asyncio.wait(left, timeout=10.0)  # type: ignore[assignment]
    assert not left


@pytest.fixture(params=KINDS)
async def wire(request: pytest.FixtureRequest, tls: ServerTls, trust: Trust, tidy: None) -> AsyncIterator[Wire]:
    wire = Wire(request.param, tls, trust)
    yield wire
    await wire.aclose()


@pytest.fixture
async def serve(tls: ServerTls, tidy: None) -> AsyncIterator[Serve]:
    """Starts QUIC listeners, which are closed at the end."""
    started: list[QuicListener] = []

    async def start(handler: Handler = echo, used: ServerTls = tls, **options: object) -> QuicListener:
        started.append(await serve_quic("127.0.0.1", 0, used, handler, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for listener in started:
        await listener.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tickets"
