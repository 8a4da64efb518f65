"""Both programs' HTTP endpoints behind one face, with raw connections to them."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import running
from edge_agent.config import AgentConfig
from edge_agent.runs.local import generate
from edge_agent.server import serving
from protocol.limits import HttpLimits
from protocol.transport.base import Address, Trust
from protocol.transport.grpc import connect_grpc
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.edge import checkpoints
from support.phone import Phone

LIMITS = HttpLimits(body_s=2.0, head_s=2.0, write_s=2.0, idle_s=5, connections=48)
SAMPLING = Sampling(temperature=0.8, seed=5)
PROMPT = (5, 6, 7, 8)
ANSWER = 24  # tokens


@dataclass(frozen=True, slots=True)
class Target:
    """A program's endpoint; `session` is an honest user's, by another way in, `held` what is kept for clients."""

    name: str
    address: Address
    model: str
    headers: dict[str, str]
    trust: ssl.SSLContext | None
    session: Callable[[], Awaitable[object]]
    held: Callable[[], Awaitable[object]]

    @property
    def url(self) -> str:
        return f"{'https' if self.trust else 'http'}://{self.address}"

    def client(self) -> httpx.AsyncClient:
        verify = self.trust or False
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, verify=verify, timeout=60)

    def asked(self, **change: object) -> dict[str, object]:
        """The body of a completion request."""
        return {"model": self.model, "prompt": "the table", "max_tokens": 4, "temperature": 0} | change

    def head(self, line: str, **headers: object) -> bytes:
        """A request's head; `content_length=5` is a header."""
        values = self.headers | {"host": str(self.address)} | {k.replace("_", "-"): v for k, v in headers.items()}
        return "\r\n".join([line, *(f"{name}: {value}" for name, value in values.items()), "", ""]).encode()

    def post(self, **change: object) -> bytes:
        """A whole raw completion request."""
        body = json.dumps(self.asked(**change)).encode()
        line = "POST /v1/completions HTTP/1.1"
        return self.head(line, content_type="application/json", content_length=len(body)) + body

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection, its TLS handshake done."""
        return await asyncio.open_connection(self.address.host, self.address.port, ssl=self.trust)

    async def raw(self, data: bytes) -> bytes:
        """All that comes back for bytes on a connection of their own, until the server closes it."""
        reader, writer = await self.connect()
        try:
            writer.write(data)
            return await reader.read()
        finally:
            writer.close()

    async def stalled(self, data: bytes) -> socket.socket:
        """A client with a small buffer that sends this and reads nothing."""

        def connect() -> socket.socket:
            plain = socket.socket()
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.connect((self.address.host, self.address.port))
            made = self.trust.wrap_socket(plain, server_hostname=self.address.host) if self.trust else plain
            made.sendall(data)
            return made

        return await asyncio.to_thread(connect)


@asynccontextmanager
async def cloud_target(key_folder: Path) -> AsyncIterator[Target]:
    """The cloud server over HTTPS; its honest user is a phone on gRPC."""
    config = ServerConfig(
        checkpoint(), port=0, http_port=0, keys=key_folder, slots=4, waiting=8, threads=1, http=LIMITS
    )
    phone, token = Phone(checkpoint()), keys.issue(key_folder, "bystander", 3600)
    async with running(config) as server:
        service = server.service
        wire = await connect_grpc(server.address, Trust((key_folder / "ca.pem").read_bytes()))

        async def session() -> object:
            return (await phone.ask(wire, PROMPT, sampling=SAMPLING, max_tokens=ANSWER, token=token)).ids

        async def held() -> object:
            await service.worker._compute.call(lambda: None)
            load = service.worker.load
            return service.rooms.taken, load.running, load.waiting, service.prefixes.free_slots

        headers = {"authorization": f"Bearer {keys.issue(key_folder, 'tester', 3600)}"}
        trust = ssl.create_default_context(cafile=str(key_folder / "ca.pem"))
        try:
            yield Target("cloud", server.http, "tiny-llama", headers, trust, session, held)
        finally:
            await wire.aclose()


@asynccontextmanager
async def agent_target(state: Path, **changes: Any) -> AsyncIterator[Target]:
    """The agent, a key to be shown; its honest user is at the tiny model itself. `changes` are of AgentConfig."""
    tiny, full = checkpoints()
    config = AgentConfig(tiny, full, port=0, state=state, threads=1, api_key="the-key", http=LIMITS, **changes)
    async with serving(config) as server:
        agent, phone = server.agent, server.agent.means.tiny

        async def session() -> object:
            seat = await phone.seat(phone.config.layers)
            try:
                return [token async for token in generate(seat, PROMPT, SAMPLING, phone.config.stops, ANSWER)]
            finally:
                seat.close()

        async def held() -> object:
            await phone.compute.call(lambda: None)
            return len(agent.under_way), phone.prefixes.free_slots, agent.means.full.prefixes.free_slots

        assert isinstance(server.address, Address)
        yield Target(
            "agent", server.address, phone.config.name, {"authorization": "Bearer the-key"}, None, session, held
        )
