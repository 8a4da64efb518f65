"""Log lines that stay one line, and signals."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import textwrap

import pytest

from protocol.process import FIELDS, JsonLines, PlainLines

PROGRAM = """
    import asyncio, sys
    from protocol.process import Signals, either

    async def main(ready):
        signals, asked = Signals(), asyncio.Event()
        if ready:
            signals.ready(asked.set)
        print("up", flush=True)
        await either(asked, limit_s=None)
        print("asked", flush=True)
        await either(signals.hurried, limit_s=None)
        print("hurried", flush=True)
        await asyncio.Event().wait()

    asyncio.run(main(len(sys.argv) > 1))
"""


def run(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_that_still_loads_ends_at_once(number: signal.Signals) -> None:
    with run() as process:
        assert said(process) == "up"
        process.send_signal(number)
        assert process.wait(60) == 128 + number


def test_the_first_signal_asks_the_second_hurries_the_third_ends() -> None:
    with run("ready") as process:
        assert said(process) == "up"
        for word in ("asked", "hurried"):
            process.send_signal(signal.SIGTERM)
            assert said(process) == word
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    program = """
        import logging
        from protocol.process import set_up_logging
        set_up_logging("plain", "info")
        logging.info("lost")
        print("going on")
    """
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", textwrap.dedent(program)]
        assert subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True).stdout == "going on\n"


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("name", logging.INFO, "", 0, message, arguments, None)
    if fields:
        setattr(made, FIELDS, fields)
    return made


HOSTILE = "a\nINFO other: b\r\x1b[31m\x85\u2028c\ud800"


@pytest.mark.parametrize("lines", [JsonLines(), PlainLines()])
@pytest.mark.parametrize("made", [record("%s", HOSTILE), record("request", device=HOSTILE, tokens=3)])
def test_what_a_peer_wrote_cannot_begin_another_line(lines: logging.Formatter, made: logging.LogRecord) -> None:
    said = lines.format(made)
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said


def test_fields_come_back_from_json_and_read_well_in_plain() -> None:
    made = record("request", device="my phone", route="cloud", total_ms=1.5, early=None)
    found = json.loads(JsonLines().format(made))
    assert (found["device"], found["total_ms"], found["logger"], found["level"]) == ("my phone", 1.5, "name", "info")
    assert PlainLines().format(made).endswith('name: device="my phone" route=cloud total_ms=1.5 early=None')


def test_a_trace_is_kept() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = logging.LogRecord("name", logging.ERROR, "", 0, "broke", (), sys.exc_info())
    assert "ValueError: why" in json.loads(JsonLines().format(made))["trace"]
    assert "ValueError: why" in PlainLines().format(made)
