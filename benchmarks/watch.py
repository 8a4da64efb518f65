"""What a phone sends, seen from outside: when it begins to use a path, which is a socket of its and a server's port."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from dataclasses import dataclass

ETH_P_ALL = 3
OUTGOING = 4  # of linux/if_packet.h
QUIET_S = 0.2  # after so long, a path that is used again begins anew; less than a phone is silent before it pings
KEPT = 4096

Path = tuple[int, bytes, int, int]  # protocol, the phone's address and port, the server's port


@dataclass(frozen=True, slots=True)
class Begin:
    """The phone sends on a path that is new, or was quiet."""

    at: float
    port: int
    new: bool


class Watch:
    """Reads the headers of all that leaves the namespace it is made in. Needs root."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._sock.setblocking(False)
        self._latest: dict[Path, float] = {}
        self._begins: deque[Begin] = deque(maxlen=KEPT)
        asyncio.get_running_loop().add_reader(self._sock, self._read)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def busiest(self, ports: range) -> int:
        """The port that was sent to last."""
        used = {path[3]: at for path, at in sorted(self._latest.items(), key=lambda item: item[1])}
        return max(ports, key=lambda port: used.get(port, 0.0))

    def began(self, since: float, ports: set[int], *, new: bool) -> float | None:
        """When a path to one of these ports began after some time; with `new`, one that had never been used."""
        found = (one.at for one in self._begins if one.at > since and one.port in ports and (one.new or not new))
        return next(found, None)

    def _read(self) -> None:
        while True:
            try:
                data, (_, _, kind, *_) = self._sock.recvfrom(64)
            except BlockingIOError:
                return
            if kind == OUTGOING and len(data) > 28 and data[0] >> 4 == 4 and data[9] in (6, 17):
                self._note(data, time.monotonic())

    def _note(self, data: bytes, now: float) -> None:
        head = 4 * (data[0] & 15)
        here, there = (int.from_bytes(data[head + at : head + at + 2]) for at in (0, 2))
        path = (data[9], data[12:16], here, there)
        before = self._latest.get(path)
        if before is None or now - before > QUIET_S:
            self._begins.append(Begin(now, there, before is None))
        self._latest[path] = now
