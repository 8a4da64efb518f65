"""How both programs log and end, and the flags of that."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["plain", "json"]
FIELDS = "fields"  # of a log record: what it says, in parts
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MOST_DRAIN_S = 86_400.0
CHATTY = ("quic", "httpx", "httpcore", "uvicorn")  # at INFO they repeat what one line a request says
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BARE = re.compile(r"[\w.,:/+@\[\]-]+", re.ASCII)


def add_flags(serve: argparse.ArgumentParser, what: str, drain_s: float) -> None:
    """`--drain`, which is how long `what` may finish, and the log's format and level."""
    serve.add_argument("--drain", type=float, default=drain_s, metavar="S",
                       help=f"how long {what} may finish at the end")  # fmt: skip
    serve.add_argument("--log-format", choices=("plain", "json"), default="plain")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def check_flags(given: argparse.Namespace) -> None:
    """Raises ValueError that names the flag."""
    if not 0 <= given.drain <= MOST_DRAIN_S:
        raise ValueError(f"--drain {given.drain:g}, must be 0 to {MOST_DRAIN_S:g} s")


def set_up_logging(style: LogFormat, level: str) -> None:
    """One line a record on stderr; whatever a peer had a hand in cannot begin another."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else PlainLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("quic").setLevel(logging.ERROR)  # every bad packet of a stranger is a warning there


def settle() -> None:
    """To be called once all is loaded: the garbage collector leaves that alone from now on, and comes the more often
    for closed connections, which are cycles that hold sockets and 40 KB each.
    """
    gc.collect()
    gc.freeze()


def announce(log: logging.Logger, style: LogFormat, message: str) -> None:
    """The program is up: for people a line on stdout, for machines a record like the others."""
    if style == "json":
        log.info(message)
    else:
        print(message, flush=True)


class JsonLines(logging.Formatter):
    """An object a record: time, level, logger, and its message or fields."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, FIELDS, None)
        said |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said, separators=(",", ":"), default=str)


class PlainLines(logging.Formatter):
    """For people: `time LEVEL logger: message`, fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, None)
        message = _CONTROL.sub(_escaped, record.getMessage()) if fields is None else logfmt(fields)
        line = f"{_time(record)} {record.levelname} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def logfmt(fields: Mapping[str, object]) -> str:
    """`name=value …`, values that are not plain words in quotes."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: object) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Signals:
    """SIGTERM and SIGINT: until the program is ready they end it where it stands; then the first asks it to
    end, the second to hurry, and a third ends it where it stands. Made inside a running event loop.
    """

    def __init__(self) -> None:
        self.hurried = asyncio.Event()
        self._asked = False
        self._first: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._caught, number)

    def ready(self, first: Callable[[], None]) -> None:
        """From now on there is something to give back; `first` is called at the first signal."""
        self._first = first

    def _caught(self, number: signal.Signals) -> None:
        if self._first is None or self.hurried.is_set():
            os._exit(128 + number)
        if self._asked:
            self.hurried.set()
        else:
            self._asked = True
            self._first()


async def either(*events: asyncio.Event, limit_s: float | None) -> None:
    """Waits until one of the events is set, or for so many seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
