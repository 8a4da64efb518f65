"""A UDP relay on loopback, whose two directions can be held, counted and delayed, and which can change its ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from protocol.transport.base import Address

Where = tuple[str, int]


class Gate:
    """One direction of a relay."""

    def __init__(self, delay: float = 0.0):
        self.delay = delay  # seconds that every datagram takes
        self.sizes: list[int] = []  # of all datagrams that came, held ones too
        self._held: list[Callable[[], None]] | None = None
        self._came = asyncio.Event()

    def hold(self) -> None:
        """Keeps datagrams until `release`."""
        self._held = self._held or []

    def release(self) -> None:
        held, self._held = self._held or [], None
        for forward in held:
            forward()

    async def until(self, count: int) -> None:
        """Waits until so many datagrams have come."""
        while len(self.sizes) < count:
            self._came.clear()
            await self._came.wait()

    def pass_on(self, size: int, forward: Callable[[], None]) -> None:
        self.sizes.append(size)
        self._came.set()
        if self._held is not None:
            self._held.append(forward)
        elif self.delay:
            asyncio.get_running_loop().call_later(self.delay, forward)
        else:
            forward()


class UdpRelay(asyncio.DatagramProtocol):
    """Stands between phones and one server: `async with await UdpRelay.start(server) as relay`."""

    address: Address

    def __init__(self, target: Address, delay: float):
        self._target = (target.host, target.port)
        self.up, self.down = Gate(delay), Gate(delay)
        self.ports: set[int] = set()  # from which the server hears
        self.heard: list[bytes] = []  # from phones, held ones too
        self._loop = asyncio.get_running_loop()
        self._front: Any = None
        self._backs: dict[Where, socket.socket] = {}
        self._left: list[socket.socket] = []  # by phones that come from another port now
        self._dead: set[int] = set()  # ports of phones to and from which nothing passes

    @classmethod
    async def start(cls, target: Address, delay: float = 0.0) -> UdpRelay:
        """`delay` is one way, in seconds."""
        front, relay = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: cls(target, delay), local_addr=("127.0.0.1", 0)
        )
        relay._front = front
        relay.address = Address(*front.get_extra_info("sockname"))
        return relay

    async def __aenter__(self) -> UdpRelay:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._front.close()
        for back in [*self._backs.values(), *self._left]:
            self._loop.remove_reader(back)
            back.close()

    def hold(self) -> None:
        self.up.hold()
        self.down.hold()

    def rebind(self, *, silent: bool = False) -> None:
        """From now on phones come from new ports; with `silent`, what the server sends to the old ones vanishes."""
        for back in self._backs.values():
            self._left.append(back)
            if silent:
                self._loop.remove_reader(back)
        self._backs.clear()

    def swallow(self, port: int) -> None:
        """From now on nothing passes to or from a phone's port."""
        self._dead.add(port)

    def datagram_received(self, data: bytes, addr: Where) -> None:
        if addr[1] in self._dead:
            return
        if addr not in self._backs:
            self._backs[addr] = back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            back.setblocking(False)
            back.connect(self._target)
            self.ports.add(back.getsockname()[1])
            self._loop.add_reader(back, self._answer, back, addr)
        self.heard.append(data)
        self.up.pass_on(len(data), partial(_send, self._backs[addr], data))

    def _answer(self, back: socket.socket, addr: Where) -> None:
        with suppress(BlockingIOError, ConnectionRefusedError):
            while data := back.recv(65536):
                self.down.pass_on(len(data), partial(self._say, data, addr))

    def _say(self, data: bytes, addr: Where) -> None:
        if (
            addr[1] not in self._dead and not self._front.is_closing()
        ):  # which it may be by the time that a late datagram comes through
            self._front.sendto(data, addr)


def _send(back: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the server, or the relay itself, may be gone by now
        back.send(data)


class TcpRelay:
    """Stands between phones and one server over TCP, and can swallow all that comes, both ways."""

    def __init__(self, target: Address):
        self._target, self._open = target, asyncio.Event()
        self._open.set()
        self.ports: set[int] = set()  # from which the server hears
        self._tasks: set[asyncio.Task[None]] = set()
        self._sinks: set[asyncio.StreamWriter] = set()

    @classmethod
    async def start(cls, target: Address) -> TcpRelay:
        relay = cls(target)
        relay._server = await asyncio.start_server(relay._join, "127.0.0.1", 0)
        relay.address = Address(*relay._server.sockets[0].getsockname())
        return relay

    def hold(self) -> None:
        self._open.clear()

    async def __aenter__(self) -> TcpRelay:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sink in self._sinks:
            sink.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        self.ports.add(back.get_extra_info("sockname")[1])
        self._sinks |= {back, writer}
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._move(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _move(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
        sink.close()

    address: Address
    _server: asyncio.Server
