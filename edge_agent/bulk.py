"""Which transport carries a long prompt's hidden states: QUIC, unless gRPC was measured to be twice as fast."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from edge_agent.conditions import average

BULK = 64 << 10  # bytes from which on a session's hidden states are bulk
BETTER = 2.0  # times as fast
SLOW = 0.25  # of what its kind of network usually does: QUIC may be throttled, and gRPC is worth a trial
LIFE_S = 300.0  # a rate is believed for so long
NETWORKS = 64  # pairs of network and transport that are kept


class BulkRates:
    """Bytes/s of bulk towards one replica, by network and transport, the server's own work included in both."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._rates: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # and until when

    def sent(self, network: str, transport: str, size: int, seconds: float) -> None:
        """Bulk of `size` bytes was answered after so long."""
        if size < BULK or seconds <= 0:
            return
        rate = average(self.rate(network, transport), size / seconds)
        self._rates[network, transport] = rate, self._clock() + LIFE_S
        self._rates.move_to_end((network, transport))
        if len(self._rates) > NETWORKS:
            self._rates.popitem(last=False)

    def rate(self, network: str, transport: str) -> float | None:
        """None where nothing was measured lately."""
        rate, until = self._rates.get((network, transport), (0.0, 0.0))
        return rate if until > self._clock() else None

    def prefers_grpc(self, network: str, usual: float) -> bool:
        """Whether bulk leaves QUIC, on a network whose kind usually does `usual` bytes/s; also for a first trial."""
        quic, grpc = self.rate(network, "quic"), self.rate(network, "grpc")
        if quic is None:
            return False
        return quic < SLOW * usual if grpc is None else grpc >= BETTER * quic
