"""The agent leaves as the cloud server does: answers under way finish up to a deadline, and are told why if not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_agent.config import AgentConfig
from edge_agent.link import Link
from edge_agent.server import EdgeServer, serving
from protocol.errors import SessionFault
from protocol.frames import Admitted, Load, Open, Tokens
from protocol.transport.base import Address, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.edge import always, begin, checkpoints, job
from support.phone import Phone

pytestmark = pytest.mark.anyio
ASK: dict[str, Any] = {"model": "tandem", "prompt": "the table", "max_tokens": 4, "temperature": 0}
CLOUD = ASK | {"plan": {"route": "cloud"}}


class Holding:
    """A cloud that admits every session, says one token, and the rest when it is told to."""

    def __init__(self) -> None:
        self.admitted, self.go = 0, asyncio.Event()
        self._phone = Phone(checkpoints()[1])

    async def serve(self, channel: ServerChannel) -> None:
        opened = await channel.receive()
        assert isinstance(opened, Open)
        await channel.send(Admitted(self._phone.digests, exact=True, held=0, credit=1 << 20, early=False))
        await channel.send(Tokens(opened.log_length, (20,)))
        self.admitted += 1
        alive = Load(1, 0, 1, 0.0, 1e9, 1e9, 0.0, 1 << 20, False)
        while not self.go.is_set():
            await channel.send(alive)
            try:
                async with asyncio.timeout(0.1):
                    await self.go.wait()
            except TimeoutError:
                continue
        for index in range(1, opened.max_tokens):
            await channel.send(Tokens(opened.log_length + index, (20 + index,)))


@asynccontextmanager
async def agent(state: Path, cloud: Holding) -> AsyncIterator[tuple[EdgeServer, httpx.AsyncClient]]:
    tiny, full = checkpoints()
    connection = MemoryConnection(cloud.serve)
    link = Link(Address("memory", 1), always(connection))
    config = AgentConfig(tiny, full, port=0, state=state, edge_layers=0, threads=1)
    async with (
        serving(config, [link]) as server,
        httpx.AsyncClient(base_url=f"http://{server.address}", timeout=60) as http,
    ):
        yield server, http
    await connection.aclose()


async def admitted(cloud: Holding, count: int) -> None:
    while cloud.admitted < count:
        await asyncio.to_thread(lambda: None)


async def test_answers_under_way_finish_while_new_requests_are_refused(tmp_path: Path) -> None:
    cloud = Holding()
    async with agent(tmp_path, cloud) as (server, http):
        held = asyncio.create_task(http.post("/v1/completions", json=CLOUD))
        await admitted(cloud, 1)
        ending = asyncio.create_task(server.drain(60))
        refused = await http.post("/v1/completions", json=ASK)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert (await http.get("/ready")).json()["status"] == "draining"
        assert (await http.get("/health")).status_code == 200
        assert not ending.done()
        cloud.go.set()
        answer = await held
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert await ending == 0


@pytest.mark.parametrize("hurry", [True, False])
async def test_at_the_deadline_everyone_is_told_why(tmp_path: Path, hurry: bool) -> None:
    cloud = Holding()
    async with agent(tmp_path, cloud) as (server, http):
        whole = asyncio.create_task(http.post("/v1/completions", json=CLOUD))
        async with http.stream("POST", "/v1/completions", json=CLOUD | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            await admitted(cloud, 2)
            hurried = asyncio.Event()
            ending = asyncio.create_task(server.drain(3600 if hurry else 0, hurried))
            if hurry:
                hurried.set()
            said = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(said[-2])["error"]["code"] == "draining"
        assert said[-1] == "[DONE]"
        assert (await whole).status_code == 503
        assert (await whole).json()["error"]["message"] == "the agent is shutting down"
        assert await ending == 2
        kept = (await http.get("/v1/decisions")).json()["data"]
        assert [one["measured"]["finish"] for one in kept] == ["cancelled", "cancelled"]


async def test_neither_task_nor_thread_is_left(tmp_path: Path) -> None:
    cloud = Holding()
    tasks, threads = asyncio.all_tasks(), {thread.name for thread in threading.enumerate()}
    async with agent(tmp_path, cloud) as (_, http):
        held = asyncio.create_task(http.post("/v1/completions", json=CLOUD))
        local = asyncio.create_task(http.post("/v1/completions", json=ASK | {"model": "small-1", "max_tokens": 900}))
        await admitted(cloud, 1)
    await asyncio.gather(held, local, return_exceptions=True)
    assert asyncio.all_tasks() == tasks
    assert "compute" not in {thread.name for thread in threading.enumerate()} - threads


async def test_an_answer_that_nobody_reads_is_aborted_too(tmp_path: Path) -> None:
    """Between two pieces nothing waits; the reason comes with the next."""
    async with agent(tmp_path, Holding()) as (server, _):
        answer = await begin(server.agent, job(prompt=3, tiny=True))
        await anext(answer)
        assert await server.drain(0) == 1
        with pytest.raises(SessionFault, match="the agent is shutting down"):
            await anext(answer)
        await answer.aclose()
        assert not server.agent.under_way
