"""Reaching a replica: QUIC first, gRPC over TLS where that does not answer soon; and the connection that was made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from edge_agent.networks import Toward, UdpMemory
from protocol.errors import LinkLost, UnverifiedServer
from protocol.limits import PING_AFTER
from protocol.transport.base import Address, Connection

Connect = Callable[[Address], Awaitable[Connection]]
Dial = Callable[[], Awaitable[Connection]]
SPEAK_WITHIN = 1.0  # seconds a handshake waits for the frame that it could take along
RACE_LIMIT = 10.0  # seconds for both transports


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
        self._reached, self._failed = reached, failed
        self.udp, self.network = UdpMemory(clock), ""
        self.toward: Toward | None = None  # None: all networks are the same
        self._tried: Connection | None = None  # over QUIC, in this race
        self._race: asyncio.Task[None] | None = None
        self._offered: asyncio.Future[Connection] | None = None
        self._spoken = asyncio.Event()
        self._beside: asyncio.Task[Connection] | None = None
        self._doubt: asyncio.Task[None] | None = None

    @property
    def warm(self) -> bool:
        """A connection is open, its handshake complete."""
        return self._open() and (self._race is None or self._race.done())

    @property
    def udp_blocked(self) -> bool:
        return self.udp.blocked(self.network)

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

    async def another(self, than: Connection, patience_s: float, limit_s: float) -> Connection:
        """A connection beside one that is in doubt: gRPC beside QUIC, else a new race. Raises LinkLost."""
        if than.transport == "quic":
            return await self.connect_grpc(limit_s)
        if than is self.connection:
            self.connection, before = None, self.second
            self.second = than
            if before is not None:
                await before.aclose()
        return await self.connect(patience_s)

    def keep(self, connection: Connection) -> None:
        """A connection that was set aside is as good as any, if there is no other."""
        if connection is self.second and not self._open():
            self.connection, self.second = connection, None

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

    def doubt_udp(self) -> None:
        """gRPC answers where QUIC has gone silent: new sessions take gRPC, and the silence is watched a little longer.

        A path that was only interrupted says so meanwhile, and is taken again; else the network counts as without UDP.
        """
        quic, grpc = self.connection, self.second
        if quic is None or grpc is None or grpc.closed or (quic.transport, grpc.transport) != ("quic", "grpc"):
            return
        self.connection, self.second = grpc, quic
        if self._doubt is None or self._doubt.done():
            self._doubt = asyncio.create_task(self._judge_silence(quic))

    async def _judge_silence(self, quic: Connection) -> None:
        await self.look()
        network, watched = self.network, 2 * PING_AFTER + 2 * (quic.facts().rtt_s or 0.0)
        await quic.move()  # asks for a sign of life once more
        await asyncio.sleep(watched)
        if self.second is not quic:
            return
        if quic.silent_s() < watched:
            self.connection, self.second = quic, self.connection
        else:
            self.second = None
            self.udp.block(network)
            await quic.aclose()

    async def look(self) -> bool:
        """Finds out which network leads to the replica; True when it is another one than before."""
        before = self.network
        if self.toward is not None:
            self.network = await self.toward.name()
        return self.network != before

    async def follow(self) -> bool:
        """The machine's addresses or routes have changed: connections go on from where the kernel now sends.

        One that cannot is closed, and a race that began on another network is given up. True when it is another one.
        """
        other = await self.look()
        if other and self._race is not None and not self._race.done() and self.connection is None:
            await self._end_race()
        for connection in (self.connection, self.second):
            if connection is not None and not connection.closed and connection.displaced():
                hopeless = connection.transport == "quic" and self.udp_blocked and self._grpc is not None
                if hopeless or (not await connection.move() and connection.displaced()):
                    await self.drop(connection)
        return other

    async def settled(self) -> None:
        """Waits for the race that is under way, if there is one."""
        if self._race is not None:
            await asyncio.wait({self._race})

    def spoke(self) -> None:
        """A session's first frame is queued: a handshake that waits to take it along may begin."""
        self._spoken.set()

    async def drop(self, connection: Connection) -> None:
        """Closes a connection, and the race that it may be in, unless another has taken its place."""
        race, current = self._race, self.connection
        self.connection = None if connection is current else current
        self.second = None if connection is self.second else self.second
        await connection.aclose()
        if connection is current and race is self._race:  # sessions that lost it may have begun another
            await self._end_race()

    async def aclose(self) -> None:
        await self._end_race()
        for task in filter(None, (self._beside, self._doubt)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for connection in (self.connection, self.second):
            if connection is not None:
                await connection.aclose()
        self.connection = self.second = None

    def _open(self) -> bool:
        return self.connection is not None and not self.connection.closed

    async def _end_race(self) -> None:
        race, offered = self._race, self._offered  # another may begin meanwhile
        if race is not None:
            race.cancel()
            await asyncio.gather(race, return_exceptions=True)
        if offered is not None:  # a race that was cancelled before its first step has not said so
            _fail(offered, LinkLost("the attempt to reach the replica was given up"))

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
        await self.look()
        quic = partial(reach, self._quic, self._address, made)
        grpc = partial(reach, self._grpc, self._address) if self._grpc else None
        return await race(None if grpc and self.udp_blocked else quic, grpc, patience_s)

    def _judge_udp(self, winner: Connection) -> None:
        """A network where gRPC won and no datagram came is without UDP."""
        if winner.transport == "quic":
            self.udp.passes(self.network)
        elif self._tried is None or self._tried.facts().bytes_received == 0:
            self.udp.block(self.network)


def _fail(offered: asyncio.Future[Connection], lost: LinkLost) -> None:
    if not offered.done():
        offered.set_exception(lost)
        offered.exception()  # there may be nobody left who waits for it
