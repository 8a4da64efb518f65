"""A path that falls silent in mid-answer."""

from __future__ import annotations

import asyncio
import math

from protocol.errors import SessionFault
from protocol.frames import ServerFrame, Tokens
from protocol.transport.base import Handler, ServerChannel
from protocol.transport.memory import MemoryConnection


class Fading(MemoryConnection):
    """A path to a real cloud that falls silent after so many tokens, until it is told to bear again."""

    def __init__(self, handler: Handler, tokens: int | None, transport: str = "memory"):
        super().__init__(self._serve)
        self.transport = transport
        self.left, self.silent, self.again = tokens, asyncio.Event(), asyncio.Event()
        self.moves = self.sessions = 0
        self.fault: SessionFault | None = None  # what it says instead of falling silent
        self._real = handler

    def silent_s(self) -> float:
        """A path that bears is never suspected, however slow this machine is."""
        return math.inf if self.silent.is_set() else 0.0

    async def move(self) -> bool:
        self.moves += 1
        return True

    async def _serve(self, channel: ServerChannel) -> None:
        self.sessions += 1
        send = channel.send

        async def fading(frame: ServerFrame) -> None:
            if isinstance(frame, Tokens) and self.left is not None:
                self.left -= 1
                if self.left < 0 and self.fault:
                    raise self.fault
                if self.left < 0:
                    self.silent.set()
            if self.silent.is_set():
                await self.again.wait()
            await send(frame)

        channel.send = fading  # type: ignore[method-assign]
        await self._real(channel)
