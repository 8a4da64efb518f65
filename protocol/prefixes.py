"""Where a stranger comes from, as far as bounds on strangers go."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

REFUSALS_PER_S, REFUSALS_AT_ONCE = 10.0, 50  # to one /24 or /56
SLOWEST_S, PLACES = 2.0, 4096  # the longest that a refusal waits, and prefixes that are kept


def prefix(host: str) -> str:
    """The /24 or /56 that an address is in, which one subscriber can hold all of."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    bits = 24 if address.version == 4 else 56
    return str(ipaddress.ip_network((address, bits), strict=False))


class Pace:
    """Lets a prefix have so many refusals a second; further ones wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._paid: OrderedDict[str, float] = OrderedDict()  # until when a prefix has used its refusals up

    def wait_s(self, place: str) -> float:
        """Seconds that one more refusal waits; it counts in any case."""
        now, credit = self._clock(), REFUSALS_AT_ONCE / REFUSALS_PER_S
        paid = max(self._paid.pop(place, 0.0), now - credit) + 1 / REFUSALS_PER_S
        self._paid[place] = min(paid, now + SLOWEST_S)
        if len(self._paid) > PLACES:
            self._paid.popitem(last=False)
        return min(max(0.0, paid - now), SLOWEST_S)
