"""What both ends of a QUIC connection share: its state, and its streams of frames."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.connection import NetworkAddress
from aioquic.quic.events import HandshakeCompleted, QuicEvent, StopSendingReceived, StreamDataReceived, StreamReset
from aioquic.quic.packet import QuicErrorCode

from protocol.errors import BadFrame, LinkLost
from protocol.limits import MAX_FRAME, MAX_MESSAGE, STALLED
from protocol.transport.quic_connection import MendedConnection

HEADER = 4  # bytes of a frame's length, big-endian
SEND_BUFFER = 1 << 20  # bytes of one stream that wait to be sent
LONG_HEADER = 0x80  # a bit of the first byte; packets with a short one need the handshake's keys
AHEAD, AHEAD_BYTES = 16, 1500  # datagrams that came before the end of the handshake, and of each


class Link(QuicConnectionProtocol):
    """One end of a connection."""

    _quic: MendedConnection
    hurries = False  # shows aioquic such packets all the same, which make a client ask for the rest at once

    def __init__(self, quic: MendedConnection):
        super().__init__(quic)
        self.streams: dict[int, Stream] = {}
        self.lost: LinkLost | None = None
        self.handshaken: HandshakeCompleted | None = None
        quic.heard_at = self._loop.time()
        self._changed = asyncio.Event()
        self._ahead: list[tuple[bytes, NetworkAddress]] = []

    @property
    def quic(self) -> MendedConnection:
        return self._quic

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds. Raises LinkLost when the connection ends before."""
        while not self.lost and not condition():
            self._changed.clear()
            await self._changed.wait()
        if self.lost:
            raise self.lost.with_traceback(None)

    async def handshake(self) -> None:
        await self.until(lambda: self.handshaken)

    def flush_soon(self) -> None:
        """Sends what is queued at the end of this turn of the loop, together with what else is queued until then."""
        if not self.lost:
            self._transmit_soon()

    def transmit(self) -> None:
        """Also the place where a change is noticed: aioquic calls it after every datagram and timer."""
        if self._transport is None or self._transport.is_closing():
            return
        super().transmit()
        if self._quic.ending and not self.lost:
            self.lose(self.why())
        self._changed.set()
        for stream in self.streams.values():
            stream.on_sent()

    def why(self) -> LinkLost:
        """The connection's end, in words; those of the peer are not trusted with our logs."""
        ending = self._quic.ending
        assert ending is not None
        reason = "".join(letter if letter.isprintable() else "?" for letter in ending.reason_phrase[:MAX_MESSAGE])
        return LinkLost(reason or f"the connection was closed, code {ending.error_code}")

    def lose(self, error: LinkLost) -> None:
        """Ends every stream; frames that have arrived can still be taken."""
        self.lost = error
        for stream in self.streams.values():
            stream.fail(error)
        self._changed.set()

    def shut(self, reason: str) -> None:
        """Closes at once, without waiting for the peer to agree."""
        if not self.lost:
            self._quic.close(error_code=QuicErrorCode.NO_ERROR, reason_phrase=reason)
            if self._quic.bytes_sent or self._quic.bytes_received:
                self.transmit()
            if not self.lost:
                self.lose(LinkLost(reason))

    def disarm(self) -> None:
        """Stops the timers; to be called last."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        """Keeps what overtook the end of the handshake, or came instead: aioquic drops what it has no keys for."""
        assert isinstance(data, bytes)
        if not self.handshaken and data and not data[0] & LONG_HEADER:
            if len(self._ahead) < AHEAD and len(data) <= AHEAD_BYTES:
                self._ahead.append((data, addr))
            if not self.hurries:
                return
        super().datagram_received(data, addr)
        while self.handshaken and self._ahead:
            super().datagram_received(*self._ahead.pop(0))

    def quic_event_received(self, event: QuicEvent) -> None:
        match event:
            case HandshakeCompleted():
                self.handshaken = event
            case StreamDataReceived(data=data, end_stream=end, stream_id=stream_id):
                if stream := self.stream(stream_id):
                    stream.feed(data, end)
            case StreamReset(stream_id=stream_id):
                if stream := self.streams.get(stream_id):
                    stream.on_reset()
                else:
                    self._quic.reset_stream(stream_id, QuicErrorCode.NO_ERROR)
            case StopSendingReceived(stream_id=stream_id):
                if stream := self.streams.get(stream_id):
                    stream.stop_sending(LinkLost("the peer ended the session"))

    def stream(self, stream_id: int) -> Stream | None:
        """The stream that data arrived for; None to drop it."""
        return self.streams.get(stream_id)


class Stream:
    """One session's two directions; frames are cut from the bytes as they are taken."""

    def __init__(self, link: Link, stream_id: int):
        self._link, self._id = link, stream_id
        self._received = bytearray()
        self._taken = 0
        self._closed = False  # by this side
        self._peer_done = False  # nothing else arrives
        self._no_more: LinkLost | None = None  # why nothing else can be taken
        self._stopped: LinkLost | None = None  # why nothing can be sent
        self._full = False  # somebody waits to send
        self._changed = asyncio.Event()
        link.streams[stream_id] = self

    # the network's side

    def feed(self, data: bytes, end: bool) -> None:
        if not self._closed:
            self._received += data
            self._link.quic.untaken += len(data)
        if end:
            self._no_more = self._no_more or LinkLost("the peer ended the session")
            self._peer_ended()
        self._changed.set()

    def on_reset(self) -> None:
        self._forget()
        self.fail(LinkLost("the peer ended the session"))
        self._peer_ended()

    def _forget(self) -> None:
        """Drops what nobody has taken."""
        self._link.quic.untaken -= len(self._received)
        self._received.clear()

    def _peer_ended(self) -> None:
        self._peer_done = True
        if self._closed:
            self._link.streams.pop(self._id, None)

    def stop_sending(self, error: LinkLost) -> None:
        self._stopped = self._stopped or error
        self._changed.set()

    def fail(self, error: LinkLost) -> None:
        self._no_more = self._no_more or error
        self.stop_sending(error)

    def on_sent(self) -> None:
        if self._full and self._link.quic.unsent(self._id) <= SEND_BUFFER:
            self._full = False
            self._changed.set()

    # the session's side

    async def take(self) -> bytes:
        """The next frame's bytes, without the length. Raises LinkLost, or BadFrame for a length over the limit."""
        while (frame := self._cut()) is None:
            if self._no_more:
                raise self._no_more.with_traceback(None)
            self._changed.clear()
            await self._changed.wait()
        return frame

    def _cut(self) -> bytes | None:
        if len(self._received) < HEADER:
            return None
        size = int.from_bytes(self._received[:HEADER], "big")
        if size > MAX_FRAME:
            raise BadFrame(f"frame of {size} bytes, limit {MAX_FRAME}")
        if len(self._received) < HEADER + size:
            return None
        frame = bytes(self._received[HEADER : HEADER + size])
        del self._received[: HEADER + size]
        self._taken += HEADER + size
        self._link.quic.untaken -= HEADER + size
        if self._link.quic.taken(self._id, self._taken):
            self._link.flush_soon()
        return frame

    async def put(self, frame: bytes) -> None:
        """Queues a frame behind its length; waits while SEND_BUFFER bytes are unsent. Raises LinkLost."""
        await self._room()
        if self._stopped:
            raise self._stopped.with_traceback(None)
        self._link.quic.send_stream_data(self._id, len(frame).to_bytes(HEADER, "big") + frame)
        self._link.flush_soon()

    async def _room(self) -> None:
        loop, quic = asyncio.get_running_loop(), self._link.quic
        left, since = 0, loop.time()
        while not self._stopped and (unsent := quic.unsent(self._id)) > SEND_BUFFER:
            if unsent != left:
                left, since = unsent, loop.time()
            elif loop.time() >= since + STALLED:
                raise LinkLost(f"the peer took nothing for {STALLED:g} s")
            self._full = True
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(since + STALLED):
                    await self._changed.wait()

    def close(self, *, abort: bool) -> None:
        """Ends both directions: behind what was sent, or at once with `abort`."""
        if self._closed:
            return
        self._closed = True
        self._forget()
        if not self._link.lost:
            if abort:
                self._link.quic.reset_stream(self._id, QuicErrorCode.NO_ERROR)
            elif not self._stopped:
                self._link.quic.send_stream_data(self._id, b"", end_stream=True)
            if not self._peer_done:
                self._link.quic.stop_stream(self._id, QuicErrorCode.NO_ERROR)
            self._link.flush_soon()
        self.fail(LinkLost("the session is closed"))
        if self._peer_done or abort:  # else its late bytes would look like a new session
            self._link.streams.pop(self._id, None)
