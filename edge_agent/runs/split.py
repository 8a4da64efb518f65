"""The phone's part of a split: hidden states of the token log, in order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from edge_agent.runs.local import Seat
from protocol.frames import Hidden
from protocol.tensor import pack


class Front:
    """Layers `[0, split)` of one session, whatever the number of its attempts."""

    def __init__(self, seat: Seat):
        self._seat = seat

    def start(self) -> None:
        """A new attempt: the server knows none of the hidden states."""
        self._seat.rewind()

    async def frames(self, log: Sequence[int]) -> AsyncGenerator[Hidden, None]:
        """Hidden states of the positions of the log that this attempt has not had yet."""
        position = self._seat.position
        async for x in self._seat.run(log[position:]):
            for frame in pack(x, position):
                yield frame
            position += len(x)
