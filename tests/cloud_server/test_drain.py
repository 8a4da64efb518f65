"""Leaving: sessions under way finish while new ones are refused, up to a deadline, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer, running
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Admitted, Fault, Load, Open
from protocol.http_server import Doorway, bound, serving_http
from protocol.transport.base import ClientChannel, Connection, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.phone import Heard, Phone, expected

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
LONG = {"model": "tiny-llama", "prompt": "the table", "max_tokens": 900, "temperature": 0}  # seconds of work
TRANSPORTS = [connect_quic, connect_grpc]


class Patient(Phone):
    """Sends hidden states, and so lets its session end, only when it is told to."""

    def __init__(self) -> None:
        super().__init__(checkpoint())
        self.go = asyncio.Event()

    async def _converse(self, channel: ClientChannel, frame: Open, log: list[int]) -> Heard:
        await self.go.wait()
        return await super()._converse(channel, frame, log)


@asynccontextmanager
async def serving(key_folder: Path) -> AsyncIterator[tuple[CloudServer, httpx.AsyncClient]]:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=key_folder, slots=4, threads=1)
    async with running(config) as server:
        verify = ssl.create_default_context(cafile=str(key_folder / "ca.pem"))
        headers = {"authorization": f"Bearer {keys.issue(key_folder, 'tester', 60)}"}
        async with httpx.AsyncClient(
            base_url=f"https://{server.http}", verify=verify, headers=headers, timeout=60
        ) as http:
            yield server, http


async def connected(connect: Any, server: CloudServer, key_folder: Path) -> Connection:
    connection: Connection = await connect(server.address, Trust((key_folder / "ca.pem").read_bytes()))
    await connection.handshake()
    return connection


async def taken(server: CloudServer, count: int) -> None:
    """Until so many sessions have a room."""
    while server.service.rooms.taken != count:
        await asyncio.to_thread(lambda: None)


async def next_of(channel: ClientChannel, kind: type[Any]) -> Any:
    while not isinstance(frame := await channel.receive(), kind):
        pass
    return frame


@pytest.mark.parametrize("connect", TRANSPORTS)
async def test_what_is_under_way_finishes_while_new_sessions_are_refused(connect: Any, key_folder: Path) -> None:
    phone, token = Patient(), keys.issue(key_folder, "phone", 60)
    async with serving(key_folder) as (server, http):
        connection = await connected(connect, server, key_folder)
        held = asyncio.create_task(phone.ask(connection, PROMPT, split=2, token=token))
        watched = await connection.open()
        await watched.send(phone.open_frame(PROMPT, split=2, token=token))
        await next_of(watched, Admitted)
        await taken(server, 2)
        ending = asyncio.create_task(server.drain(60))
        while not (await next_of(watched, Load)).draining:
            pass
        with pytest.raises(SessionFault) as refused:
            await Phone(checkpoint()).ask(connection, PROMPT, token=token)
        assert refused.value.code is FaultCode.DRAINING
        assert refused.value.retry_after_s >= 1
        answer = await http.post("/v1/completions", json=LONG)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
        assert int(answer.headers["retry-after"]) >= 1
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).json() == {"status": "draining"}
        assert not ending.done()
        phone.go.set()
        await watched.aclose()
        assert (await held).ids == expected(checkpoint(), PROMPT, Sampling(), 8)
        assert await ending == 0
        await connection.aclose()


@pytest.mark.parametrize("connect", TRANSPORTS)
async def test_a_deadline_of_zero_tells_everyone_why_and_counts_them(connect: Any, key_folder: Path) -> None:
    phone, token = Patient(), keys.issue(key_folder, "phone", 60)
    async with serving(key_folder) as (server, http):
        connection = await connected(connect, server, key_folder)
        channel = await connection.open()
        await channel.send(phone.open_frame(PROMPT, split=2, token=token))
        whole = asyncio.create_task(http.post("/v1/completions", json=LONG))
        async with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            await taken(server, 3)
            ending = asyncio.create_task(server.drain(0))
            said = [line.removeprefix("data: ") async for line in lines if line]
        assert json.loads(said[-2])["error"]["code"] == "draining"
        assert said[-1] == "[DONE]"
        assert (await whole).status_code == 503
        assert (await whole).json()["error"]["code"] == "draining"
        fault = await next_of(channel, Fault)
        assert fault.code is FaultCode.DRAINING
        assert fault.message == "the server is shutting down"
        assert await ending == 3
        text = (await http.get("/metrics")).text
        for route, count in (("http", 2), ("split", 1)):
            assert (
                f'tandem_sessions_total{{model_name="tiny-llama",outcome="draining",route="{route}"}} {count}' in text
            )
        assert server.service.worker.load.running == 0
        await connection.aclose()


async def test_hurrying_ends_a_long_deadline(key_folder: Path) -> None:
    async with serving(key_folder) as (server, http):
        whole = asyncio.create_task(http.post("/v1/completions", json=LONG))
        await taken(server, 1)
        hurried = asyncio.Event()
        ending = asyncio.create_task(server.drain(3600, hurried))
        await asyncio.sleep(0)
        hurried.set()
        async with asyncio.timeout(30):
            assert await ending == 1
        assert (await whole).status_code == 503


async def test_draining_by_http_needs_the_admin_scope(key_folder: Path) -> None:
    async with serving(key_folder) as (server, http):
        assert (await http.post("/admin/drain")).status_code == 403
        assert (await http.post("/admin/drain", headers={"authorization": ""})).status_code == 401
        assert not server.service.leaving.is_set()
        admin = keys.issue(key_folder, "ops", 60, ["admin"])
        answer = await http.post("/admin/drain", headers={"authorization": f"Bearer {admin}"})
        assert answer.status_code == 202
        assert answer.json() == {"status": "draining", "sessions": 0, "deadline_s": 20.0}
        assert server.service.leaving.is_set()
        assert (await http.get("/ready")).status_code == 503


async def test_neither_task_nor_thread_nor_port_is_left(key_folder: Path) -> None:
    """Whether or not it was drained, and with sessions under way."""
    tasks, threads = asyncio.all_tasks(), {thread.name for thread in threading.enumerate()}
    phone, token = Patient(), keys.issue(key_folder, "phone", 60)
    async with serving(key_folder) as (server, http):
        connection = await connected(connect_quic, server, key_folder)
        channel = await connection.open()
        await channel.send(phone.open_frame(PROMPT, split=2, token=token))
        async with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            await anext(stream.aiter_lines())
            await taken(server, 2)
    await connection.aclose()
    assert asyncio.all_tasks() == tasks
    assert "compute" not in {thread.name for thread in threading.enumerate()} - threads
    bound("127.0.0.1", server.address.port).close()
    bound("127.0.0.1", server.http.port).close()


async def test_until_the_model_is_loaded_there_is_health_and_nothing_else() -> None:
    listener = bound("127.0.0.1", 0)
    async with (
        serving_http(Doorway(), "127.0.0.1", listener, 1) as address,
        httpx.AsyncClient(base_url=f"http://{address}") as http,
    ):
        assert (await http.get("/health")).json() == {"status": "ok"}
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        answer = await http.post("/v1/completions", json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1
