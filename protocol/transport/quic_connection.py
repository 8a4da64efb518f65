"""aioquic's connection, mended: no early data is lost, and windows open only as frames are taken.

Relies on private names of aioquic 1.7; tests/protocol/test_quic_connection.py fails when one of them changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    MAX_STREAM_DATA_FRAME_CAPACITY,
    NetworkAddress,
    QuicConnectionError,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch, Group, SessionTicket, SessionTicketHandler

from protocol.limits import CONNECTION_BYTES, RECEIVE_BYTES
from protocol.transport.quic_bbr import NAME, RateControl
from protocol.transport.quic_moving import MovingConnection
from protocol.transport.quic_ranges import SearchedRanges
from protocol.transport.tickets import ServerTickets

ALPN = "tandem/1"
MAX_STREAMS = 128  # sessions that a client may have open
MAX_GAPS = 1024  # in what arrived of one stream; of full packets, every other one lost, RECEIVE_BYTES have 900
MAX_CRYPTO_GAPS = 128  # in a handshake: every frame costs a look at each of them
PROBE_S = 1.0  # or one timeout, where that is longer
MAX_CRYPTO = 64 << 10  # bytes of a peer's handshake; aioquic keeps what is not yet a message, up to 16 MB


def configuration(*, is_client: bool, idle_timeout: float) -> QuicConfiguration:
    """What both sides have in common."""
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        congestion_control_algorithm=NAME,
        idle_timeout=idle_timeout,
        max_stream_data=RECEIVE_BYTES,
        max_data=CONNECTION_BYTES,
    )


class Pacer(QuicPacketPacer):
    """Lets bytes leave at the rate of the control, which knows it at any time."""

    def __init__(self, control: RateControl, *, max_datagram_size: int):
        super().__init__(max_datagram_size=max_datagram_size)
        self._control = control
        self._credit = 0.0  # bytes that may leave now
        self._leaving = 0  # of packets being made, as if they were full
        self._at: float | None = None  # since a rate is known

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]  # as aioquic's does
        """None for at once."""
        rate = self._control.pacing_rate
        if rate is None:
            return None
        burst = self._control.burst
        self._credit = burst if self._at is None else min(self._credit + rate * (now - self._at), burst)
        self._at = now
        credit = self._credit - self._leaving
        return None if credit > 0 else now + (self._max_datagram_size - credit) / rate

    def update_after_send(self, now: float) -> None:
        self._leaving += self._max_datagram_size

    def sent(self, size: int) -> None:
        """So many bytes of packets are made. Acks do not wait, and make no debt."""
        self._credit = max(self._credit - size, -float(self._max_datagram_size))
        self._leaving = 0

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Asked for when needed."""


class MendedConnection(MovingConnection):
    """One end; only a client opens streams, and they are bidirectional."""

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes | None = None,
        retry_source_connection_id: bytes | None = None,
        session_ticket_handler: SessionTicketHandler | None = None,
        tickets: ServerTickets | None = None,
    ):
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
            session_ticket_fetcher=self._resume,
            session_ticket_handler=session_ticket_handler if tickets is None else tickets.add,
        )
        self._pacer = self._loss._pacer = Pacer(self.control, max_datagram_size=configuration.max_datagram_size)
        self._tickets = tickets
        self.ticket_age_s: float | None = None  # when this connection came with it
        self._hasty = 2  # probes that may come sooner than RFC 9002 has them
        self.bytes_sent = 0
        self.bytes_received = 0
        self.untaken = 0  # bytes that streams were given and nobody has taken
        for limit, streams in (
            (self._local_max_streams_bidi, 0 if configuration.is_client else MAX_STREAMS),
            (self._local_max_streams_uni, 0),
        ):
            limit.value = limit.sent = streams

    def _resume(self, label: bytes) -> SessionTicket | None:
        issued = None if self._tickets is None else self._tickets.take(label)
        if issued is None:
            return None
        self.ticket_age_s = time.monotonic() - issued.at
        return issued.ticket

    @property
    def control(self) -> RateControl:
        control = self._loss._cc
        assert isinstance(control, RateControl)
        return control

    @property
    def ending(self) -> ConnectionTerminated | None:
        """Why the connection ends: known a closing period earlier than the event of this type."""
        return self._close_event

    @property
    def begun(self) -> bool:
        """Whether a first packet could be read."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    @property
    def can_open(self) -> bool:
        """Whether the peer allows one more stream now."""
        return self._local_next_stream_id_bidi // 4 < self._remote_max_streams_bidi

    def unsent(self, stream_id: int) -> int:
        """Bytes written to a stream and never sent so far."""
        stream = self._streams.get(stream_id)
        return stream.sender._buffer_stop - stream.sender.highest_offset if stream else 0

    # bounded windows

    def taken(self, stream_id: int, total: int) -> bool:
        """So many bytes of the stream have been taken: opens its window behind them, in steps of a quarter.

        True when the peer should be told.
        """
        tell = self._widen()
        stream = self._streams.get(stream_id)
        if stream is None or total + RECEIVE_BYTES - stream.max_stream_data_local < RECEIVE_BYTES // 4:
            return tell
        stream.max_stream_data_local = total + RECEIVE_BYTES
        return True

    def _widen(self) -> bool:
        """Opens the connection's window behind all that has been taken, when half of it is used."""
        window = self._local_max_data
        if window.value - window.used > CONNECTION_BYTES // 2:
            return False
        held = self.untaken + sum(len(stream.receiver._buffer) for stream in self._streams.values())
        window.value = max(window.value, window.used - held + CONNECTION_BYTES)
        return window.value - window.sent >= CONNECTION_BYTES // 4

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        """aioquic's own doubles the window with what arrived, taken or not; it does not where nothing is used."""
        self._widen()
        window = self._local_max_data
        used, window.used = window.used, 0
        try:
            super()._write_connection_limits(builder=builder, space=space)
        finally:
            window.used = used

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        """aioquic's own doubles the window with what arrived, taken or not."""
        if stream.max_stream_data_local_sent == stream.max_stream_data_local or stream.receiver.is_finished:
            return
        buffer = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        assert stream.stream_id is not None
        buffer.push_uint_var(stream.stream_id)
        buffer.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local

    # bounded gaps

    def _handle_stream_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        start = buf.tell()
        stream_id = buf.pull_uint_var()
        buf.seek(start)
        super()._handle_stream_frame(context, frame_type, buf)
        if stream := self._streams.get(stream_id):
            if not isinstance(stream.receiver._ranges, SearchedRanges):
                stream.receiver._ranges = SearchedRanges(stream.receiver._ranges)
            self._check_gaps(stream, frame_type, MAX_GAPS)

    def _check_gaps(self, stream: QuicStream, frame_type: int, most: int) -> None:
        if len(stream.receiver._ranges) > most:
            reason = f"more than {most} gaps in a stream"
            raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, frame_type, reason)

    # early data

    def _initialize(self, peer_cid: bytes) -> None:
        """A phone offers one key share, which our servers take: the others cost half a millisecond and 236 bytes."""
        super()._initialize(peer_cid)
        if self._is_client:
            self.tls._supported_groups = [Group.X25519]

    def _connect(self, now: float) -> None:
        """Starts over after a Retry too; aioquic would forget what the first flight carried."""
        for space in self._spaces.values():
            self._send_again(space, space.sent_packets.values(), now)
        super()._connect(now=now)

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        start = buf.tell()
        if buf.pull_uint_var() + buf.pull_uint_var() > MAX_CRYPTO:
            reason = f"a handshake of more than {MAX_CRYPTO} bytes"
            raise QuicConnectionError(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, reason)
        buf.seek(start)
        super()._handle_crypto_frame(context, frame_type, buf)
        self._check_gaps(self._crypto_streams[context.epoch], frame_type, MAX_CRYPTO_GAPS)
        if self._is_client and self._handshake_complete and not self.tls.early_data_accepted:
            space = self._spaces[Epoch.ONE_RTT]
            refused = [sent for sent in space.sent_packets.values() if sent.packet_type is QuicPacketType.ZERO_RTT]
            self._send_again(space, refused, context.time)

    def _send_again(self, space: QuicPacketSpace, packets: Iterable[QuicSentPacket], now: float) -> None:
        """Queues what the packets carried; that they never arrived is no sign of congestion."""
        self._loss._on_packets_lost(congestion_event=False, now=now, packets=tuple(packets), space=space)

    # probes

    def handle_timer(self, now: float) -> None:
        """Two probes of a handshake come no more than PROBE_S after the one before, where that would be too late.

        A phone gives up after 3 s, and its network may be dark for two of them. More could drown a busy server.
        """
        super().handle_timer(now)
        most = max(0, int(PROBE_S / self._loss.get_probe_timeout()).bit_length() - 1)
        if self._hasty and not self._handshake_confirmed and self._loss._pto_count > most:
            self._hasty -= 1
            self._loss._pto_count = most

    # measuring

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        path = self._network_paths[0]
        room = None if path.is_validated else 3 * path.bytes_received - path.bytes_sent
        for space in self._loss.spaces:
            if space.ack_at == now:  # aioquic would let the pacer hold it back, and come again at once
                space.ack_at -= 1e-6
        datagrams = super().datagrams_to_send(now=now)
        if room is not None:
            datagrams = _within(room, datagrams)  # aioquic's farewell goes beyond three times what came
        size = sum(len(data) for data, _ in datagrams)
        self.bytes_sent += size
        self._pacer.sent(size)
        if self._pacing_at is not None:  # as if all packets had been full
            self._pacing_at = self._pacer.next_send_time(now) or now
        if not any(_can_go_on(stream) for stream in self._streams.values()):
            self.control.on_nothing_left()
        return datagrams

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        self.bytes_received += len(data)
        super().receive_datagram(data, addr, now)

    def _on_other_network(self) -> None:
        self.control.restart()


def _can_go_on(stream: QuicStream) -> bool:
    """Whether it has something to send that its peer's window allows."""
    return not stream.sender.buffer_is_empty and stream.sender.next_offset < stream.max_stream_data_remote


def _within(room: int, datagrams: list[tuple[bytes, NetworkAddress]]) -> list[tuple[bytes, NetworkAddress]]:
    """Those that fit; the others count as lost on the way."""
    kept = []
    for data, addr in datagrams:
        room -= len(data)
        if room >= 0:
            kept.append((data, addr))
    return kept
