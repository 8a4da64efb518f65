"""Where a stranger comes from, as far as bounds on strangers go."""

from __future__ import annotations

import ipaddress


def prefix(host: str) -> str:
    """The /24 or /56 that an address is in, which one subscriber can hold all of."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    bits = 24 if address.version == 4 else 56
    return str(ipaddress.ip_network((address, bits), strict=False))
