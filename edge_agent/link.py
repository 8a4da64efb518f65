"""What is known about each replica and the path to it, and the connection that is open to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from edge_agent.conditions import Cloud, Network, Rates, average
from edge_agent.dial import Connect, race, reach
from protocol.errors import FaultCode, LinkLost, SessionFault, UnverifiedServer
from protocol.frames import Load
from protocol.limits import TICKET_LIFE
from protocol.transport.base import Address, Connection

log = logging.getLogger(__name__)
UNKNOWN_PATIENCE = 0.3  # seconds QUIC has before gRPC starts too, where the round trip is not known
LEAST_PATIENCE, MOST_PATIENCE = 0.1, 3.0
SPEAK_WITHIN = 1.0  # seconds a handshake waits for the frame that it could take along
RACE_LIMIT = 10.0  # seconds for both
UDP_BLOCKED_S, UDP_BLOCKED_MOST_S = 300.0, 86_400.0
FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 30.0
REFUSED_S = 60.0  # how long a refusal of our keys or models stands before it is tried again
LOAD_LIFE_S = 30.0  # a replica's queue is believed for this long
# Round trip (s), up and down (bytes/s) before anything was measured: the profiles of docs/networks.md.
PRIORS = {
    Network.LOOPBACK: (0.0005, 1e9, 1e9),
    Network.WIRED: (0.010, 12.5e6, 12.5e6),
    Network.WIFI: (0.020, 1.9e6, 3.75e6),
    Network.CELLULAR: (0.070, 1.5e6, 1.5e6),
}
RATES = Rates(40e9, 8e9)  # FLOP/s of a replica that has not said


@dataclass(slots=True)
class Path:
    """What was measured of the path to a replica; kept between starts."""

    rtt_s: float | None = None
    up: float | None = None
    down: float | None = None
    resumable_until: float = 0.0  # by the wall clock: a ticket lives until then
    prefill: float | None = None
    decode: float | None = None

    @classmethod
    def read(cls, kept: object) -> Path:
        numbers = kept if isinstance(kept, dict) else {}
        known = {name: numbers.get(name) for name in cls.__slots__}
        return cls(**{name: float(value) for name, value in known.items() if isinstance(value, int | float)})


class Link:
    """One replica. `quic` may return before its handshake is complete, when it has a ticket for early data."""

    def __init__(self, address: Address, quic: Connect, grpc: Connect | None = None, path: Path | None = None,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self.address, self.path = address, path or Path()
        self.kind = Network.CELLULAR
        self.load: Load | None = None
        self.unreachable: str | None = None
        self.retry_at = 0.0
        self._quic, self._grpc, self._clock = quic, grpc, clock
        self._load_at = 0.0
        self._backoff = FIRST_BACKOFF_S
        self._refusal: tuple[str, float] | None = None
        self._busy_until = 0.0
        self._udp_blocked_until = self._udp_blocked_s = 0.0
        self._connection: Connection | None = None
        self._race: asyncio.Task[None] | None = None
        self._offered: asyncio.Future[Connection] | None = None
        self.on_handshake: Callable[[], None] = lambda: None
        self._spoken = asyncio.Event()

    # what is known

    @property
    def rtt_s(self) -> float:
        return PRIORS[self.kind][0] if self.path.rtt_s is None else self.path.rtt_s

    @property
    def warm(self) -> bool:
        """A connection is open, its handshake complete."""
        return self._open() and (self._race is None or self._race.done())

    @property
    def resumable(self) -> bool:
        return self.path.resumable_until > time.time()

    def refused(self) -> str | None:
        """Why this replica will not serve us, while that stands."""
        return self._refusal[0] if self._refusal and self._refusal[1] > self._clock() else None

    def preference(self) -> tuple[bool, bool, bool, float]:
        """Smaller is better."""
        now = self._clock()
        refused, lost = self.refused() is not None, self.unreachable is not None
        return refused, lost, self._busy_until > now or self._draining, self.wait_s + self.rtt_s

    @property
    def _told(self) -> Load | None:
        """The replica's last account, while it is fresh."""
        return self.load if self._clock() - self._load_at < LOAD_LIFE_S else None

    @property
    def _draining(self) -> bool:
        return self._told is not None and self._told.draining

    @property
    def wait_s(self) -> float:
        told = self._told.wait_s if self._told else 0.0
        return max(told, self._busy_until - self._clock())

    def cloud(self, price_s_per_mb: float = 0.0, token_bytes: int = 0) -> Cloud:
        """This replica as a score sees it."""
        _, up, down = PRIORS[self.kind]
        path = self.path
        trips = 0 if self.warm or self.resumable else 3 if self._udp_blocked() else 1
        return Cloud(
            address=str(self.address),
            rtt_s=self.rtt_s,
            up=path.up or up,
            down=path.down or down,
            rates=Rates(path.prefill or RATES.prefill, path.decode or RATES.decode),
            wait_s=self.wait_s,
            handshake_trips=trips,
            cold=not self.warm,
            token_bytes=token_bytes,
            price_s_per_mb=price_s_per_mb,
            load_age_s=round(self._clock() - self._load_at, 3) if self.load else None,
            unreachable=self.unreachable and f"no replica is reachable: {self.unreachable}",
            refused=self.refused(),
        )

    # what is learned

    def heard(self, load: Load) -> None:
        """A replica's own account of its queue and rates."""
        self.load, self._load_at = load, self._clock()
        path = self.path
        path.prefill = average(path.prefill, load.prefill_rate) if load.prefill_rate > 0 else path.prefill
        path.decode = average(path.decode, load.decode_rate) if load.decode_rate > 0 else path.decode
        path.down = average(path.down, load.delivery_rate) if load.delivery_rate > 0 else path.down

    def observe(self) -> None:
        """Takes over what the connection has measured."""
        if self._connection is None:
            return
        facts = self._connection.facts()
        self.path.rtt_s = facts.rtt_s if facts.rtt_s is not None else self.path.rtt_s
        self.path.up = facts.delivery_rate or self.path.up

    def answered_in(self, seconds: float) -> None:
        """A round trip seen by the application, for a transport that measures none."""
        if self._connection is not None and self._connection.facts().rtt_s is None:
            self.path.rtt_s = average(self.path.rtt_s, seconds)

    def refuse(self, fault: SessionFault) -> None:
        """Keeps a refusal in mind: for a while when it is about us, as long as it says when it is about its load."""
        if fault.code in (FaultCode.BUSY, FaultCode.DRAINING):
            self._busy_until = self._clock() + (fault.retry_after_s or 1.0)
        elif fault.code in (FaultCode.UNAUTHENTICATED, FaultCode.WRONG_MODEL, FaultCode.WRONG_TOKENIZER):
            self._refusal = (f"{self.address} refused: {fault}", self._clock() + REFUSED_S)

    def lost(self, why: str) -> None:
        """No path to the replica; it is tried again later and later."""
        if not self.unreachable:
            log.info("%s is not reachable: %s", self.address, why)
        self.unreachable = why
        if self._clock() >= self.retry_at:  # what is tried in between, for an answer, makes the wait no longer
            self.retry_at = self._clock() + self._backoff
            self._backoff = min(2 * self._backoff, MOST_BACKOFF_S)

    def found(self) -> None:
        """The replica has answered."""
        if self.unreachable:
            log.info("%s is reachable again", self.address)
        self.unreachable, self._backoff = None, FIRST_BACKOFF_S

    # the connection

    async def connect(self) -> Connection:
        """A connection that takes a session now: the warm one, one with early data, or a race's winner.

        Raises LinkLost; whoever waits may be cancelled, the race goes on for the others.
        """
        if not self._open() and self._race and self._offered and self._offered.done():
            await asyncio.wait({self._race})  # what was offered early has been given up for something better
        if self._open():
            assert self._connection is not None
            return self._connection
        if self._race is None or self._race.done():
            self._offered = asyncio.get_running_loop().create_future()
            self._race = asyncio.create_task(self._run_race(self._offered))
        assert self._offered is not None
        return await asyncio.shield(self._offered)

    def spoke(self) -> None:
        """A session's first frame is queued: a handshake that waits to take it along may begin."""
        self._spoken.set()

    async def drop(self, connection: Connection) -> None:
        """Closes a connection that has gone silent, unless another has taken its place already."""
        current, self._connection = self._connection, None if connection is self._connection else self._connection
        await connection.aclose()
        if connection is current:
            await self._end_race()

    async def aclose(self) -> None:
        await self._end_race()
        if self._connection is not None:
            self.observe()
            await self._connection.aclose()
            self._connection = None

    def _open(self) -> bool:
        return self._connection is not None and not self._connection.closed

    async def _end_race(self) -> None:
        if self._race is not None:
            self._race.cancel()
            await asyncio.gather(self._race, return_exceptions=True)
        if self._offered is not None:
            self._fail(self._offered, LinkLost("the attempt to reach the replica was given up"))

    async def _run_race(self, offered: asyncio.Future[Connection]) -> None:
        try:
            async with asyncio.timeout(RACE_LIMIT):
                self._connection = winner = await self._dial(offered)
            self._judge_udp(winner)
            self.found()
            self.observe()
            self.on_handshake()
            if not offered.done():
                offered.set_result(winner)
        except (LinkLost, TimeoutError) as error:
            lost = error if isinstance(error, LinkLost) else LinkLost(f"no answer within {RACE_LIMIT:g} s")
            if isinstance(lost, UnverifiedServer):
                self._refusal = (f"{self.address}: {lost}", self._clock() + REFUSED_S)
            self.lost(str(lost))
            self._fail(offered, lost)

    def _fail(self, offered: asyncio.Future[Connection], lost: LinkLost) -> None:
        if not offered.done():
            offered.set_exception(lost)
            offered.exception()  # there may be nobody left who waits for it

    async def _dial(self, offered: asyncio.Future[Connection]) -> Connection:
        async def early(connection: Connection) -> None:
            if not offered.done():
                self._spoken.clear()
                self._connection = connection
                offered.set_result(connection)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SPEAK_WITHIN):
                        await self._spoken.wait()

        quic = partial(reach, self._quic, self.address, early)
        grpc = partial(reach, self._grpc, self.address) if self._grpc else None
        return await race(None if grpc and self._udp_blocked() else quic, grpc, self._patience())

    def _patience(self) -> float:
        if self.path.rtt_s is None:
            return UNKNOWN_PATIENCE
        return min(max(1.5 * self.path.rtt_s, LEAST_PATIENCE), MOST_PATIENCE)

    def _udp_blocked(self) -> bool:
        return self._udp_blocked_until > self._clock()

    def _judge_udp(self, winner: Connection) -> None:
        """A network where gRPC won is one without UDP for 5 minutes, then twice as long, up to a day."""
        if winner.transport == "quic":
            self._udp_blocked_s = 0.0
            self.path.resumable_until = time.time() + TICKET_LIFE
        elif not self._udp_blocked():
            self._udp_blocked_s = min(max(UDP_BLOCKED_S, 2 * self._udp_blocked_s), UDP_BLOCKED_MOST_S)
            self._udp_blocked_until = self._clock() + self._udp_blocked_s
