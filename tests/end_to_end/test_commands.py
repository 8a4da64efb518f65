"""Both programs as a user starts them: processes, ports, signals, and one clear line when it cannot be."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from cloud_server import keys
from support.checkpoints import checkpoint
from support.edge import checkpoints


@contextlib.contextmanager
def program(name: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running program and the line it prints when it is up."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


def finished(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    assert finished("cloud_server", "keys", "--keys", folder / "keys", "--name", "127.0.0.1").returncode == 0
    token = finished("cloud_server", "token", "--keys", folder / "keys", "--device", "phone").stdout.strip()
    assert keys.Verifier(folder / "keys").device(token) == "phone"
    (folder / "token").write_text(token)
    return folder


def test_a_phone_and_a_cloud_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    tiny, full = checkpoints()
    ask = {"model": "tandem", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    with program("cloud_server", "serve", "--model", full, "--keys", folder / "keys", "--host", "127.0.0.1",
                 "--port", 0, "--http-port", 0) as (cloud, line):  # fmt: skip
        found = re.search(r"on (\S+) \(QUIC", line)
        assert found, line
        with program("edge_agent", "serve", "--cloud", found[1], "--ca", folder / "keys" / "ca.pem", "--token-file",
                     folder / "token", "--tiny", tiny, "--full", full, "--edge-layers", 2, "--state", tmp_path,
                     "--port", 0) as (agent, line):  # fmt: skip
            url = re.search(r"http://\S+/v1", line)
            assert url, line
            client = openai.OpenAI(base_url=url[0], api_key="-", max_retries=0)
            texts = [
                client.post("/chat/completions", body=ask | {"plan": plan}, cast_to=dict)["choices"]
                for plan in ({"route": "cloud"}, {"route": "split", "split": 2})
            ]  # fmt: skip
            assert texts[0] == texts[1]
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(20) == 0
        cloud.send_signal(signal.SIGTERM)
        assert cloud.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "nowhere: neither a directory nor a built-in model"),
        (("--keys", "/nowhere"), "/nowhere/signing.key"),
        (("--slots", "0"), "--slots 0, must be at least 1"),
    ],
)
def test_a_cloud_that_cannot_start_says_why_in_one_line(folder: Path, arguments: tuple[str, str], words: str) -> None:
    given = {"--model": str(checkpoint()), "--keys": str(folder / "keys"), "--host": "127.0.0.1", "--port": "0",
             "--http-port": "0"} | {arguments[0]: arguments[1]}  # fmt: skip
    done = finished("cloud_server", "serve", *(part for pair in given.items() for part in pair))
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["cloud_server", "edge_agent"])
def test_a_port_in_use_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    model = str(checkpoint())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if name == "cloud_server":
            given = ("--model", model, "--keys", folder / "keys", "--port", 0, "--http-port", port)
        else:
            given = (
                "--no-cloud",
                "--tiny",
                checkpoints()[0],
                "--full",
                checkpoints()[1],
                "--state",
                tmp_path,
                "--port",
                port,
            )
        done = finished(name, "serve", "--host", "127.0.0.1", *given)
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "in use" in done.stderr
