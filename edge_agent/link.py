"""What is known about each replica and the path to it, and the connection that is open to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.bulk import BULK, BulkRates
from edge_agent.conditions import Cloud, Network, Rates, average
from edge_agent.dial import RACE_LIMIT, Connect, Dialler
from edge_agent.left import Left
from protocol.errors import FaultCode, LinkLost, SessionFault, UnverifiedServer
from protocol.frames import Load
from protocol.limits import TICKET_LIFE
from protocol.transport.base import Address, Connection

log = logging.getLogger(__name__)
UNKNOWN_PATIENCE = 0.3  # seconds QUIC has before gRPC starts too, where the round trip is not known
LEAST_PATIENCE, MOST_PATIENCE = 0.1, 3.0
FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 30.0
REFUSED_S = 60.0  # how long a refusal of our keys or models stands before it is tried again
GRPC_TRIPS = 4  # round trips that bulk waits for a gRPC connection before it takes QUIC after all
LOAD_LIFE_S = 30.0  # a replica's queue is believed for this long
# Round trip (s), up and down (bytes/s) before anything was measured, typical of each kind.
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
    draft: float | None = None  # of the replica's tiny model; 0 where it said that it has none

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
        self.unreachable: str | None = None
        self.retry_at = 0.0
        self.on_handshake: Callable[[], None] = lambda: None
        self.dialler = Dialler(address, quic, grpc, self._reached, self._failed, clock)
        self._clock = clock
        self._bulk = BulkRates(clock)
        self.left = Left(clock)
        self._load: Load | None = None
        self._load_at = self._busy_until = 0.0
        self._refusal: tuple[str, float] | None = None
        self._backoff = FIRST_BACKOFF_S

    # what is known

    @property
    def rtt_s(self) -> float:
        return PRIORS[self.kind][0] if self.path.rtt_s is None else self.path.rtt_s

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
        return self._load if self._clock() - self._load_at < LOAD_LIFE_S else None

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
        path, warm = self.path, self.dialler.warm
        bulk = self._bulk.rate(self.dialler.network, "grpc") if self._bulk_by_grpc else None
        trips = 0 if warm else 3 if self.dialler.udp_blocked else 0 if self.resumable else 1
        return Cloud(
            address=str(self.address),
            rtt_s=self.rtt_s,
            up=bulk or path.up or up,
            down=path.down or down,
            rates=Rates(path.prefill or RATES.prefill, path.decode or RATES.decode),
            wait_s=self.wait_s,
            handshake_trips=trips,
            cold=not warm,
            token_bytes=token_bytes,
            price_s_per_mb=price_s_per_mb,
            draft_rate=path.draft or 0.0,
            others=max(0, self._told.running - 1) if self._told else 0,  # it is told to one that runs
            load_age_s=round(self._clock() - self._load_at, 3) if self._load else None,
            unreachable=self.unreachable and f"no replica is reachable: {self.unreachable}",
            refused=self.refused(),
        )

    # what is learned

    def heard(self, load: Load) -> None:
        """A replica's own account of its queue and rates."""
        if self._load is not None and load.steps < self._load.steps:
            self.left.forget()
        self._load, self._load_at = load, self._clock()
        path = self.path
        path.prefill = average(path.prefill, load.prefill_rate) if load.prefill_rate > 0 else path.prefill
        path.decode = average(path.decode, load.decode_rate) if load.decode_rate > 0 else path.decode
        path.draft = average(path.draft or None, load.draft_rate) if load.draft_rate > 0 else 0.0
        path.down = average(path.down, load.delivery_rate) if load.delivery_rate > 0 else path.down

    def observe(self) -> None:
        """Takes over what the connection has measured."""
        if self.dialler.connection is None:
            return
        facts = self.dialler.connection.facts()
        self.path.rtt_s = facts.rtt_s if facts.rtt_s is not None else self.path.rtt_s
        self.path.up = facts.delivery_rate or self.path.up

    def answered_in(self, seconds: float) -> None:
        """A session was admitted after so long: what the transport measured counts from now on, else this."""
        self.observe()
        if self.dialler.connection is not None and self.dialler.connection.facts().rtt_s is None:
            self.path.rtt_s = average(self.path.rtt_s, seconds)

    def refuse(self, fault: SessionFault) -> None:
        """Keeps a refusal in mind: for a while when it is about us, as long as it says when it is about its load."""
        if fault.code in (FaultCode.BUSY, FaultCode.DRAINING, FaultCode.QUOTA):
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

    async def connect(self, bulk: int = 0) -> Connection:
        """A connection that takes a session now, with so many bytes to send; see Dialler.connect. Raises LinkLost."""
        connection = await self.dialler.connect(self._patience())
        if bulk >= BULK and connection.transport == "quic" and self._bulk_by_grpc:
            with contextlib.suppress(LinkLost):
                return await self.dialler.connect_grpc(max(1.0, GRPC_TRIPS * self.rtt_s))
        return connection

    def carried(self, connection: Connection, size: int, seconds: float) -> None:
        """So many bytes went up by a connection, and were answered after so long."""
        self._bulk.sent(self.dialler.network, connection.transport, size, seconds)

    @property
    def _bulk_by_grpc(self) -> bool:
        return self._bulk.prefers_grpc(self.dialler.network, PRIORS[self.kind][1])

    async def another(self, than: Connection, patience_s: float) -> Connection:
        """A connection beside one that is in doubt; see Dialler.another. Raises LinkLost."""
        return await self.dialler.another(than, self._patience(), patience_s)

    def revived(self, connection: Connection) -> None:
        """A connection that was in doubt bears again."""
        self.dialler.keep(connection)
        self.found()

    async def probe(self) -> None:
        """Has a handshake completed, by the open connection or a new one. Raises LinkLost."""
        await self.connect()
        await self.dialler.settled()
        connection = self.dialler.connection  # one that was offered early may have been given up for another
        if connection is None or connection.closed:
            raise LinkLost(self.unreachable or "the attempt to reach the replica was given up")
        try:
            async with asyncio.timeout(RACE_LIMIT):
                await connection.handshake()
        except (LinkLost, TimeoutError) as error:
            await self.drop(connection)
            raise LinkLost(str(error) or f"no answer within {RACE_LIMIT:g} s") from None
        self.found()

    async def drop(self, connection: Connection) -> None:
        """Closes a connection that has gone silent."""
        await self.dialler.drop(connection)

    async def aclose(self) -> None:
        self.observe()
        await self.dialler.aclose()

    def _patience(self) -> float:
        if self.path.rtt_s is None:
            return UNKNOWN_PATIENCE
        return min(max(1.5 * self.path.rtt_s, LEAST_PATIENCE), MOST_PATIENCE)

    def _reached(self, connection: Connection) -> None:
        self.found()
        self.observe()
        if connection.transport == "quic":
            self.path.resumable_until = time.time() + TICKET_LIFE
        self.on_handshake()

    def _failed(self, lost: LinkLost) -> None:
        if isinstance(lost, UnverifiedServer):
            self._refusal = (f"{self.address}: {lost}", self._clock() + REFUSED_S)
        self.lost(str(lost))
