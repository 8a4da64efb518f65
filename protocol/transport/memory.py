"""Both ends in one process: frames are encoded and decoded as on the wire, and never leave memory."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from protocol.errors import LinkLost
from protocol.frames import ClientFrame, ServerFrame, decode_client, decode_server, encode
from protocol.limits import RECEIVE_BYTES, RECEIVE_QUEUE
from protocol.transport.base import Address, ClientChannel, Handler, LinkFacts, end_sessions, run_session


class Pipe:
    """One direction: at most RECEIVE_QUEUE encoded frames and RECEIVE_BYTES under way."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._closed: LinkLost | None = None
        self._changed = asyncio.Event()

    async def _until_changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _full(self, size: int) -> bool:
        return len(self._frames) >= RECEIVE_QUEUE or (self._bytes > 0 and self._bytes + size > RECEIVE_BYTES)

    async def put(self, data: bytes) -> None:
        """Waits while the pipe is full. Raises LinkLost once it is closed."""
        while not self._closed and self._full(len(data)):
            await self._until_changed()
        if self._closed:
            raise self._closed.with_traceback(None)
        self._frames.append(data)
        self._bytes += len(data)
        self._changed.set()

    async def get(self) -> bytes:
        """The next frame. Raises LinkLost once the pipe is closed and empty."""
        while not self._closed and not self._frames:
            await self._until_changed()
        if self._closed and not self._frames:
            raise self._closed.with_traceback(None)
        data = self._frames.popleft()
        self._bytes -= len(data)
        self._changed.set()
        return data

    def close(self, *, drop: bool = False, error: LinkLost | None = None) -> None:
        """Ends the direction, the first error counts; frames under way still arrive unless they are dropped."""
        self._closed = self._closed or error or LinkLost("the peer ended the session")
        if drop:
            self._frames.clear()
            self._bytes = 0
        self._changed.set()


class MemoryClientChannel:
    """The phone's end of two pipes."""

    def __init__(self, up: Pipe, down: Pipe):
        self._up, self._down = up, down
        self.bytes_up = self.bytes_down = 0

    async def send(self, frame: ClientFrame) -> None:
        data = encode(frame)
        await self._up.put(data)
        self.bytes_up += len(data)

    async def receive(self) -> ServerFrame:
        data = await self._down.get()
        self.bytes_down += len(data)
        return decode_server(data)

    async def aclose(self) -> None:
        self._up.close(drop=True)
        self._down.close(drop=True)


class PipeServerChannel:
    """The cloud's end of two pipes, where there is neither early data nor anything to measure."""

    early = False
    ticket_age_s: float | None = None

    def __init__(self, transport: str, peer: str, up: Pipe, down: Pipe):
        self.transport, self.peer = transport, peer
        self.bytes_up = self.bytes_down = 0
        self._up, self._down = up, down

    async def handshake(self) -> None:
        return

    def silent_s(self) -> float:
        return 0.0

    def delivery_rate(self) -> float:
        return 0.0

    def rtt_s(self) -> float | None:
        return None

    async def send(self, frame: ServerFrame) -> None:
        data = encode(frame)
        await self._down.put(data)
        self.bytes_down += len(data)

    async def receive(self) -> ClientFrame:
        data = await self._up.get()
        self.bytes_up += len(data)
        return decode_client(data)

    async def aclose(self) -> None:
        self._up.close(drop=True)
        self._down.close()


class MemoryServerChannel(PipeServerChannel):
    """The cloud's end in one process."""

    def __init__(self, up: Pipe, down: Pipe):
        super().__init__("memory", "memory", up, down)


class MemoryConnection:
    """A connection whose server is a handler in the same loop."""

    transport = "memory"
    address = Address("memory", 1)
    ticket_age_s: float | None = None

    def __init__(self, handler: Handler):
        self._handler = handler
        self._sessions: dict[asyncio.Task[None], MemoryClientChannel] = {}
        self.closed = False

    def facts(self) -> LinkFacts:
        return LinkFacts(rtt_s=0.0, min_rtt_s=0.0)

    async def open(self) -> ClientChannel:
        if self.closed:
            raise LinkLost("the connection is closed")
        up, down = Pipe(), Pipe()
        channel = MemoryClientChannel(up, down)
        task = asyncio.create_task(run_session(self._handler, MemoryServerChannel(up, down)))
        self._sessions[task] = channel
        task.add_done_callback(lambda done: self._sessions.pop(done, None))
        return channel

    async def handshake(self) -> None:
        return

    def silent_s(self) -> float:
        return math.inf

    def displaced(self) -> bool:
        return False

    async def move(self) -> bool:
        return False

    async def aclose(self) -> None:
        self.closed = True
        for channel in self._sessions.values():
            await channel.aclose()
        await end_sessions(set(self._sessions))
