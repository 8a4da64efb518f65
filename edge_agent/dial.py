"""Reaching a replica: QUIC first, gRPC over TLS where that does not answer soon; and the connection that was made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from protocol.errors import LinkLost, UnverifiedServer
from protocol.transport.base import Address, Connection

Connect = Callable[[Address], Awaitable[Connection]]
Dial = Callable[[], Awaitable[Connection]]
SPEAK_WITHIN = 1.0  # seconds a handshake waits for the frame that it could take along
RACE_LIMIT = 10.0  # seconds for both transports
UDP_BLOCKED_S, UDP_BLOCKED_MOST_S = 300.0, 86_400.0


async def reach(
    connect: Connect, address: Address, made: Callable[[Connection], Awaitable[None]] | None = None
) -> Connection:
    """A connection whose handshake is complete. `made` gets it before that; the handshake begins when it returns.

    Raises LinkLost.
    """
    connection = await connect(address)
    try:
        if made is not None:
            await made(connection)
        await connection.handshake()
    except BaseException:
        await connection.aclose()
        raise
    return connection


async def race(first: Dial | None, second: Dial | None, patience_s: float) -> Connection:
    """Dials `first`, and `second` too when that has failed or `patience_s` passed; the first to succeed wins.

    The other is cancelled or closed. Raises LinkLost when both failed, UnverifiedServer as soon as one did.
    """
    dials: list[asyncio.Future[Connection]] = [asyncio.ensure_future(first())] if first else []
    pending, waiting, errors = set(dials), second, []
    winner: asyncio.Future[Connection] | None = None
    try:
        while winner is None and (pending or waiting):
            done: set[asyncio.Future[Connection]] = set()
            if pending:
                limit = patience_s if waiting else None
                done, pending = await asyncio.wait(pending, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if waiting:
                dials.append(asyncio.ensure_future(waiting()))
                pending, waiting = pending | {dials[-1]}, None
            for dial in done:
                error = dial.exception()
                if error is None:
                    winner = winner or dial
                elif isinstance(error, UnverifiedServer) or not isinstance(error, LinkLost):
                    raise error
                else:
                    errors.append(error)
    finally:
        try:
            await _give_up([dial for dial in dials if dial is not winner])
        except BaseException:  # cancelled meanwhile: nobody takes the winner either
            await _give_up(dials)
            raise
    if winner is None:
        raise errors[0] if errors else LinkLost("there is no way to dial")
    return winner.result()


async def _give_up(dials: list[asyncio.Future[Connection]]) -> None:
    for dial in dials:
        dial.cancel()
    for result in await asyncio.gather(*dials, return_exceptions=True):
        if not isinstance(result, BaseException):
            await result.aclose()


class Dialler:
    """The connection to one replica, made when it is asked for. `quic` may have a ticket and take early data.

    `reached` is told of every finished handshake, `failed` of every race without a winner.
    """

    def __init__(self, address: Address, quic: Connect, grpc: Connect | None, reached: Callable[[Connection], None],
                 failed: Callable[[LinkLost], None], clock: Callable[[], float]):  # fmt: skip
        self.connection: Connection | None = None
        self.second: Connection | None = None  # over the other transport, while the first one is in doubt
        self._address, self._quic, self._grpc = address, quic, grpc
        self._reached, self._failed, self._clock = reached, failed, clock
        self._udp_blocked_until = self._udp_blocked_s = 0.0
        self._tried: Connection | None = None  # over QUIC, in this race
        self._race: asyncio.Task[None] | None = None
        self._offered: asyncio.Future[Connection] | None = None
        self._spoken = asyncio.Event()
        self._beside: asyncio.Task[Connection] | None = None

    @property
    def warm(self) -> bool:
        """A connection is open, its handshake complete."""
        return self._open() and (self._race is None or self._race.done())

    @property
    def udp_blocked(self) -> bool:
        return self._udp_blocked_until > self._clock()

    async def connect(self, patience_s: float) -> Connection:
        """A connection that takes a session now: the warm one, one with early data, or a race's winner.

        Raises LinkLost; whoever waits may be cancelled, the race goes on for the others.
        """
        if not self._open() and self._race and self._offered and self._offered.done():
            await asyncio.wait({self._race})  # what was offered early has been given up for something better
        if self._open():
            assert self.connection is not None
            return self.connection
        if self._race is None or self._race.done():
            self._offered = asyncio.get_running_loop().create_future()
            self._race = asyncio.create_task(self._run(self._offered, patience_s))
        assert self._offered is not None
        return await asyncio.shield(self._offered)

    async def connect_grpc(self, patience_s: float) -> Connection:
        """A connection over gRPC, its handshake complete, beside a QUIC one that is in doubt; one for all who ask.

        Raises LinkLost when there is none in time; the attempt goes on for the others.
        """
        for known in (self.connection, self.second):
            if known is not None and known.transport == "grpc" and not known.closed:
                return known
        if self._grpc is None:
            raise LinkLost(f"there is no gRPC to {self._address}")
        if self._beside is None or self._beside.done():
            self._beside = asyncio.create_task(self._dial_beside(self._grpc))
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(self._beside)
        except TimeoutError:
            raise LinkLost(f"no gRPC to {self._address} within {patience_s:.1f} s") from None

    async def _dial_beside(self, grpc: Connect) -> Connection:
        try:
            async with asyncio.timeout(RACE_LIMIT):
                connection = await reach(grpc, self._address)
        except TimeoutError:
            raise LinkLost(f"no answer within {RACE_LIMIT:g} s") from None
        before, self.second = self.second, connection
        if before is not None:
            await before.aclose()
        return connection

    def udp_is_blocked(self) -> None:
        """gRPC answers where QUIC has gone silent: new sessions take gRPC, and the network is remembered for it.

        The QUIC connection stays open beside it, for the streams that it may still carry.
        """
        if self.second is not None and self.second.transport == "grpc" and not self.second.closed:
            self.connection, self.second = self.second, self.connection
        self._block_udp()

    async def settled(self) -> None:
        """Waits for the race that is under way, if there is one."""
        if self._race is not None:
            await asyncio.wait({self._race})

    def spoke(self) -> None:
        """A session's first frame is queued: a handshake that waits to take it along may begin."""
        self._spoken.set()

    async def drop(self, connection: Connection) -> None:
        """Closes a connection, and the race that it may be in, unless another has taken its place."""
        current, self.connection = self.connection, None if connection is self.connection else self.connection
        self.second = None if connection is self.second else self.second
        await connection.aclose()
        if connection is current:
            await self._end_race()

    async def aclose(self) -> None:
        await self._end_race()
        if self._beside is not None:
            self._beside.cancel()
            await asyncio.gather(self._beside, return_exceptions=True)
        for connection in (self.connection, self.second):
            if connection is not None:
                await connection.aclose()
        self.connection = self.second = None

    def _open(self) -> bool:
        return self.connection is not None and not self.connection.closed

    async def _end_race(self) -> None:
        if self._race is not None:
            self._race.cancel()
            await asyncio.gather(self._race, return_exceptions=True)
        if self._offered is not None:  # a race that was cancelled before its first step has not said so
            _fail(self._offered, LinkLost("the attempt to reach the replica was given up"))

    async def _run(self, offered: asyncio.Future[Connection], patience_s: float) -> None:
        lost = LinkLost("the attempt to reach the replica was given up")
        try:
            async with asyncio.timeout(RACE_LIMIT):
                self.connection = await self._dial(offered, patience_s)
            self._judge_udp(self.connection)
            self._reached(self.connection)
            if not offered.done():
                offered.set_result(self.connection)
        except (LinkLost, TimeoutError) as error:
            lost = error if isinstance(error, LinkLost) else LinkLost(f"no answer within {RACE_LIMIT:g} s")
            self._failed(lost)
        finally:
            _fail(offered, lost)

    async def _dial(self, offered: asyncio.Future[Connection], patience_s: float) -> Connection:
        async def made(connection: Connection) -> None:
            self._tried = connection
            if connection.ticket_age_s is not None and not offered.done():
                self._spoken.clear()
                self.connection = connection
                offered.set_result(connection)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SPEAK_WITHIN):
                        await self._spoken.wait()

        self._tried = None
        quic = partial(reach, self._quic, self._address, made)
        grpc = partial(reach, self._grpc, self._address) if self._grpc else None
        return await race(None if grpc and self.udp_blocked else quic, grpc, patience_s)

    def _judge_udp(self, winner: Connection) -> None:
        """A network where gRPC won and no datagram came is without UDP: for 5 minutes, then twice as long, to a day."""
        if winner.transport == "quic":
            self._udp_blocked_s = 0.0
        elif self._tried is None or self._tried.facts().bytes_received == 0:
            self._block_udp()

    def _block_udp(self) -> None:
        if not self.udp_blocked:
            self._udp_blocked_s = min(max(UDP_BLOCKED_S, 2 * self._udp_blocked_s), UDP_BLOCKED_MOST_S)
            self._udp_blocked_until = self._clock() + self._udp_blocked_s


def _fail(offered: asyncio.Future[Connection], lost: LinkLost) -> None:
    if not offered.done():
        offered.set_exception(lost)
        offered.exception()  # there may be nobody left who waits for it
