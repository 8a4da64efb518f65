"""What a flow can tell of its path: the delivery rate, and the round trip."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aioquic.quic.congestion.base import QuicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket

WINDOW_RTTS = 10  # how far back the best delivery rate is looked for, in round trips of an empty path
WINDOW_MIN = 1.0  # and in seconds, at least


class Peak:
    """The greatest of the values added since some time."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque()  # (time, value), values falling

    def __call__(self) -> float | None:
        """None before the first value; the last one stays, however old."""
        return self._values[0][1] if self._values else None

    def add(self, now: float, value: float, since: float) -> None:
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < since:
            self._values.popleft()


@dataclass(frozen=True, slots=True)
class Departure:
    """The state of the flow when one packet left."""

    delivered: int
    delivered_at: float
    first_sent_at: float
    limited: bool


class MeasuringControl(QuicCongestionControl):
    """The base of a control: keeps the books, with delivery rates as in draft-cheng-iccrg-delivery-rate-estimation-02.

    Seconds and bytes/s. The window is for others to decide.
    """

    def __init__(self, *, max_datagram_size: int):
        super().__init__(max_datagram_size=max_datagram_size)
        self.rtt_s: float | None = None  # smoothed as in RFC 9002, 5.3
        self.min_rtt_s: float | None = None
        self._active_s = 0.0  # the time by which samples age: it stands still while nothing arrives
        self._delivered = 0
        self._delivered_at = 0.0
        self._first_sent_at = 0.0
        self._limited_until = 0  # samples that begin before so many bytes were delivered say little of the path
        self._departures: dict[int, Departure] = {}
        self._rates = Peak()

    @property
    def delivery_rate(self) -> float | None:
        """The best of a short window, from samples of a flow that had enough to send; None before the first."""
        return self._rates()

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
        self.bytes_in_flight += packet.sent_bytes

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        self.bytes_in_flight -= packet.sent_bytes
        self._active_s += min(now - self._delivered_at, self.rtt_s or 0.0)
        self._delivered += packet.sent_bytes
        self._delivered_at = now
        left = self._departures.pop(packet.packet_number, None)
        if left is None:
            return
        sent_at = packet.sent_time or 0.0
        took = max(sent_at - left.first_sent_at, now - left.delivered_at)
        self._first_sent_at = sent_at
        if took > 0 and took >= (self.min_rtt_s or 0.0):
            rate = (self._delivered - left.delivered) / took
            if not left.limited:
                self._keep(self._rates, rate)
            self._on_rate(rate, left.limited)
        self._on_delivered(now, packet.sent_bytes, left)

    def _keep(self, peak: Peak, value: float) -> None:
        """Adds a value, which counts for a short window."""
        now = self._active_s
        peak.add(now, value, now - max(WINDOW_MIN, WINDOW_RTTS * (self.min_rtt_s or 0.0)))

    def _on_rate(self, rate: float, limited: bool) -> None:
        """A sample; a limited one is a lower bound."""

    def _on_delivered(self, now: float, size: int, left: Departure) -> None:
        """A packet arrived, and its sample has been seen."""

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self._departures.pop(packet.packet_number, None)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        self.on_packets_expired(packets=packets)

    def on_persistent_congestion(self) -> None:
        """Nothing to measure."""

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self.rtt_s = rtt if self.rtt_s is None else 7 / 8 * self.rtt_s + 1 / 8 * rtt
        self.min_rtt_s = rtt if self.min_rtt_s is None else min(self.min_rtt_s, rtt)
