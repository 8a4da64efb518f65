"""A device from its first token to its last: fingerprint, renewal, revocation, with the commands that ops type."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path

import httpx

from cloud_server.__main__ import main
from support.edge import checkpoints
from support.programs import agent_arguments, cloud_arguments, program, until

ASK = {"model": "tandem", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
OUT_WITHIN_S = 30.0


def command(*arguments: object) -> str:
    """What `cloud-server` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([str(one) for one in arguments]) == 0
    return said.getvalue()


def ask(url: str) -> httpx.Response:
    body = ASK | {"plan": {"route": "cloud", "quality": "best"}}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_a_device_is_let_in_kept_in_and_put_out(tmp_path: Path) -> None:
    tiny, full = checkpoints()
    keys, token = tmp_path / "keys", tmp_path / "token"
    fingerprint = command("keys", "--keys", keys, "--name", "localhost", "--name", "127.0.0.1").split()[-1]
    with program(tmp_path, "cloud_server", *cloud_arguments(full, keys)) as cloud:
        command("token", "--keys", keys, "--device", "phone", "--ttl", 24, "--out", token)
        first = token.read_text()
        trust = ("--cloud", cloud.wire, "--fingerprint", fingerprint, "--token-file", token,
                 "--token-url", f"{cloud.https}/v1/token", "--edge-layers", 0)  # fmt: skip
        with program(tmp_path, "edge_agent", *agent_arguments(tiny, full, tmp_path / "state", *trust)) as agent:
            until(lambda: token.read_text() != first, "a new token")
            assert token.stat().st_mode & 0o777 == 0o600
            assert ask(agent.url).json()["plan"]["route"] == "cloud"
            began = time.monotonic()
            command("revoke", "--keys", keys, "--device", "phone")
            until(lambda: ask(agent.url).status_code != 200, "the device to be out")
            assert time.monotonic() - began < OUT_WITHIN_S
            assert "'phone' was revoked" in ask(agent.url).text
            for path in (tmp_path / "state").rglob("*"):
                assert path.stat().st_mode & 0o077 == 0, path
            assert agent.end() == 0
        assert first.strip() not in cloud.log.read_text() + agent.log.read_text()
        assert token.read_text().strip() not in cloud.log.read_text() + agent.log.read_text()
        assert cloud.end() == 0
