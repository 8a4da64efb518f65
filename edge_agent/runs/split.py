"""The phone's part of a split: hidden states of the token log, in order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import torch

from edge_agent.runs.local import CHUNK, Seat
from protocol.frames import Hidden
from protocol.tensor import pack
from split_model.compute import Compute


class Front:
    """Layers `[0, split)` of one session, whatever the number of its attempts.

    Hidden states of the prompt are sent in `bits` (8 or 16), those of the answer in 16: every attempt sends the same.
    """

    def __init__(self, seat: Seat, compute: Compute, prompt_length: int, bits: int):
        self._seat, self._compute = seat, compute
        self._rounded = prompt_length if bits == 8 else 0  # positions that go in 8 bits

    def size(self, positions: int) -> int:
        """Bytes of the hidden states of so many positions, about."""
        rounded = min(self._rounded, positions)
        return (2 * positions - rounded) * self._seat.width

    async def frames(self, log: Sequence[int], position: int) -> AsyncGenerator[Hidden, None]:
        """Hidden states of the log from a position on, all before which have been run once.

        What is rounded together depends on positions alone, wherever a recovery begins.
        """
        while position < len(log):
            end = min(len(log), (position // CHUNK + 1) * CHUNK)
            async for x in self._seat.run(log[position:end], position):
                rounded = max(0, self._rounded - position)
                if rounded:
                    for frame in await self._compute.call(_in_8_bits, x[:rounded], position):
                        yield frame
                for frame in pack(x[rounded:], position + rounded):
                    yield frame
            position = end


def _in_8_bits(x: torch.Tensor, position: int) -> list[Hidden]:
    return list(pack(x, position, 8))
