"""A simulated network for `support.virtual`: named hosts, and one access link with a schedule of what goes wrong."""

from __future__ import annotations

import asyncio
import enum
import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from support.virtual import VirtualLoop

PHONE = "198.51.100.7"  # as servers see it
OVERHEAD = 28  # bytes of IP and UDP headers
TICK = 1e-6  # seconds between what arrives in order: timers of one moment go off in any
Where = tuple[str, int]


class Fate(enum.Enum):
    """What becomes of one datagram."""

    LOSE = enum.auto()
    TWICE = enum.auto()
    CORRUPT = enum.auto()
    LATE = enum.auto()  # behind those that follow


@dataclass(frozen=True, slots=True)
class Weather:
    """One direction: seconds, bytes/s (0: no limit), shares of datagrams; blackholes are counted from the start."""

    delay_s: float = 0.035
    jitter_s: float = 0.0
    reorders: bool = False  # jitter does
    lose: float = 0.0
    twice: float = 0.0
    corrupt: float = 0.0
    late: float = 0.0
    rate: float = 0.0
    queue: int = 64  # datagrams
    blackholes: tuple[tuple[float, float], ...] = ()
    fates: Mapping[int, Fate] = field(default_factory=dict)  # by number, from 1

    @property
    def calm(self) -> Weather:
        """The same with nothing going wrong."""
        return replace(self, lose=0.0, twice=0.0, corrupt=0.0, late=0.0, blackholes=(), fates={})

    def dark_until(self, after: float) -> float:
        """The end of the blackhole that this moment is in; the moment itself where there is none."""
        return max((end for begin, end in self.blackholes if begin <= after < end), default=after)


class Lane:
    """One direction of the access link."""

    def __init__(self, weather: Weather, chance: random.Random):
        self.weather, self.carried, self.harmed = weather, 0, 0  # datagrams; harmed in daylight
        self._chance = chance
        self._busy_until = self._last = 0.0

    def carry(self, data: bytes, now: float) -> list[tuple[float, bytes]]:
        """When what of a datagram arrives; times from the start."""
        weather, chance = self.weather, self._chance
        self.carried += 1
        fate, draw = weather.fates.get(self.carried), chance.random()
        for kind, share in ((Fate.LOSE, weather.lose), (Fate.TWICE, weather.twice), (Fate.CORRUPT, weather.corrupt),
                            (Fate.LATE, weather.late)):  # fmt: skip
            fate = kind if fate is None and 0 <= draw < share else fate
            draw -= share
        if weather.dark_until(now) > now:
            return []
        at = None if fate is Fate.LOSE else self._through(len(data), now)
        self.harmed += at is None or fate in (Fate.CORRUPT, Fate.LATE)
        if at is None:
            return []
        if fate is Fate.CORRUPT:
            spot = chance.randrange(len(data))
            data = data[:spot] + bytes([data[spot] ^ 1 << chance.randrange(8)]) + data[spot + 1 :]
        if fate is Fate.LATE:
            return [(at + max(0.005, 3 * weather.jitter_s), data)]
        return [(at, data), (at + 0.002, data)] if fate is Fate.TWICE else [(at, data)]

    def _through(self, size: int, now: float) -> float | None:
        """When it leaves the lane; None where the queue was full."""
        weather, chance = self.weather, self._chance
        at = now
        if weather.rate:
            took = (size + OVERHEAD) / weather.rate
            at = max(now, self._busy_until) + took
            if at - now > (weather.queue + 1) * took:
                return None
            self._busy_until = at
        at += weather.delay_s + weather.jitter_s * chance.random()
        if not weather.reorders:
            self._last = at = max(at, self._last + TICK)
        return at


class VirtualSocket(asyncio.DatagramTransport):
    """A UDP socket in the network; `real` is what the code under test made, and carries nothing."""

    def __init__(self, network: Network, protocol: asyncio.DatagramProtocol, here: Where, peer: Where | None,
                 real: socket.socket):  # fmt: skip
        super().__init__({"socket": real, "sockname": here, "peername": peer})
        self.here, self.peer = here, peer
        self._network, self._protocol, self._real = network, protocol, real
        self._closing = False

    def sendto(self, data: Any, addr: Any = None) -> None:
        if not self._closing:
            self._network.send(self, bytes(data), self.peer or addr)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._network.forget(self)
            asyncio.get_running_loop().call_soon(self._closed)

    abort = close

    def _closed(self) -> None:
        self._real.close()
        self._protocol.connection_lost(None)

    def came(self, data: bytes, source: Where) -> None:
        if not self._closing:
            self._protocol.datagram_received(data, source)

    def refused(self) -> None:
        if not self._closing:
            self._protocol.error_received(ConnectionRefusedError("no such port"))


@dataclass(frozen=True, slots=True)
class Passed:
    """One datagram's way through the access link."""

    up: bool
    at: float  # seconds from the start
    size: int
    arrived: tuple[float, ...]  # empty when it was lost
    phone: Where


class Network:
    """Servers on named hosts, and phones behind one access link and its address translation.

    The weather is calm until `begin`. `proven` tells whether an address has been shown to a server; until then it gets
    three times what it sent at most.
    """

    def __init__(self, up: Weather, down: Weather, seed: object = 0):
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.network = self
        self._seed, self._began = seed, loop.time()
        self._set(up.calm, down.calm)
        self._coming = up, down
        self.dead: dict[str, tuple[float, float]] = {}  # hosts that are off, from when to when
        self.passed: list[Passed] = []
        self.proven: Callable[[Where], bool] = lambda where: False
        self.beyond: list[str] = []  # where three times was exceeded
        self._loop, self._hosts = loop, dict[str, str]()
        self._servers: dict[Where, VirtualSocket] = {}
        self._phones: dict[VirtualSocket, Where] = {}
        self._came, self._went = Counter[Where](), Counter[Where]()
        self._port = 40_000

    def begin(self) -> None:
        """From here on datagrams and seconds count, and the weather is what it was meant to be."""
        self._began = self._loop.time()
        self.passed.clear()
        self._set(*self._coming)

    def _set(self, up: Weather, down: Weather) -> None:
        self.up, self.down = (Lane(w, random.Random(f"{self._seed} {n}")) for n, w in (("up", up), ("down", down)))

    @property
    def now(self) -> float:
        """Seconds from the start."""
        return self._loop.time() - self._began

    def host(self, name: str) -> str:
        """The address of a host, known from now on. It is on loopback, so that real sockets can be connected to it."""
        return self._hosts.setdefault(name, f"127.1.0.{len(self._hosts) + 1}")

    def rebind(self) -> None:
        """Every phone's socket is seen at another port from now on; what is sent to the old one is lost."""
        for phone in self._phones:
            self._phones[phone] = self._new_port()

    def off(self, host: str) -> bool:
        """Whether a host is without power now."""
        begin, end = self.dead.get(host, (0.0, 0.0))
        return begin <= self.now < end

    # what the loop asks

    def getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        if host not in self._hosts and host not in self._hosts.values():
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (self._hosts.get(host, host), port))]

    def endpoint(
        self, factory: Callable[[], asyncio.DatagramProtocol], local_addr: Where | None = None,
        sock: socket.socket | None = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """A server with `local_addr`, a phone with a connected `sock`."""
        peer = sock.getpeername() if sock else None
        made, protocol = sock or socket.socket(socket.AF_INET, socket.SOCK_DGRAM), factory()
        if peer is None:
            assert local_addr is not None
            here = (self.host(local_addr[0]), local_addr[1])
            transport = self._servers[here] = VirtualSocket(self, protocol, here, None, made)
        else:
            transport = VirtualSocket(self, protocol, ("192.168.0.2", self._port), peer, made)
            self._phones[transport] = self._new_port()
        protocol.connection_made(transport)
        return transport, protocol

    # what sockets ask

    def send(self, sender: VirtualSocket, data: bytes, to: Where) -> None:
        up = sender in self._phones
        phone, server = (self._phones[sender], to) if up else (to, sender.here)
        lane = self.up if up else self.down
        if not up:
            self._went[phone] += len(data)
            if self._went[phone] > 3 * self._came[phone] and not self.proven(phone):
                self.beyond.append(f"{self._went[phone]} bytes to {phone}, {self._came[phone]} from there")
        arrivals = [] if self.off(server[0]) else lane.carry(data, self.now)
        self.passed.append(Passed(up, self.now, len(data), tuple(at for at, _ in arrivals), phone))
        for at, what in arrivals:
            self._loop.call_at(self._began + at, self._arrive_up if up else self._arrive_down, phone, server, what)

    def forget(self, one: VirtualSocket) -> None:
        self._phones.pop(one, None)
        if self._servers.get(one.here) is one:
            del self._servers[one.here]

    def _arrive_up(self, phone: Where, server: Where, data: bytes) -> None:
        if self.off(server[0]):
            return
        if server in self._servers:
            self._came[phone] += len(data)
            self._servers[server].came(data, phone)
        else:
            self._loop.call_later(self.down.weather.delay_s, self._refuse, phone)

    def _refuse(self, phone: Where) -> None:
        for one, where in list(self._phones.items()):
            if where == phone:
                one.refused()

    def _arrive_down(self, phone: Where, server: Where, data: bytes) -> None:
        for one, where in list(self._phones.items()):
            if where == phone and one.peer == server:
                one.came(data, server)

    def _new_port(self) -> Where:
        self._port += 1
        return PHONE, self._port
