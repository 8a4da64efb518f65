"""The one thread of a program that runs torch, and its crossing to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from split_model.threads import settle

T = TypeVar("T")
log = logging.getLogger(__name__)


class Compute:
    """Runs functions one after the other on a thread of its own. Made inside a running event loop.

    `threads` of torch's pool, by default as many as suit the machine.
    `failure` is the first exception that a posted function raised; it is logged, and the thread goes on.
    """

    def __init__(self, threads: int | None = None):
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(threads,), name="compute", daemon=True)
        self._thread.start()

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Runs it later, first in first out; from any thread. Raises RuntimeError once closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the compute thread is closed")
            self._jobs.put(lambda: function(*args))

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Posts and awaits. A call that is cancelled before its turn does not run; one that runs is not broken off."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            if future.cancelled():
                return
            try:
                result = function(*args)
            except Exception as error:  # whatever it is, it belongs to the caller
                self.to_loop(settle, None, error)
            else:
                self.to_loop(settle, result, None)

        self.post(job)
        return await future

    def do_next(self, wait_s: float) -> bool:
        """From a job: does the next one now, if there is one within `wait_s` seconds; False if there was none."""
        try:
            job = self._jobs.get(timeout=wait_s)
        except queue.Empty:
            return False
        if job is None:  # the end is for `_work`
            self._jobs.put(None)
            return False
        self._do(job)
        return True

    def to_loop(self, function: Callable[..., object], *args: object) -> None:
        """From the compute thread: runs it on the event loop. Nothing happens once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Finishes what was posted and ends the thread. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def aclose(self) -> None:
        """`close` without holding up the event loop."""
        await asyncio.to_thread(self.close)

    def _work(self, threads: int | None) -> None:
        settle(threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                self._do(job)

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:  # the thread serves everyone and must outlive one bad job
            log.exception("a job on the compute thread failed")
            self.failure = self.failure or error


def release_heap() -> None:
    """Gives freed memory back to the system: loading a model leaves tens of MB of it, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim, and seldom needs it
        ctypes.CDLL(None).malloc_trim(0)
