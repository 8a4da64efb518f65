"""Somebody who uses a server honestly while a test does its worst to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

PATIENCE_S = 60.0  # on a busy machine


@asynccontextmanager
async def unharmed(
    session: Callable[[], Awaitable[object]], held: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """While the body runs, `session` again and again gives what it gave in quiet; then `held` is what it was.

    `held` tells what the server keeps for its clients: rows, slots, connections. Tasks are counted here.
    """
    quiet = await session()
    before, tasks = await held(), len(asyncio.all_tasks())
    leaving, rounds = False, 0

    async def go_on() -> None:
        nonlocal rounds
        while not leaving or not rounds:
            assert await session() == quiet, "the bystander's answer changed"
            rounds += 1

    bystander = asyncio.create_task(go_on())
    try:
        yield
    finally:
        leaving = True
        await bystander
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await held() != before or len(asyncio.all_tasks()) > tasks:
                pass
    except TimeoutError:
        left = [str(task.get_coro()) for task in asyncio.all_tasks()]
        raise AssertionError(f"{before} became {await held()}, {tasks} tasks became {left}") from None
