"""aioquic's own congestion controls, measured like ours, to compare with: "plain-reno" and "plain-cubic"."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from aioquic.quic.congestion.base import create_congestion_control, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket

from protocol.transport.quic_bbr import RateControl
from protocol.transport.quic_control import MeasuringControl


class PlainControl(RateControl):
    """Decides as the control of that name ("reno", "cubic") does; paces as aioquic does, a window per round trip."""

    def __init__(self, name: str, *, max_datagram_size: int):
        self._plain = create_congestion_control(name, max_datagram_size=max_datagram_size)
        super().__init__(max_datagram_size=max_datagram_size)

    @property  # type: ignore[override]
    def congestion_window(self) -> int:
        return self._plain.congestion_window

    @congestion_window.setter
    def congestion_window(self, size: int) -> None:
        """The model's, which nobody follows."""

    @property
    def pacing_rate(self) -> float | None:
        return None if self.rtt_s is None else self.congestion_window / self.rtt_s

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        super().on_packet_sent(packet=packet)
        self._plain.on_packet_sent(packet=packet)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        super().on_packet_acked(now=now, packet=packet)
        self._plain.on_packet_acked(now=now, packet=packet)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        gone = list(packets)
        super().on_packets_expired(packets=gone)
        self._plain.on_packets_expired(packets=gone)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        gone = list(packets)
        MeasuringControl.on_packets_expired(self, packets=gone)
        self._plain.on_packets_lost(now=now, packets=gone)

    def on_persistent_congestion(self) -> None:
        self._plain.on_persistent_congestion()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        super().on_rtt_measurement(now=now, rtt=rtt)
        self._plain.on_rtt_measurement(now=now, rtt=rtt)


for _name in ("reno", "cubic"):
    register_congestion_control(f"plain-{_name}", partial(PlainControl, _name))
