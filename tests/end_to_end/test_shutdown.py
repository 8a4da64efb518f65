"""Signals: what is under way finishes and new requests are refused; a second signal ends at once, and says why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.edge import checkpoints
from support.programs import Program, agent_arguments, cloud_arguments, make_keys, program

LONG: dict[str, Any] = {"prompt": "the table", "max_tokens": 900, "temperature": 0, "stream": True}  # seconds of work

DRAIN = ("--drain", 600)


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[tuple[Program, httpx.Client, dict[str, Any]]]:
    """The program, a client for it, and a long request to it."""
    tiny, full = checkpoints()
    if name == "edge_agent":
        with (
            program(folder, name, *agent_arguments(tiny, full, folder / "state", "--no-cloud", *DRAIN)) as made,
            httpx.Client(base_url=made.url, timeout=60) as http,
        ):
            yield made, http, LONG | {"model": "small-1"}
        return
    keys, token = make_keys(folder)
    with program(folder, name, *cloud_arguments(full, keys, *DRAIN)) as made:
        verify = ssl.create_default_context(cafile=str(keys / "ca.pem"))
        headers = {"authorization": f"Bearer {token.read_text().strip()}"}
        with httpx.Client(base_url=made.https, verify=verify, headers=headers, timeout=60) as http:
            yield made, http, LONG | {"model": "big-1"}


def children(made: Program) -> list[str]:
    """What the program's own processes run."""
    tasks = Path(f"/proc/{made.process.pid}/task")
    found = [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    return [Path("/proc", child, "cmdline").read_bytes().decode().rstrip("\0").split("/")[-1] for child in found]


def alone(made: Program) -> None:
    """Nothing of the program's process group is left."""
    with pytest.raises(ProcessLookupError):
        os.killpg(made.process.pid, 0)


@pytest.mark.parametrize("name", ["cloud_server", "edge_agent"])
def test_what_is_under_way_finishes_and_new_requests_are_refused(tmp_path: Path, name: str) -> None:
    with running(name, tmp_path) as (made, http, ask):
        with http.stream("POST", "/v1/completions", json=ask) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert children(made) == ["render.py"]
            made.process.send_signal(signal.SIGTERM)
            made.wait_for("drain")
            refused = http.post("/v1/completions", json=ask | {"stream": False})
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert said[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert made.process.wait(60) == 0
        alone(made)
        assert "cancelled at the deadline" not in made.log.read_text()


@pytest.mark.parametrize("name", ["cloud_server", "edge_agent"])
def test_a_second_signal_ends_at_once_and_says_why(tmp_path: Path, name: str) -> None:
    with running(name, tmp_path) as (made, http, ask):
        with http.stream("POST", "/v1/completions", json=ask) as stream:
            lines = stream.iter_lines()
            next(lines)
            made.process.send_signal(signal.SIGTERM)
            made.process.send_signal(signal.SIGINT)  # another, since a pending one is not pending twice
            said = [line for line in lines if line]
        assert json.loads(said[-2][6:])["error"]["code"] == "draining"
        assert said[-1] == "data: [DONE]"
        assert made.process.wait(60) == 0
        alone(made)
        assert "1 answers cancelled" in made.log.read_text() or "1 sessions cancelled" in made.log.read_text()
