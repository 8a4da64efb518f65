"""TCP and Unix connections of an HTTP server: how many, for how long, and what each may make us keep."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from protocol.api_errors import ApiError
from protocol.limits import HttpLimits

log = logging.getLogger(__name__)
SEND_BUFFER = 32 << 10  # bytes that the kernel keeps for a client that does not read
WRITE_BUFFER = 32 << 10  # and that we keep; half a megabyte by default where there is TLS
BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
)
SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # s, s: a host that vanished is noticed in 25 s


class Http(H11Protocol):
    """uvicorn's HTTP/1.1, which has no bound on the time of a request's head, nor on that of a client's reading."""

    def __init__(self, server: uvicorn.Server, limits: HttpLimits):
        super().__init__(server.config, server.server_state, {})
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self.gone = asyncio.Event()

    @property
    def answering(self) -> bool:
        """A whole request came, and its answer is under way."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def abort(self) -> None:
        """Closes at once, whatever was not sent."""
        if self.transport is not None and not self.gone.is_set():  # TLS of Python 3.11.2 fails the second time
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self._limits.head_s, self.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None and not self.transport.is_closing():
            self._reader.cancel()
            self._reader = None

    def _await_reader(self) -> None:
        if self._reader is None:
            self._reader = self.loop.call_later(self._limits.write_s, self.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.flow.pause_reading()  # TLS would read on until the other side has said goodbye too
            self._await_reader()
        elif self.conn.trailing_data[0]:  # the next request has begun
            self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP request gets an error object too."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = bytes(ApiError(400, msg, code="invalid_http").response().body)
            self.transport.write(BAD_REQUEST % len(body) + body)
        self.transport.close()
        self._await_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()
        self.gone.set()


class Connections:
    """Lets connections in, at most so many at once: one that is not being answered makes room for a new one.

    The longest there goes first, so that whoever opens thousands and asks nothing keeps nobody else out.
    """

    def __init__(self, server: uvicorn.Server, listener: socket.socket, limits: HttpLimits):
        self._server, self._listener, self._limits = server, listener, limits
        listener.setblocking(False)
        self._open: dict[asyncio.Task[None], Http] = {}  # oldest first

    async def accept(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._admit((await loop.sock_accept(self._listener))[0])
            except OSError as error:  # out of file descriptors, or a client that left at once
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
            await asyncio.sleep(0)  # accepting does not wait while there is a next one

    async def aclose(self) -> None:
        """Closes every connection at once."""
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _admit(self, connection: socket.socket) -> None:
        if not self._has_room():
            connection.close()
            return
        protocol = Http(self._server, self._limits)
        task = asyncio.create_task(self._serve(protocol, connection))
        self._open[task] = protocol
        task.add_done_callback(partial(self._left, connection))

    def _left(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        if self._open.pop(task).transport is None:  # nobody else closes it
            connection.close()

    def _has_room(self) -> bool:
        staying = [task for task in self._open if not task.cancelling()]
        if len(staying) < self._limits.connections:
            return True
        idle = next((task for task in staying if not self._open[task].answering), None)
        return idle is not None and idle.cancel()

    async def _serve(self, protocol: Http, connection: socket.socket) -> None:
        try:
            _tune(connection)
            tls, limit = self._server.config.ssl, self._limits.head_s
            async with asyncio.timeout(limit):
                await _spoken_to(connection)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, connection, ssl=tls, ssl_handshake_timeout=limit if tls else None
            )
            await protocol.gone.wait()
        except OSError as error:
            log.debug("a connection ended before its first request: %s", error)
        finally:
            protocol.abort()


async def _spoken_to(connection: socket.socket) -> None:
    """Until the first byte is there: a silent client costs a socket, where TLS would set aside 256 KiB."""
    loop, spoken = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, spoken.set)
    try:
        await spoken.wait()
    finally:
        loop.remove_reader(connection)


def _tune(connection: socket.socket) -> None:
    """Bounds what the kernel keeps for a client, and how long one that vanished goes unnoticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENCE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
