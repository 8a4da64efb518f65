"""Who may begin a handshake: rates by where a first packet claims to come from, and by where it was shown to."""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicHeader, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder

PLACES = 4096  # prefixes kept; one not seen for longer than its bucket takes to fill is as good as new
BURST_S = 10.0  # a prefix that was quiet may do so many seconds' handshakes at once


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a QUIC listener takes from strangers; rates are handshakes a second, the rest are counts."""

    retry_above: float = 50.0  # in all, of unproven addresses; beyond it, a phone first shows its own by a Retry
    per_prefix: float = 20.0  # from one /24 or /56
    connections: int = 1024  # at once; half of them from one prefix
    half_open: int = 256  # of them, before their handshake is complete


class Verdict(enum.Enum):
    """What becomes of a first packet."""

    TAKE = enum.auto()
    PROVE = enum.auto()  # by a Retry, which keeps no state here
    REFUSE = enum.auto()


class Buckets:
    """One token bucket for each key, the least recently used forgotten first. A rate of 0 lets nothing pass."""

    def __init__(self, rate: float, burst: float, keys: int, clock: Callable[[], float]):
        self._rate, self._burst, self._keys, self._clock = rate, burst if rate else 0.0, keys, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and since when

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: str) -> bool:
        """Takes one token if there is one."""
        now = self._clock()
        level, at = self._levels.pop(key, (self._burst, now))
        level = min(self._burst, level + (now - at) * self._rate)
        taken = level >= 1
        self._levels[key] = (level - taken, now)
        if len(self._levels) > self._keys:
            self._levels.popitem(last=False)
        return taken


class Door:
    """Decides for every first packet. Forged addresses spend what is claimed, never what is proven."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic):
        burst = max(1.0, BURST_S * bounds.per_prefix)
        self._half_open = bounds.half_open
        self._all = Buckets(bounds.retry_above, max(1.0, bounds.retry_above), 1, clock)
        self._claimed = Buckets(bounds.per_prefix, burst, PLACES, clock)
        self._proven = Buckets(bounds.per_prefix, burst, PLACES, clock)

    def judge(self, place: str, proven: bool, half_open: int) -> Verdict:
        """`place` is the packet's prefix, `proven` that it came with a token of ours, `half_open` how many are now."""
        if proven:
            return Verdict.TAKE if self._proven.take(place) else Verdict.REFUSE
        free = half_open < self._half_open
        return Verdict.TAKE if free and self._claimed.take(place) and self._all.take("") else Verdict.PROVE


def refusal(header: QuicHeader, why: str) -> bytes:
    """An Initial that closes the connection before it begins (RFC 9000, 10.2.3)."""
    assert header.version is not None
    crypto = CryptoPair()
    crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
    builder = QuicPacketBuilder(
        host_cid=header.destination_cid,
        peer_cid=header.source_cid,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
        version=header.version,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    reason = why.encode()
    buffer = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY + len(reason))
    buffer.push_uint_var(QuicErrorCode.CONNECTION_REFUSED)
    buffer.push_uint_var(QuicFrameType.PADDING)
    buffer.push_uint_var(len(reason))
    buffer.push_bytes(reason)
    datagrams, _ = builder.flush()
    return datagrams[0]
