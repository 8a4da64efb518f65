"""Network namespaces inside one process: a thread of its own, whose sockets see other interfaces than the rest."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CLONE_NEWNET = 0x40000000
HERE = "/proc/thread-self/ns/net"
libc = ctypes.CDLL(None, use_errno=True)


def ip(command: str) -> None:
    """Runs `ip` in the calling thread's namespace."""
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {command}: {done.stderr}"


class Namespace:
    """A network with a loopback interface alone; it is gone when nobody is in it and `close` was called."""

    def __init__(self) -> None:
        with self._staying():
            if libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._file = os.open(HERE, os.O_RDONLY)
            ip("link set lo up")

    @property
    def path(self) -> str:
        """For `ip link … netns`."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread makes meanwhile, it makes there, the whole event loop too."""
        with self._staying():
            _enter(self._file)
            yield

    def close(self) -> None:
        os.close(self._file)

    @staticmethod
    @contextmanager
    def _staying() -> Iterator[None]:
        before = os.open(HERE, os.O_RDONLY)
        try:
            yield
        finally:
            _enter(before)
            os.close(before)


def _enter(file: int) -> None:
    if libc.setns(file, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def apart(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a scene in a thread with a network of its own. Skips, with the reason, where that cannot be had."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`")
    try:
        space = Namespace()
    except OSError as error:
        pytest.skip(f"no network namespace can be made: {error}")
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _enter(space._file)
            asyncio.run(asyncio.wait_for(scene(), 60))
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    space.close()
    if failures:
        raise failures[0]
