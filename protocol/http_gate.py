"""What every HTTP request passes before the application: who may ask, and bounds on the body's size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.api_errors import ApiError
from protocol.limits import HttpLimits
from protocol.prefixes import Pace, prefix

LINGER_S = 2.0  # how long a body that nobody wants is still taken in
LINGER = 8  # times the bound: how much of it
REFUSED = frozenset({401, 403, 408, 413})  # answers that cost a stranger nothing to get

Check = Callable[[HTTPConnection], None]  # raises ApiError for a request that may not pass


def bearer(http: HTTPConnection) -> str:
    """What a request shows as its bearer token; empty where there is none."""
    scheme, _, token = http.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


class Guard:
    """Asks `check` before anything of the body is read."""

    def __init__(self, app: ASGIApp, check: Check):
        self._app, self._check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(HTTPConnection(scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Slowed:
    """Refusals wait when their prefix gets many of them, and with them what is next on the connection."""

    def __init__(self, app: ASGIApp, pace: Pace):
        self._app, self._pace = app, pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slowly(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in REFUSED:
                await asyncio.sleep(self._pace.wait_s(prefix(scope["client"][0]) if scope["client"] else ""))
            await send(message)

        await self._app(scope, receive, slowly if scope["type"] == "http" else send)


class Bounded:
    """Ends a body that is too large with 413 and one that is too slow with 408, holding no more of it."""

    def __init__(self, app: ASGIApp, limits: HttpLimits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(Headers(scope=scope), receive, send, self._limits)
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, headers: Headers, receive: Receive, send: Send, limits: HttpLimits):
        self._receive, self._send, self._limits = receive, send, limits
        self._declared = int(headers.get("content-length", "0"))  # digits only: the HTTP parser refuses others
        self._whole = not self._declared and "transfer-encoding" not in headers  # nothing of the body is outstanding
        self._size = 0
        self._deadline = asyncio.get_running_loop().time() + limits.body_s

    async def receive(self) -> Message:
        """Raises ApiError 413 or 408."""
        if self._whole:
            return await self._receive()
        limit = self._limits
        if self._declared > limit.body:
            raise ApiError(413, f"a body of {self._declared} bytes, limit {limit.body}", code="body_too_large")
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._take()
        except TimeoutError:
            words = f"the body was not complete after {limit.body_s:g} s, {self._size} bytes had come"
            raise ApiError(408, words, code="body_too_slow") from None
        if self._size > limit.body:
            raise ApiError(413, f"a body of more than {limit.body} bytes, which is the limit", code="body_too_large")
        return message

    async def _take(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)  # or the client is gone
        return message

    async def send(self, message: Message) -> None:
        """An answer that comes before the whole body is the connection's last."""
        if self._whole:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._send({**message, "headers": [*message["headers"], (b"connection", b"close")]})
        elif message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body"})

    async def _linger(self) -> None:
        """Closing on unread bytes would reset the connection, and many clients read an answer only after their body."""
        most = LINGER * self._limits.body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._whole and self._size < most:
                    await self._take()
