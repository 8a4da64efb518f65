"""Which ids the kept slots of a KV memory hold, so that a conversation's next turn computes only what is new."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from split_model.cache import Cache, OutOfSlots
from split_model.compute import Compute

LIFE_S = 300.0  # that a slot is kept after its session
LEAST_S = 1.0  # between two looks for what was kept too long
PIECE = 256  # ids compared at a time


class Beside(Protocol):
    """A memory that goes with the slots of another: of a model that drafts, or of hidden states."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Positions `[0, count)` of one slot into another."""

    def clear(self, slot: int) -> None:
        """Zeroes what the slot holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A slot that no session has, and the ids of the positions it holds; `beside`: how many the memory beside holds."""

    slot: int
    ids: tuple[int, ...]
    owner: Hashable  # None: everybody's, the operator's own, and never taken over
    until: float
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """What was found for a session: the first `held` of its positions. To be seated or given back."""

    held: int = 0
    kept: Kept | None = None

    @property
    def has_slot(self) -> bool:
        """Whether seating it needs no further slot."""
        return self.kept is not None and self.kept.owner is not None


class Seated(NamedTuple):
    """A session's slot, how many of its positions that holds, and how many the memory beside does."""

    slot: int
    held: int
    beside: int


class Prefixes:
    """The slots of one model part's KV memory, free ones and kept ones; a kept one is free for whoever needs it.

    What a session finds was computed here, from the same ids, for the same owner: other owners' slots are neither
    used nor looked at. An owner of None shares nothing of its own. At most `len(ids) - 1` positions are held: the
    last one is computed, since a token is drawn behind it. The least recently used slot goes first, and each after
    `life_s` seconds, at the latest when `expire` is called.
    """

    def __init__(self, cache: Cache, beside: Beside | None = None, life_s: float = LIFE_S,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self.cache, self.life_s = cache, life_s
        self._beside, self._clock = beside, clock
        self._kept: dict[int, Kept] = {}  # by slot; who removes an entry has the slot
        self._claimed: dict[int, Kept] = {}  # by slot; of places that are neither seated nor given back
        self._shared: tuple[Kept, ...] = ()
        self._lock = threading.Lock()

    # from any thread

    @property
    def free_slots(self) -> int:
        """Kept ones are among them."""
        return self.cache.free_slots + len(self._kept)

    def held(self, ids: Sequence[int], owner: Hashable) -> int:
        """How many positions a session with these ids would find."""
        with self._lock:
            return self._best(tuple(ids), owner).held

    def claim(self, ids: Sequence[int], owner: Hashable) -> Place:
        """The longest beginning of these ids that is held; nobody else gets it until the place is given back."""
        with self._lock:
            place = self._best(tuple(ids), owner)
            if place.kept is not None and place.has_slot:
                self._claimed[place.kept.slot] = self._kept.pop(place.kept.slot)
            return place

    def give_back(self, place: Place) -> None:
        """For a place that is not seated after all."""
        if place.kept is not None and place.has_slot:
            with self._lock:
                forgotten = self._claimed.pop(place.kept.slot, None) is None
                self._kept[place.kept.slot] = replace(place.kept, until=-math.inf) if forgotten else place.kept

    # on the compute thread

    def take(self, ids: Sequence[int], owner: Hashable) -> Seated:
        """A slot for a session with these ids. Raises OutOfSlots."""
        return self.seat(self.claim(ids, owner))

    def seat(self, place: Place) -> Seated:
        """The claimed slot, or another with a copy where most of the claimed one would be lost. Raises OutOfSlots."""
        kept, held = place.kept, place.held
        if kept is None:
            return Seated(self._fresh(), 0, 0)
        beside = min(kept.beside, held)
        if place.has_slot and (2 * held >= len(kept.ids) or not self.free_slots):
            return self._own(kept, held, beside)
        try:
            slot = self._fresh()
        except OutOfSlots:  # the last one was claimed meanwhile
            if not place.has_slot:
                raise
            return self._own(kept, held, beside)
        self.cache.copy(kept.slot, slot, held)
        if self._beside is not None:
            self._beside.copy(kept.slot, slot, beside)
        self.give_back(place)
        return Seated(slot, held, beside)

    def _own(self, kept: Kept, held: int, beside: int) -> Seated:
        with self._lock:
            self._claimed.pop(kept.slot, None)
        return Seated(kept.slot, held, beside)

    def keep(self, slot: int, ids: Sequence[int], owner: Hashable, beside: int = 0) -> None:
        """A session is over; its slot holds the positions of these ids. Without an owner it is freed."""
        if owner is None or not ids or not self.life_s:
            self.free(slot)
            return
        kept = Kept(slot, tuple(ids), owner, self._clock() + self.life_s, min(beside, len(ids)))
        with self._lock:
            self._kept[slot] = kept

    def share(self, slot: int, ids: Sequence[int]) -> None:
        """From now on every session may have a copy of this slot, which holds the operator's own prefix, for good."""
        self._shared = (*self._shared, Kept(slot, tuple(ids), None, float("inf")))

    def free(self, slot: int) -> None:
        """Gives a slot back, zeroed."""
        self.cache.free(slot)
        if self._beside is not None:
            self._beside.clear(slot)

    def expire(self) -> None:
        """Zeroes what has been kept too long."""
        now = self._clock()
        self._drop(lambda kept: kept.until <= now)

    def forget(self, owners: Callable[[Hashable], bool]) -> None:
        """Zeroes what was kept for these owners."""
        self._drop(lambda kept: owners(kept.owner))
        with self._lock:  # what is claimed just now must not be kept again
            self._claimed = {slot: kept for slot, kept in self._claimed.items() if not owners(kept.owner)}

    def _drop(self, which: Callable[[Kept], bool]) -> None:
        with self._lock:
            gone = [kept for kept in self._kept.values() if which(kept)]
            for kept in gone:
                del self._kept[kept.slot]
        for kept in gone:
            self.free(kept.slot)

    def _fresh(self) -> int:
        if not self.cache.free_slots:
            with self._lock:
                oldest = min(self._kept.values(), key=lambda kept: kept.until, default=None)
                if oldest is not None:
                    del self._kept[oldest.slot]
            if oldest is not None:
                self.free(oldest.slot)
        return self.cache.take()

    def _best(self, ids: tuple[int, ...], owner: Hashable) -> Place:
        now, most = self._clock(), len(ids) - 1
        own = [kept for kept in self._kept.values() if kept.owner == owner and kept.until > now]
        best = Place()
        for kept in (*own, *self._shared):
            held = min(common(kept.ids, ids), most)
            if held > best.held:
                best = Place(held, kept)
        return best


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with; both of one type."""
    most, at = min(len(a), len(b)), 0
    while at < most and a[at : at + PIECE] == b[at : at + PIECE]:
        at += PIECE
    while at < most and a[at] == b[at]:
        at += 1
    return min(at, most)


@asynccontextmanager
async def expiring(compute: Compute, *every: Prefixes) -> AsyncIterator[None]:
    """Drops what was kept too long, a quarter of its life or a second late at most, until the block ends."""

    async def look() -> None:
        while True:
            await asyncio.sleep(max(LEAST_S, min(prefixes.life_s for prefixes in every) / 4))
            for prefixes in every:
                compute.post(prefixes.expire)

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
