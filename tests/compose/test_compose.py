"""docker-compose.yml, run for real: two servers in containers, an agent outside of them. See `make test-compose`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.programs import Program, program, until

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT, MOST_BYTES, START_S = "tandem-test", 1.2e9, 300.0
ASK: dict[str, Any] = {
    "model": "tandem", "messages": [{"role": "user", "content": "I want to find a restaurant in San Jose."}],
    "max_tokens": 24, "temperature": 0, "plan": {"route": "cloud"},
}  # fmt: skip


def compose_command() -> list[str]:
    """`$COMPOSE`, or whichever of the two there is."""
    if given := os.environ.get("COMPOSE"):
        return given.split()
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def free_port() -> int:
    """For UDP and TCP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind(("0.0.0.0", 0))
            udp.bind(("0.0.0.0", tcp.getsockname()[1]))
            return int(tcp.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Stack:
    """The containers, and what is known of them outside."""

    command: list[str]
    environment: dict[str, str]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments], cwd=ROOT, env=os.environ | self.environment, text=True,
            capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def wire(self, server: int) -> str:
        return f"127.0.0.1:{self.environment[f'WIRE_{server}']}"

    def https(self, server: int, verify: ssl.SSLContext | bool, token: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"https://127.0.0.1:{self.environment[f'HTTPS_{server}']}"
        return httpx.Client(base_url=url, verify=verify, headers=headers, timeout=60)

    def inspected(self, name: str) -> dict[str, Any]:
        done = subprocess.run(["docker", "inspect", name], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found

    def container(self, service: str) -> dict[str, Any]:
        return self.inspected(self("ps", "-a", "-q", service).strip())


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Built and up; taken down with all that it made, whatever happens."""
    if not request.config.getoption("--compose"):
        pytest.skip("builds and runs containers: make test-compose")
    command = compose_command()
    if not command:
        pytest.skip("there is neither `docker compose` nor `docker-compose`")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True) if shutil.which("docker") else None
    if engine is None or engine.returncode:
        pytest.skip(f"no container engine answers: {engine.stderr.strip()[-200:] if engine else 'no docker'}")
    ports = {name: str(free_port()) for name in ("WIRE_1", "WIRE_2", "HTTPS_1", "HTTPS_2")}
    made = Stack(
        command, ports | {"COMPOSE_PROJECT_NAME": PROJECT, "TANDEM_IMAGE": PROJECT, "TANDEM_HOST": "127.0.0.1",
                          "TINY": "/models/assistant-2m"}
    )  # fmt: skip
    try:
        made("build")
        made("up", "-d")
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            print(made("logs", "--no-color", "--tail=200"))
        made("--profile", "admin", "down", "-v", "--remove-orphans")


def ready(stack: Stack, server: int, verify: ssl.SSLContext | bool) -> None:
    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError), stack.https(server, verify) as http:
            return http.get("/ready").status_code == 200
        return False

    until(answers, f"server {server} is ready", START_S)


def asked(agent: Program) -> dict[str, Any]:
    """Asks the agent, and returns the answer."""
    got = httpx.post(f"{agent.url}/v1/chat/completions", json=ASK, timeout=60)
    assert got.status_code == 200, got.text
    found: dict[str, Any] = got.json()
    assert found["plan"]["route"] == "cloud", found["plan"]
    return found


@pytest.mark.timeout(3600)
def test_two_servers_and_an_agent_outside(stack: Stack, tmp_path: Path) -> None:
    check_containers(stack)
    for server in (1, 2):
        ready(stack, server, verify=False)
    assert stack("logs", "--no-color").count("drafts by assistant-2m") == 2
    ca = check_keys(stack, tmp_path)
    trust = ssl.create_default_context(cafile=str(ca))
    token, admin = (
        stack("run", "--rm", "-T", "admin", "token", "--device", device, "--scope", scope, "--ttl", "3600").strip()
        for device, scope in (("phone", "generate"), ("ops", "admin"))
    )
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(token)
    with stack.https(1, trust, token) as http:
        replicas = http.get("/v1/replicas").json()["replicas"]
    assert [one["address"] for one in replicas] == [stack.wire(1), stack.wire(2)]
    assert all(one["reachable"] for one in replicas)
    given = ("--cloud", stack.wire(1), "--cloud", stack.wire(2), "--ca", ca, "--token-file", tmp_path / "token",
             "--state", tmp_path / "state", "--port", 0, "--threads", 1, "--drain", 1)  # fmt: skip
    with program(tmp_path, "edge_agent", "serve", *given) as agent:
        answer = asked(agent)
        serving = 1 if answer["plan"]["replica"] == stack.wire(1) else 2
        other = 3 - serving
        assert answer["plan"]["transport"] == "quic"

        stack("stop", f"cloud-{serving}")
        moved = asked(agent)
        assert moved["plan"]["replica"] == stack.wire(other)
        assert moved["choices"] == answer["choices"]
        assert stack.container(f"cloud-{serving}")["State"]["ExitCode"] == 0
        stack("start", f"cloud-{serving}")
        ready(stack, serving, trust)

        check_drain(stack, other, trust, admin)
        assert asked(agent)["choices"] == answer["choices"]

        stack("restart", "cloud-1", "cloud-2")
        for server in (1, 2):
            ready(stack, server, trust)  # the same CA
        assert asked(agent)["choices"] == answer["choices"]
        for server in (1, 2):
            with stack.https(server, trust, token) as http:  # and the same signing key
                assert http.get("/v1/models").status_code == 200
            with stack.https(server, trust) as http:
                assert http.get("/v1/models").status_code == 401
        assert agent.end() == 0
    check_logs(stack, token)


def check_containers(stack: Stack) -> None:
    image = stack.inspected(PROJECT)
    assert image["Size"] < MOST_BYTES
    for name in ("cloud-1", "cloud-2"):
        found = stack.container(name)
        assert found["Config"]["User"] == "10001:10001"
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["HostConfig"]["PidsLimit"] == 128
        assert found["HostConfig"]["Memory"] == 2 << 30
        until(partial(healthy, stack, name), f"{name} is healthy", START_S)


def healthy(stack: Stack, name: str) -> bool:
    return bool(stack.container(name)["State"]["Health"]["Status"] == "healthy")


def check_keys(stack: Stack, folder: Path) -> Path:
    """The CA as the server gives it out is the one whose fingerprint the operator reads."""
    with stack.https(1, verify=False) as http:
        pem = http.get("/ca.pem").text
    fingerprint = stack("run", "--rm", "-T", "admin", "keys", "fingerprint").strip()
    assert fingerprint.replace(":", "").lower() == hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    (folder / "ca.pem").write_text(pem)
    return folder / "ca.pem"


def check_drain(stack: Stack, server: int, trust: ssl.SSLContext, admin: str) -> None:
    """It ends, and its restart policy brings it back."""
    before = stack.container(f"cloud-{server}")["State"]["StartedAt"]
    with stack.https(server, trust, admin) as http:
        assert http.post("/admin/drain").status_code == 202
    back = lambda: stack.container(f"cloud-{server}")["State"]["StartedAt"] != before  # noqa: E731
    until(back, "the drained server is back", START_S)
    assert stack.container(f"cloud-{server}")["RestartCount"] == 1
    ready(stack, server, trust)


def check_logs(stack: Stack, token: str) -> None:
    said = stack("logs", "--no-color", "cloud-1", "cloud-2")
    assert said.count('"route":"cloud"') >= 4
    assert "San Jose" not in said
    assert token[:30] not in said
