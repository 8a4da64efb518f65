"""Congestion control by a model of the path: what it delivers and how long an empty one takes, after BBR.

The states, gains and filters are those of draft-cardwell-iccrg-bbr-congestion-control-00; the loss ceiling and the
milder look for the round trip follow version 3 of that algorithm (draft-ietf-ccwg-bbr). Loss alone slows nothing.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Iterable

from aioquic.quic.congestion.base import K_INITIAL_WINDOW, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket

from protocol.transport.quic_control import Departure, MeasuringControl, Peak

NAME = "tandem-rate"
FAST = 2 / math.log(2)  # the least gain that doubles what is sent every round trip
CYCLE = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # gains while probing for bandwidth, an empty round trip each
PAUSE_RTTS = 2.0  # at most; longer leaves less of a queue, and less of the path beside a flow of cubic
MARGIN = 0.99  # of the modelled rate, so that a queue drains in the long run
WINDOW_GAIN = 2.0  # times what fills the empty path: room for late and few acks
LEAST_PACKETS = 4  # in the window
GROWTH = 1.25  # in a round trip, below which the path counts as full
FULL_ROUNDS = 3  # without that growth
LOSS_CEILING = 0.1  # of a round's bytes
LOSSY_PACKETS = 6  # and so many, at least
LOSSY_ROUNDS = 2  # in a row, after which the model is too great
RTT_LIFE = 10.0  # seconds a least round trip counts
PROBE_RTT_S = 0.2
AGGREGATE_S = 0.1  # of the modelled rate, at most, that late acks may add to the window
BURST_S = 0.005  # of the modelled rate that may leave at once: timers and other work make the loop late


class Phase(enum.Enum):
    STARTUP = enum.auto()
    DRAIN = enum.auto()
    BANDWIDTH = enum.auto()
    ROUND_TRIP = enum.auto()


class RateControl(MeasuringControl):
    """Paces at the modelled rate, with about twice the path's content in flight at most."""

    def __init__(self, *, max_datagram_size: int):
        super().__init__(max_datagram_size=max_datagram_size)
        self._datagram = max_datagram_size
        self.restart()

    def restart(self) -> None:
        """Forgets the path, as for a new one."""
        self.congestion_window = K_INITIAL_WINDOW * self._datagram
        self.rtt_s = self.min_rtt_s = None
        self._rates = Peak()
        self._min_rtt_at = 0.0
        self._phase = Phase.STARTUP
        self._gain = FAST
        self._bandwidth = Peak()
        self._surplus = Peak()  # bytes acked beyond the modelled rate
        self._epoch_at, self._epoch_acked = 0.0, 0
        self._full_rate, self._full_rounds = 0.0, 0
        self._step, self._step_at = 0, 0.0  # in CYCLE
        self._round_end = self._delivered
        self._round_at, self._round_from, self._lost = 0.0, self._delivered, 0
        self._lossy_rounds = 0
        self._conserve = False  # after a blackhole, until a round trip is over
        self._least_rtt, self._leave_at = math.inf, math.inf  # while probing for the round trip

    # what others ask for

    @property
    def bandwidth(self) -> float | None:
        """Modelled, in bytes/s; a first guess at the start, None before the first round trip."""
        known = self._bandwidth()
        if self._phase is Phase.STARTUP and self.rtt_s:
            return max(known or 0.0, K_INITIAL_WINDOW * self._datagram / self.rtt_s)
        return known

    @property
    def pacing_rate(self) -> float | None:
        """Bytes/s; None as long as nothing is known and nothing is paced."""
        rate = self.bandwidth
        return None if rate is None else max(MARGIN * self._gain * rate, 1.0)

    @property
    def burst(self) -> float:
        """Bytes that may leave at once after a pause (RFC 9002, 7.7)."""
        return max(K_INITIAL_WINDOW * self._datagram, BURST_S * (self.bandwidth or 0.0))

    # the model

    def _on_rate(self, rate: float, limited: bool) -> None:
        if not limited or rate >= (self._bandwidth() or 0.0):
            self._keep(self._bandwidth, rate)

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        least, at = self.min_rtt_s, self._min_rtt_at
        super().on_rtt_measurement(now=now, rtt=rtt)
        if self._phase is Phase.ROUND_TRIP:
            self._least_rtt = min(self._least_rtt, rtt)
        elif least is None or rtt <= least:
            self._min_rtt_at = now
        elif now > at + RTT_LIFE:
            if self._limited:
                self.min_rtt_s, self._min_rtt_at = rtt, now
            elif self._phase is Phase.BANDWIDTH:
                self._phase, self._gain = Phase.ROUND_TRIP, 1.0
                self._least_rtt, self._leave_at = rtt, math.inf

    @property
    def _limited(self) -> bool:
        return self._delivered <= self._limited_until

    def _on_delivered(self, now: float, size: int, left: Departure) -> None:
        self._add_surplus(now, size)
        if left.delivered >= self._round_end:
            self._on_round(now, left.limited)
        self._advance(now)
        self._set_window(size)

    def _add_surplus(self, now: float, size: int) -> None:
        """Acks that come in bunches: how much more than the modelled rate a bunch brings."""
        rate = self._bandwidth() or 0.0
        if self._epoch_acked <= rate * (now - self._epoch_at):
            self._epoch_at, self._epoch_acked = now, 0
        self._epoch_acked += size
        self._keep(self._surplus, min(self._epoch_acked - rate * (now - self._epoch_at), AGGREGATE_S * rate))

    def _on_round(self, now: float, limited: bool) -> None:
        """What left after the last round began has begun to arrive."""
        self._conserve = False
        delivered, took = self._delivered - self._round_from, now - self._round_at
        lossy = self._lost > max(LOSS_CEILING * (self._lost + delivered), LOSSY_PACKETS * self._datagram)
        self._lossy_rounds = self._lossy_rounds + 1 if lossy else 0
        self._round_end, self._round_from, self._round_at, self._lost = self._delivered, self._delivered, now, 0
        too_much = self._lossy_rounds >= LOSSY_ROUNDS
        if too_much and took > 0 and not limited:
            self._bandwidth = Peak()
            self._keep(self._bandwidth, delivered / took)
        if self._phase is Phase.STARTUP and not limited:
            self._look_for_the_end_of_growth(too_much)

    def _look_for_the_end_of_growth(self, too_much: bool) -> None:
        rate = self._bandwidth() or 0.0
        if rate >= GROWTH * self._full_rate:
            self._full_rate, self._full_rounds = rate, 0
        else:
            self._full_rounds += 1
        if too_much or self._full_rounds >= FULL_ROUNDS:
            self._phase, self._gain = Phase.DRAIN, 1 / FAST

    def _content(self, gain: float = 1.0) -> float:
        """Bytes that fill the empty path, by the model, times `gain`."""
        return gain * (self.bandwidth or 0.0) * (self.min_rtt_s or 0.0)

    # the phases

    def _advance(self, now: float) -> None:
        if self._phase is Phase.DRAIN and self.bytes_in_flight <= self._content():
            self._probe_bandwidth(now)
        elif self._phase is Phase.BANDWIDTH:
            self._cycle(now)
        elif self._phase is Phase.ROUND_TRIP:
            self._probe_round_trip(now)

    def _probe_bandwidth(self, now: float) -> None:
        """At a random step that does not begin with a pause, so that flows do not probe together."""
        self._phase = Phase.BANDWIDTH
        self._begin_step(now, random.randrange(2, len(CYCLE) + 1) % len(CYCLE))

    def _begin_step(self, now: float, step: int) -> None:
        self._step, self._step_at, self._gain = step, now, CYCLE[step]

    def _cycle(self, now: float) -> None:
        over = now - self._step_at > (self.min_rtt_s or 0.0)
        if self._gain > 1:
            over = over and (self._lost > 0 or self.bytes_in_flight >= self._content(self._gain))
        elif self._gain < 1:
            over = self.bytes_in_flight <= self._content() or now - self._step_at > PAUSE_RTTS * (self.min_rtt_s or 0.0)
        if over:
            self._begin_step(now, (self._step + 1) % len(CYCLE))

    def _probe_round_trip(self, now: float) -> None:
        if self._leave_at == math.inf:
            if self.bytes_in_flight <= self._little():
                self._leave_at = now + max(PROBE_RTT_S, self.min_rtt_s or 0.0)
        elif now >= self._leave_at:
            self.min_rtt_s, self._min_rtt_at = self._least_rtt, now
            self._probe_bandwidth(now)

    def _little(self) -> int:
        return max(int(self._content(0.5)), LEAST_PACKETS * self._datagram)

    def _set_window(self, size: int) -> None:
        if self._phase is Phase.ROUND_TRIP:
            self.congestion_window = self._little()
            return
        gain = FAST if self._phase is Phase.STARTUP else WINDOW_GAIN
        window = max(int(self._content(gain) + (self._surplus() or 0.0)), LEAST_PACKETS * self._datagram)
        if self._conserve:
            window = min(self.congestion_window + size, window)
        elif self._phase is Phase.STARTUP:
            window = max(self.congestion_window, window)
        self.congestion_window = window

    # losses

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        gone = list(packets)
        super().on_packets_lost(now=now, packets=gone)
        self._lost += sum(packet.sent_bytes for packet in gone)

    def on_persistent_congestion(self) -> None:
        """Nothing arrived for a while: begins small, and believes the model again after a round trip."""
        self.congestion_window = LEAST_PACKETS * self._datagram
        self._conserve, self._round_end = True, self._delivered
        self._lost = 0


register_congestion_control(NAME, RateControl)
