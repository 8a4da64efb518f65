"""Reaching a replica: QUIC first, gRPC over TLS where that does not answer soon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from protocol.errors import LinkLost, UnverifiedServer
from protocol.transport.base import Address, Connection

Connect = Callable[[Address], Awaitable[Connection]]
Dial = Callable[[], Awaitable[Connection]]


async def reach(
    connect: Connect, address: Address, early: Callable[[Connection], Awaitable[None]] | None = None
) -> Connection:
    """A connection whose handshake is complete. `early` is given one that can take a session before that, and returns
    when the handshake, which takes along what was sent until then, may begin. Raises LinkLost.
    """
    connection = await connect(address)
    try:
        if early is not None and connection.ticket_age_s is not None:
            await early(connection)
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
        await _give_up([dial for dial in dials if dial is not winner])
    if winner is None:
        raise errors[0] if errors else LinkLost("there is no way to dial")
    return winner.result()


async def _give_up(dials: list[asyncio.Future[Connection]]) -> None:
    for dial in dials:
        dial.cancel()
    for result in await asyncio.gather(*dials, return_exceptions=True):
        if not isinstance(result, BaseException):
            await result.aclose()
