"""What stands in for gRPC in virtual time: frames over one ordered pipe, which no fault but darkness holds up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from protocol.errors import LinkLost
from protocol.transport.base import Address, ClientChannel, Connection, Handler, LinkFacts, run_session
from protocol.transport.memory import MemoryClientChannel, MemoryConnection, Pipe, PipeServerChannel
from support.virtual_network import TICK, Network

TRIPS = 3  # of a cold connection: TCP, TLS, HTTP/2


class LongPipe(Pipe):
    """One direction; a frame arrives after `way` seconds in the order of sending, or never where that is None."""

    def __init__(self, way: Callable[[], float | None], arrived: Callable[[], None] = lambda: None):
        super().__init__()
        self._way, self._arrived, self._last = way, arrived, 0.0

    async def put(self, data: bytes) -> None:
        if self._closed:
            raise self._closed.with_traceback(None)
        self._after(self._arrive, data)

    def close(self, *, drop: bool = False, error: LinkLost | None = None) -> None:
        """An end at once is seen at both ends at once; any other comes behind what was sent."""
        if drop or self._closed:
            super().close(drop=drop, error=error)
        else:
            self._after(partial(super().close, error=error))

    def _after(self, what: Callable[..., None], *args: object) -> None:
        loop, way = asyncio.get_running_loop(), self._way()
        if way is not None:
            self._last = max(self._last + TICK, loop.time() + way)
            loop.call_at(self._last, what, *args)

    def _arrive(self, data: bytes) -> None:
        if not self._closed:
            self._frames.append(data)
            self._bytes += len(data)
            self._arrived()
            self._changed.set()


class StandIn(MemoryConnection):
    """A connection that measures nothing."""

    transport = "grpc"

    def __init__(self, network: Network, address: Address, handler: Handler):
        super().__init__(handler)
        self.address = address
        self._network, self._heard_at = network, network.now

    def facts(self) -> LinkFacts:
        return LinkFacts()

    def silent_s(self) -> float:
        return self._network.now - self._heard_at

    async def open(self) -> ClientChannel:
        if self.closed:
            raise LinkLost("the connection is closed")
        up, down = LongPipe(partial(self._way, True)), LongPipe(partial(self._way, False), self._heard)
        channel = MemoryClientChannel(up, down)
        task = asyncio.create_task(run_session(self._handler, PipeServerChannel("grpc", "phone", up, down)))
        self._sessions[task] = channel
        task.add_done_callback(lambda done: self._sessions.pop(done, None))
        return channel

    async def greet(self) -> None:
        """A cold connection's round trips. Raises LinkLost where nobody answers."""
        for _ in range(TRIPS):
            for up in (True, False):
                if (way := self._way(up)) is None:
                    await asyncio.sleep(20.0)
                    raise LinkLost(f"{self.address} does not answer")
                await asyncio.sleep(way)

    def _way(self, up: bool) -> float | None:
        network, weather = self._network, (self._network.up if up else self._network.down).weather
        if network.off(network.host(self.address.host)):
            return None
        return weather.dark_until(network.now) - network.now + weather.delay_s

    def _heard(self) -> None:
        self._heard_at = self._network.now


def grpc_to(network: Network, handlers: dict[str, Handler]) -> Callable[[Address], Awaitable[Connection]]:
    """A way to dial the hosts whose handlers these are."""

    async def connect(address: Address) -> Connection:
        connection = StandIn(network, address, handlers[address.host])
        try:
            await connection.greet()
        except BaseException:
            await connection.aclose()
            raise
        return connection

    return connect
