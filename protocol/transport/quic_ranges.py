"""Ranges of bytes, found by bisection."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from aioquic.quic.rangeset import RangeSet


class SearchedRanges(RangeSet):
    """The same ranges as aioquic's, which looks at each of them for every one that it adds."""

    def add(self, start: int, stop: int | None = None) -> None:
        stop = start + 1 if stop is None else stop
        ranges: list[range] = self._RangeSet__ranges  # type: ignore[attr-defined]
        first = bisect_left(ranges, start, key=lambda one: one.stop)
        behind = bisect_right(ranges, stop, key=lambda one: one.start)
        if first < behind:
            start, stop = min(start, ranges[first].start), max(stop, ranges[behind - 1].stop)
        ranges[first:behind] = [range(start, stop)]
