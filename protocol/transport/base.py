"""What every transport offers: a connection to one replica, and channels on it, one a session."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from protocol.errors import WireError
from protocol.frames import ClientFrame, ServerFrame

log = logging.getLogger(__name__)

GRACE = 1.0  # seconds that a session has to notice that its connection is closed


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens; QUIC (UDP) and gRPC (TCP) share the port number."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `HOST:PORT` or `[V6]:PORT`. Raises ValueError that names the text."""
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text)
        if not match or not 0 < int(match[3]) < 65536:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(match[1] or match[2], int(match[3]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What a connection has measured; times in seconds, rates in bytes/s, None before the first sample."""

    rtt_s: float | None = None
    min_rtt_s: float | None = None
    delivery_rate: float | None = None  # of what this side sends, from samples that were not application-limited
    bytes_sent: int = 0
    bytes_received: int = 0
    resumed: bool = False  # the handshake used a ticket
    early_accepted: bool = False  # and what was sent before its end was taken


@dataclass(frozen=True, slots=True)
class Way:
    """The address that the kernel sends from, to one peer."""

    family: int
    there: Any  # a socket address
    here: str

    @classmethod
    def of(cls, sock: socket.socket) -> Way:
        """Of a connected socket."""
        return cls(sock.family, sock.getpeername(), str(sock.getsockname()[0]))

    @classmethod
    def now(cls, family: int, there: Any) -> Way | None:
        """As a socket made now would have it, None where there is no route. Nothing is sent."""
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect(there)
                return cls.of(sock)
        except OSError:
            return None

    def gone(self) -> bool:
        """Whether the kernel would choose another address now; False where it has none."""
        now = self.now(self.family, self.there)
        return now is not None and now.here != self.here


class ClientChannel(Protocol):
    """One session's ordered two-way pipe of frames, seen from the phone."""

    bytes_up: int  # of frames, lengths included
    bytes_down: int

    async def send(self, frame: ClientFrame) -> None:
        """Queues one frame; waits while too much is unsent. Raises LinkLost."""

    async def receive(self) -> ServerFrame:
        """The next frame. Raises LinkLost when the peer ended or is gone, BadFrame for bytes that are no frame."""

    async def aclose(self) -> None:
        """Ends both directions at once; the server sees its session gone. Never raises, may be called twice."""


class ServerChannel(Protocol):
    """The same pipe, seen from the cloud."""

    transport: str  # "quic", "grpc" or "memory"
    peer: str  # for logs: HOST:PORT
    early: bool  # the first frame was read before the handshake was complete; known once it has been received
    ticket_age_s: float | None  # by the server's clock, of the ticket this connection came with
    bytes_up: int  # of frames, lengths included
    bytes_down: int

    async def handshake(self) -> None:
        """Waits until the handshake is complete. Raises LinkLost."""

    def silent_s(self) -> float:
        """Seconds since the peer's last datagram (0 where the transport itself finds silent peers)."""

    def delivery_rate(self) -> float:
        """Measured bytes/s towards the phone, 0 before the first sample."""

    def rtt_s(self) -> float | None:
        """Smoothed round trip, None where the transport measures none."""

    async def send(self, frame: ServerFrame) -> None:
        """Queues one frame; waits while too much is unsent. Raises LinkLost."""

    async def receive(self) -> ClientFrame:
        """The next frame. Raises LinkLost when the peer ended or is gone, BadFrame for bytes that are no frame."""

    async def aclose(self) -> None:
        """Ends the session after what was sent has gone out. Never raises, may be called twice."""


class Connection(Protocol):
    """A phone's path to one replica; carries many sessions."""

    transport: str
    address: Address

    @property
    def closed(self) -> bool:
        """True once the connection can carry nothing more."""

    @property
    def ticket_age_s(self) -> float | None:
        """By the phone's clock, of the ticket in use while the handshake is not complete; else None."""

    def facts(self) -> LinkFacts:
        """What has been measured so far."""

    async def open(self) -> ClientChannel:
        """A new session's channel. Raises LinkLost."""

    async def handshake(self) -> None:
        """Waits until the handshake is complete. Raises LinkLost, or UnverifiedServer."""

    def silent_s(self) -> float:
        """Seconds since the peer's latest sign of life, a datagram or a message; inf where only frames are seen."""

    def displaced(self) -> bool:
        """Whether the kernel would now send from another address than this connection does; False with no route."""

    async def move(self) -> bool:
        """Goes on from a new socket, which the kernel binds, and asks from there for a sign of life at once.

        Streams live on. False where nothing changed: no route now, no complete handshake, or a transport that cannot.
        """

    async def aclose(self) -> None:
        """Ends the connection and every channel on it. Never raises, may be called twice."""


class Listener(Protocol):
    """A listening transport of a server."""

    address: Address  # with the port that was really bound

    async def aclose(self) -> None:
        """Stops listening and ends every connection; handlers see LinkLost, and have ended when this returns."""


Handler = Callable[[ServerChannel], Awaitable[None]]  # one call per session; the channel is closed when it returns


async def run_session(handler: Handler, channel: ServerChannel) -> None:
    """Runs one session to its end and closes its channel; a session that the peer or the network ended is no error."""
    try:
        await handler(channel)
    except WireError as error:
        log.info("session of %s over %s ended: %s", channel.peer, channel.transport, error)
    finally:
        await channel.aclose()


async def end_sessions(tasks: set[asyncio.Task[None]]) -> None:
    """Waits GRACE for sessions whose channels are closed, then cancels what is left; all have ended when it returns."""
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE)
    finally:
        late = list(tasks)
        for task in late:
            task.cancel()
    await asyncio.gather(*late, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of the server: the certificate with its chain, and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Trust:
    """What the phone accepts of a server: certificates under `ca` (PEM), made out to `server_name` (or the host)."""

    ca: bytes
    server_name: str | None = None
