"""All replicas the agent was given, watched: reached once for a first ticket, and again when they were lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from edge_agent.conditions import Network
from edge_agent.link import Link, Path
from edge_agent.networks import Toward
from edge_agent.roaming import roam
from edge_agent.state import State
from protocol.errors import LinkLost

log = logging.getLogger(__name__)


class Links:
    """All replicas the agent was given; empty where it was given none.

    `kind` tells which kind of network leads to a host; without it all networks are taken for one.
    """

    def __init__(self, links: Sequence[Link], state: State, kind: Callable[[str], Network] | None = None):
        self.links = tuple(links)
        self._state, self._kind = state, kind
        kept, networks = state.read("links"), state.read("networks")
        for link in self.links:
            link.path = Path.read(kept.get(str(link.address)))
            link.on_handshake = partial(self._connected, link)
            link.dialler.udp.read(networks.get(str(link.address)))
            link.dialler.udp.on_change = self._save_networks
            link.dialler.toward = Toward(link.address) if kind is not None else None
        self._changed = asyncio.Event()
        self._moved = set(self.links)  # whose kind of network is to be asked
        self._tasks: list[asyncio.Task[None]] = []

    def __bool__(self) -> bool:
        return bool(self.links)

    @property
    def reachable(self) -> bool:
        """As far as is known."""
        return any(not link.unreachable and not link.refused() for link in self.links)

    def ranked(self) -> list[Link]:
        """The best replica first."""
        return sorted(self.links, key=Link.preference)

    def start(self) -> None:
        """Begins to watch: new replicas are reached once, so that there is a ticket; lost ones until they are back."""
        self._tasks.append(asyncio.create_task(self._watch()))
        if self._kind is not None:
            self._tasks.append(asyncio.create_task(roam(self.links, self._arrived)))

    def wake(self) -> None:
        """A replica was lost."""
        self._changed.set()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.aclose() for link in self.links))
        self._save()

    def _connected(self, link: Link) -> None:
        self._save()  # a ticket is on its way, and must be known of even after a crash
        self._moved.add(link)
        self._changed.set()

    def _arrived(self, link: Link) -> None:
        """Another network leads to the replica, and may reach what the one before did not."""
        link.retry_at = 0.0
        self._moved.add(link)
        self._changed.set()

    def _save_networks(self) -> None:
        self._state.write("networks", {str(link.address): link.dialler.udp.kept() for link in self.links})

    def _save(self) -> None:
        self._state.write("links", {str(link.address): _numbers(link.path) for link in self.links})

    async def _watch(self) -> None:
        await asyncio.gather(self._look(), self._probe([link for link in self.links if not link.resumable]))
        while True:
            self._changed.clear()
            await self._look()
            down = [link.retry_at for link in self.links if link.unreachable]
            wait = max(0.0, min(down) - time.monotonic()) if down else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            now = time.monotonic()
            await self._probe([link for link in self.links if link.unreachable and link.retry_at <= now])

    async def _look(self) -> None:
        """Asks for the kind of network that leads to replicas which were reached anew, perhaps from another network."""
        moved, self._moved = self._moved, set()
        await asyncio.gather(*(self._ask_kind(link) for link in moved))

    async def _ask_kind(self, link: Link) -> None:
        if self._kind is not None:
            link.kind = await asyncio.to_thread(self._kind, link.address.host)

    async def _probe(self, links: Sequence[Link]) -> None:
        found = await asyncio.gather(*(link.probe() for link in links), return_exceptions=True)
        for link, error in zip(links, found, strict=True):
            if error is not None:
                link.lost(str(error) or type(error).__name__)
                if not isinstance(error, LinkLost):
                    log.error("a probe broke", exc_info=error)


def _numbers(path: Path) -> dict[str, float | None]:
    return {name: getattr(path, name) for name in path.__slots__}
