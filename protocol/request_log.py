"""One line for every request: what it was, what it cost and why it ended; never a prompt, a token or a key."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http.client import responses

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.api_errors import ApiError
from protocol.errors import SessionFault, WireError
from protocol.limits import REQUEST_ID
from protocol.process import FIELDS

QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
STATE = "tally"


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request that has ended; times in milliseconds, bytes of frames or bodies, None where there was none.

    `request` is the id of a session on the wire, the same in the logs of the phone and of the cloud.
    """

    request: str
    route: str
    reason: str
    device: str | None = None
    peer: str | None = None
    transport: str | None = None
    attempt: int | None = None
    method: str | None = None  # over HTTP
    endpoint: str | None = None  # as the application writes it, never as a client does
    status: int | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    link_up: int | None = None  # bytes between phone and cloud, in the phone's log
    link_down: int | None = None
    early: bool | None = None
    queue_ms: float | None = None
    first_token_ms: float | None = None
    total_ms: float = 0.0


def log_request(log: logging.Logger, line: RequestLine) -> None:
    """Writes the line, in parts that the log's format puts together."""
    if log.isEnabledFor(logging.INFO):
        fields = {name: value for name, value in asdict(line).items() if value is not None}
        log.info("request", extra={FIELDS: fields})


def milliseconds(seconds: float) -> float:
    """As a line shows them."""
    return round(seconds * 1000, 1)


@dataclass(slots=True)
class Tally:
    """What one HTTP request comes to while it is served; whoever serves it writes down what only they know."""

    request: str = field(default_factory=lambda: os.urandom(REQUEST_ID).hex())
    device: str | None = None
    route: str = "http"
    transport: str | None = "http"
    method: str = ""
    endpoint: str | None = None
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    link_up: int | None = None
    link_down: int | None = None
    early: bool | None = None
    peer: str | None = None
    status: int = 500  # until an answer begins
    complete: bool = False  # its last byte has been handed over
    ending: Callable[[], None] | None = None  # fills in what is known at the end
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def made(self, tokens: int, finish: str | None) -> None:
        """A piece of the answer."""
        if self.first_s is None:
            self.first_s = time.monotonic() - self.began
        self.tokens_out += tokens
        self.reason = finish or self.reason

    def failed(self, error: BaseException) -> None:
        """What ended the answer, in a word."""
        match error:
            case SessionFault():
                self.reason = error.code.name.lower()
            case WireError():
                self.reason = "lost"
            case ApiError():
                self.reason = error.code or _phrase(error.status)
            case _:
                self.reason = "internal"

    def line(self) -> RequestLine:
        """The request, ended."""
        if self.ending is not None:
            self.ending()
        return RequestLine(
            request=self.request,
            route=self.route,
            reason=self._why(),
            device=self.device,
            peer=self.peer,
            transport=self.transport,
            method=self.method,
            endpoint=self.endpoint,
            status=self.status,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            link_up=self.link_up,
            link_down=self.link_down,
            early=self.early,
            first_token_ms=None if self.first_s is None else milliseconds(self.first_s),
            total_ms=milliseconds(time.monotonic() - self.began),
        )

    def _why(self) -> str:
        if self.status == 500:
            return "internal"
        if self.status == 499 or not self.complete:
            return "cancelled"
        if self.status >= 400:
            return self.reason or _phrase(self.status)
        return self.reason or "ok"


def _phrase(status: int) -> str:
    return responses.get(status, str(status)).lower().replace(" ", "_")


def tally_of(scope: Scope) -> Tally:
    """The request's tally; one that nobody reads where nothing is logged."""
    found = scope.get("state", {}).get(STATE)
    return found if isinstance(found, Tally) else Tally()


class RequestLog:
    """ASGI middleware: hands the line of every request to `ended`, and its id to the client as `x-request-id`."""

    def __init__(self, app: ASGIApp, ended: Callable[[RequestLine], None]):
        self._app, self._ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        method = scope["method"] if scope["method"] in METHODS else "other"
        tally = Tally(method=method, peer=f"{client[0]}:{client[1]}" if client else None)
        scope.setdefault("state", {})[STATE] = tally

        async def counted_receive() -> Message:
            message = await receive()
            tally.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                tally.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", tally.request.encode())]
            await send(message)
            tally.bytes_out += len(message.get("body", b""))
            tally.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            tally.endpoint = getattr(scope.get("route"), "path", None)
            self._ended(tally.line())
