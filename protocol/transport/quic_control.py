"""Congestion control that measures: cubic, with the delivery rate and the round trip it sees."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

NAME = "measured-cubic"
WINDOW_RTTS = 10  # how far back the best delivery rate is looked for, in round trips of an empty path
WINDOW_MIN = 1.0  # and in seconds, at least


@dataclass(frozen=True, slots=True)
class Departure:
    """The state of the flow when one packet left."""

    delivered: int
    delivered_at: float
    first_sent_at: float
    limited: bool


class MeasuredCubic(CubicCongestionControl):
    """Delivery rate as in draft-cheng-iccrg-delivery-rate-estimation-02: samples of a flow that had too little to send
    are left out, and the best of a short window counts. Seconds and bytes/s."""

    def __init__(self, *, max_datagram_size: int):
        super().__init__(max_datagram_size=max_datagram_size)
        self.rtt_s: float | None = None  # smoothed as in RFC 9002, 5.3
        self.min_rtt_s: float | None = None
        self._delivered = 0
        self._delivered_at = 0.0
        self._first_sent_at = 0.0
        self._limited_until = 0  # samples that begin before so many bytes were delivered are left out
        self._departures: dict[int, Departure] = {}
        self._rates: deque[tuple[float, float]] = deque()  # (time, rate), rates falling

    @property
    def delivery_rate(self) -> float | None:
        """None before the first sample."""
        return self._rates[0][1] if self._rates else None

    def on_nothing_left(self) -> None:
        """To be called when all that was queued has been sent: what leaves next says nothing about the path."""
        self._limited_until = self._delivered + self.bytes_in_flight

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        if not self.bytes_in_flight:
            self._first_sent_at = self._delivered_at = packet.sent_time or 0.0
        limited = self._delivered <= self._limited_until
        self._departures[packet.packet_number] = Departure(
            self._delivered, self._delivered_at, self._first_sent_at, limited
        )
        super().on_packet_sent(packet=packet)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        super().on_packet_acked(now=now, packet=packet)
        self._delivered += packet.sent_bytes
        self._delivered_at = now
        left = self._departures.pop(packet.packet_number, None)
        if left is None:
            return
        sent_at = packet.sent_time or 0.0
        took = max(sent_at - left.first_sent_at, now - left.delivered_at)
        self._first_sent_at = sent_at
        if not left.limited and took > 0 and took >= (self.min_rtt_s or 0.0):
            self._add_rate(now, (self._delivered - left.delivered) / took)

    def _add_rate(self, now: float, rate: float) -> None:
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        self._rates.append((now, rate))
        while self._rates[0][0] < now - max(WINDOW_MIN, WINDOW_RTTS * (self.min_rtt_s or 0.0)):
            self._rates.popleft()

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        gone = list(packets)
        super().on_packets_expired(packets=gone)
        self._forget(gone)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        gone = list(packets)
        super().on_packets_lost(now=now, packets=gone)
        self._forget(gone)

    def _forget(self, packets: list[QuicSentPacket]) -> None:
        for packet in packets:
            self._departures.pop(packet.packet_number, None)

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        super().on_rtt_measurement(now=now, rtt=rtt)
        self.rtt_s = rtt if self.rtt_s is None else 7 / 8 * self.rtt_s + 1 / 8 * rtt
        self.min_rtt_s = rtt if self.min_rtt_s is None else min(self.min_rtt_s, rtt)


register_congestion_control(NAME, MeasuredCubic)
