"""A phone changes networks: the kernel tells at once, and connections go on from where it sends now."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sequence

from edge_agent.link import Link

log = logging.getLogger(__name__)
TOGETHER_S = 0.05  # changes that come within belong together: an address, its routes, a link's state
# From linux/rtnetlink.h: links, and addresses and routes of IPv4 and IPv6.
LINK, IPV4_ADDRESS, IPV4_ROUTE, IPV6_ADDRESS, IPV6_ROUTE = 0x1, 0x10, 0x40, 0x100, 0x400


class Changes:
    """Tells that links, addresses or routes of this machine have changed; what it was is for the kernel to know.

    Raises OSError where there is no netlink, or none for us.
    """

    def __init__(self) -> None:
        if not hasattr(socket, "AF_NETLINK"):
            raise OSError("no netlink on this system")
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            self._sock.bind((0, LINK | IPV4_ADDRESS | IPV4_ROUTE | IPV6_ADDRESS | IPV6_ROUTE))
        except BaseException:
            self._sock.close()
            raise

    async def next(self) -> None:
        """Returns TOGETHER_S after a change."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._sock, came.set)
        try:
            await came.wait()
            await asyncio.sleep(TOGETHER_S)
        finally:
            loop.remove_reader(self._sock)
        self._empty()

    def close(self) -> None:
        self._sock.close()

    def _empty(self) -> None:
        while True:
            try:
                self._sock.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # what did not fit has been a change as well
                    raise


async def roam(links: Sequence[Link], arrived: Callable[[Link], None]) -> None:
    """Follows the machine's network until it is cancelled; `arrived` is told of links that another one leads to now."""
    try:
        changes = Changes()
    except OSError as error:
        log.info("changes of network are seen late, by silence and errors: %s", error)
        return
    with contextlib.closing(changes):
        while True:
            await changes.next()
            others = await asyncio.gather(*(link.dialler.follow() for link in links))
            for link, other in zip(links, others, strict=True):
                if other:
                    log.info("%s is reached over %s now", link.address, link.dialler.network or "no network")
                    arrived(link)
