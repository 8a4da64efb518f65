"""An event loop whose time is virtual: where nothing is ready it jumps to the next timer. Nothing waits, nothing races.

Threads have no place in it: what is handed to one runs at once, and `VirtualCompute` stands in for the compute thread.
"""

from __future__ import annotations

import asyncio
import datetime
import inspect
import os
import random
import selectors
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import aioquic.tls
import pytest
import torch

T = TypeVar("T")
BEGIN = 1000.0  # the monotonic clock of every run
EPOCH = 1_900_000_000.0  # and its wall clock (2030), so that two runs see the same dates
TURN_S = 1e-6  # what a turn of the loop takes: a clock that stands still would catch what only wants a moment more
MOST_TURNS = 20_000  # of the loop without a jump; more is a loop that never waits
PACKAGES = ("protocol", "split_model", "edge_agent", "cloud_server")


class Stuck(Exception):
    """The code under test waits for what can never come, or never waits at all."""


class Clock:
    """What `time` says; every look at `perf_counter` takes a microsecond, so that nothing takes no time."""

    def __init__(self) -> None:
        self.now = BEGIN
        self._looks = 0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        self._looks += 1
        return self.now + 1e-6 * self._looks

    def time(self) -> float:
        return EPOCH + self.now

    def time_ns(self) -> int:
        return int(1e9 * self.time())

    def utcnow(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.time(), datetime.UTC)


class _Jumps(selectors.SelectSelector):
    """Instead of waiting, moves the clock on."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, clock: Clock):
        super().__init__()
        self._clock, self._turns = clock, 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise Stuck(f"{MOST_TURNS} turns of the loop without a wait, at {self._clock.now - BEGIN:.3f} s")
        self._clock.now += TURN_S
        if timeout == 0:
            return []
        if ready := super().select(0):
            return ready
        if timeout is None:
            waiting = sorted(str(task.get_coro()) for task in asyncio.all_tasks(self.loop))
            raise Stuck(f"nothing will ever happen again; tasks: {waiting}")
        self._clock.now += max(timeout, 0.0)
        self._turns = 0
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Datagrams go through `network`, which also knows names; `faults` is what no task took."""

    network: Any  # a support.virtual_network.Network, before the first endpoint is made

    def __init__(self) -> None:
        self.clock = Clock()
        selector = _Jumps(self.clock)
        super().__init__(selector)
        selector.loop = self
        self.faults: list[str] = []
        self.set_exception_handler(lambda _, context: self.faults.append(str(context.get("exception") or context)))

    def time(self) -> float:
        return self.clock.now

    def timers(self) -> list[str]:
        """Those that are to go off."""
        return [repr(timer) for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    async def getaddrinfo(self, host: Any, port: Any, **wanted: Any) -> Any:
        return self.network.getaddrinfo(host, port)

    async def create_datagram_endpoint(self, protocol_factory: Any, *args: Any, **wanted: Any) -> Any:
        return self.network.endpoint(protocol_factory, *args, **wanted)


class VirtualCompute:
    """The compute thread, without a thread: jobs one after the other, each taking `costs` of its function's name."""

    def __init__(self, **costs: float):
        self._loop, self._costs = asyncio.get_running_loop(), costs
        self._jobs: deque[tuple[Callable[[], object], float]] = deque()
        self._said: list[tuple[Callable[..., object], Sequence[object]]] = []  # by the job that is under way
        self._busy = self._closed = False
        self._idle: asyncio.Future[None] | None = None  # while somebody waits for the last job's end
        self.failure: Exception | None = None

    def post(self, function: Callable[..., object], *args: object) -> None:
        if self._closed:
            raise RuntimeError("the compute thread is closed")
        self._add(lambda: function(*args), function)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        future: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            if future.done():
                return
            try:
                result = function(*args)
            except Exception as error:
                self.to_loop(self._settle, future, future.set_exception, error)
            else:
                self.to_loop(self._settle, future, future.set_result, result)

        if self._closed:
            raise RuntimeError("the compute thread is closed")
        self._add(job, function)
        return await future

    def do_next(self, wait_s: float) -> bool:
        """Waiting is not possible here, so it ends at once."""
        if not self._jobs:
            return False
        self._do(self._jobs.popleft()[0])
        return True

    def to_loop(self, function: Callable[..., object], *args: object) -> None:
        self._said.append((function, args))

    def close(self) -> None:
        self._closed = True

    async def aclose(self) -> None:
        self.close()
        if self._busy:
            self._idle = self._loop.create_future()
            await self._idle

    @staticmethod
    def _settle(future: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            settle(value)

    def _add(self, job: Callable[[], object], function: Callable[..., object]) -> None:
        self._jobs.append((job, self._costs.get(getattr(function, "__name__", ""), 0.0)))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        if not self._jobs:
            self._busy = False
            if self._idle is not None:
                self._idle.set_result(None)
            return
        job, cost = self._jobs.popleft()
        self._do(job)
        self._loop.call_later(cost, self._done, self._said)
        self._said = []

    def _done(self, said: list[tuple[Callable[..., object], Sequence[object]]]) -> None:
        for function, args in said:
            function(*args)
        self._next()

    def _do(self, job: Callable[[], object]) -> None:
        try:
            with torch.inference_mode():
                job()
        except Exception as error:
            self.failure = self.failure or error


def run(scene: Callable[[], Coroutine[Any, Any, T]], seed: object = 0) -> T:
    """Runs a scene in virtual time; what it draws from the system's randomness follows the seed."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        with _following(loop.clock, random.Random(str(seed))):
            result = runner.run(scene())
    assert not loop.faults, loop.faults
    return result


@contextmanager
def _following(clock: Clock, chance: random.Random) -> Iterator[None]:
    """The whole program's clocks follow this one, those that constructors have bound too."""
    real = time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        for made in _constructors(len(sys.modules)):
            if real in (made.__defaults__ or ()):
                bound = tuple(clock.monotonic if one is real else one for one in made.__defaults__)
                patch.setattr(made, "__defaults__", bound)
            for cell in made.__closure__ or ():
                if cell.cell_contents is real:
                    patch.setattr(cell, "cell_contents", clock.monotonic)
        for name in ("monotonic", "perf_counter", "time", "time_ns"):
            patch.setattr(time, name, getattr(clock, name))
        patch.setattr(os, "urandom", chance.randbytes)
        patch.setattr(aioquic.tls, "utcnow", clock.utcnow)
        for module in _modules(len(sys.modules)):
            if vars(module).get("datetime") is datetime.datetime:
                patch.setattr(module, "datetime", Calendar(clock))
        yield


@cache
def _modules(known: int) -> list[Any]:
    """The packages' own, of so many that are known."""
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] in PACKAGES]


@cache
def _constructors(known: int) -> list[Any]:
    """Of their classes, those that have bound a clock or could have."""
    classes = {one for module in _modules(known) for one in vars(module).values() if inspect.isclass(one)}
    return [one.__init__ for one in classes if inspect.isfunction(one.__init__) and one.__module__.startswith(PACKAGES)]


class Calendar:
    """`datetime` as far as the packages use it."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def now(self, zone: datetime.tzinfo | None = None) -> datetime.datetime:
        return self._clock.utcnow()

    def __getattr__(self, name: str) -> Any:
        return getattr(datetime.datetime, name)
