"""A UDP relay on loopback, whose two directions can be held, counted and delayed."""

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
        self._loop = asyncio.get_running_loop()
        self._front: Any = None
        self._backs: dict[Where, socket.socket] = {}

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
        for back in self._backs.values():
            self._loop.remove_reader(back)
            back.close()

    def datagram_received(self, data: bytes, addr: Where) -> None:
        if addr not in self._backs:
            self._backs[addr] = back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            back.setblocking(False)
            back.connect(self._target)
            self._loop.add_reader(back, self._answer, back, addr)
        self.up.pass_on(len(data), partial(_send, self._backs[addr], data))

    def _answer(self, back: socket.socket, addr: Where) -> None:
        with suppress(BlockingIOError, ConnectionRefusedError):
            while data := back.recv(65536):
                self.down.pass_on(len(data), partial(self._front.sendto, data, addr))


def _send(back: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the server, or the relay itself, may be gone by now
        back.send(data)
