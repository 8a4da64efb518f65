"""A real cloud service in the test's own loop, reached over the memory transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloud_server.config import ServerConfig
from cloud_server.keys import read
from cloud_server.service import Service
from cloud_server.session import Session
from cloud_server.tokens import Verifier
from protocol.transport.base import Handler, ServerChannel
from protocol.transport.memory import MemoryConnection
from split_model.compute import Compute
from split_model.model import Model
from split_model.settings import Precision
from split_model.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Cloud:
    service: Service
    handle: Handler  # for other transports
    connection: MemoryConnection
    compute: Compute

    async def settled(self) -> tuple[int, int]:
        """Rows and waiting rows, once the compute thread has done all it was asked."""
        await self.compute.call(lambda: None)
        await self.compute.call(lambda: None)
        return self.service.worker.load.running, self.service.worker.load.waiting


@asynccontextmanager
async def cloud(
    folder: Path,
    keys: Path | None = None,
    tiny: Path | None = None,
    precision: Precision | None = None,
    **settings: int,
) -> AsyncIterator[Cloud]:
    """Serves the checkpoint, with a tiny model that drafts where one is given; `settings` are those of ServerConfig."""
    compute = Compute(threads=1)
    model = await compute.call(partial(Model.load, folder, precision=precision))
    config = ServerConfig(folder, **{"slots": 4, **settings})  # type: ignore[arg-type]
    drafts = await compute.call(Model.load, tiny) if tiny else None
    verifier = Verifier(read(keys)) if keys else None
    service = Service(config, model, ChatTokenizer.load(folder), compute, verifier, drafts)
    service.ready = True

    async def handle(channel: ServerChannel) -> None:
        await Session(service, channel).serve()

    connection = MemoryConnection(handle)
    try:
        yield Cloud(service, handle, connection, compute)
    finally:
        await connection.aclose()
        await compute.aclose()
