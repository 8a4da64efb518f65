"""Waiting for what another thread or the peer of a socket changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def eventually(true: Callable[[], object], limit_s: float = 30.0) -> None:
    """Raises TimeoutError when it never becomes true."""
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
