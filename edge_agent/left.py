"""What this phone believes that a replica still holds of the conversations it had there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.frames import Admitted, Digests
from split_model.prefix import LIFE_S, common

MOST = 16  # conversations at one replica


@dataclass(frozen=True, slots=True)
class Log:
    """Positions that a session there has computed."""

    ids: tuple[int, ...]
    sparse: bool
    until: float


class Left:
    """Token logs of sessions that were there; every `Admitted` corrects it.

    A replica that once held less than was expected of it is believed to hold nothing until it says otherwise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._logs: deque[Log] = deque(maxlen=MOST)
        self._digests: Digests | None = None
        self._believed = True

    def held(self, ids: Sequence[int], sparse: bool = False) -> int:
        """How many positions of a prompt it will hold."""
        return self._longest(tuple(ids), sparse) if self._believed else 0

    def add(self, ids: Sequence[int], sparse: bool = False) -> None:
        """A session has ended there that had these positions; those it went on from are part of it."""
        log = Log(tuple(ids), sparse, self._clock() + LIFE_S)
        self._keep(lambda one: one.sparse != sparse or common(one.ids, log.ids) < len(one.ids))
        self._logs.append(log)

    def told(self, ids: Sequence[int], sparse: bool, admitted: Admitted) -> None:
        """What it said to a session that began with these ids."""
        if self._digests != admitted.digests:
            self.forget()
            self._digests = admitted.digests
        ids, held = tuple(ids), admitted.held
        expected = self._longest(ids, sparse)
        if held < expected:
            self._keep(lambda one: one.sparse != sparse or common(one.ids, ids) <= held)
            self._believed = held > 0
        elif held:
            self._believed = True
        if held > self._longest(ids, sparse):
            self.add(ids[:held], sparse)

    def forget(self) -> None:
        """It was started anew."""
        self._logs.clear()
        self._believed = True

    def _longest(self, ids: tuple[int, ...], sparse: bool) -> int:
        now, most = self._clock(), len(ids) - 1
        alike = (one.ids for one in self._logs if one.sparse == sparse and one.until > now)
        return max((min(common(one, ids), most) for one in alike), default=0)

    def _keep(self, which: Callable[[Log], bool]) -> None:
        self._logs = deque(filter(which, self._logs), MOST)
