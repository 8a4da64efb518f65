"""Who may ask the agent: pages that were made to reach it may not, nor anybody without the key."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

from edge_agent.__main__ import main
from edge_agent.config import AgentConfig
from edge_agent.local_rules import LocalRules
from edge_agent.server import serving
from protocol.api_errors import ApiError
from protocol.http_server import bound_unix
from support.edge import checkpoints

RULES = LocalRules("127.0.0.1", 8080, ("agent.example", "127.0.0.1:9999"))


def verdict(rules: LocalRules, path: str = "/v1/models", **headers: str) -> str | None:
    """The code of the refusal."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        rules.check(HTTPConnection({"type": "http", "path": path, "headers": raw}))
    except ApiError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8080", True),
        ("localhost:8080", True),
        ("LOCALHOST:8080", True),
        ("[::1]:8080", True),
        ("127.8.8.8:8080", True),
        ("127.0.0.1:9999", True),  # a forwarded port that was allowed
        ("agent.example", True),
        ("agent.example:4", True),
        ("127.0.0.1", False),
        ("127.0.0.1:80", False),
        ("localhost:9999", False),
        ("evil.example:8080", False),
        ("localhost.evil.example:8080", False),
        ("127.0.0.1.evil.example:8080", False),
        ("evil.example@localhost:8080", False),
        ("0.0.0.0:8080", False),
        ("10.0.0.1:8080", False),
        ("localhost:8080:8080", False),
        ("", False),
    ],
)
def test_only_the_agent_s_own_names_are_answered(host: str, allowed: bool) -> None:
    """A page whose name was rebound to 127.0.0.1 still says its own name."""
    assert verdict(RULES, host=host) == (None if allowed else "wrong_host")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://localhost:8080", True),
        ("https://agent.example", True),
        ("http://localhost:3000", False),
        ("http://localhost", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("file://", False),
        ("chrome-extension://localhost:8080", False),
    ],
)
def test_pages_of_other_origins_are_refused(origin: str, allowed: bool) -> None:
    assert verdict(RULES, host="localhost:8080", origin=origin) == (None if allowed else "wrong_origin")


def test_an_agent_on_every_address_has_no_address_of_its_own() -> None:
    rules = LocalRules("0.0.0.0", 8080, ("192.168.1.5:8080",))
    assert verdict(rules, host="0.0.0.0:8080") == "wrong_host"
    assert verdict(rules, host="192.168.1.5:8080") is None


def test_a_key_is_wanted_everywhere_but_where_health_is_told() -> None:
    rules = LocalRules("127.0.0.1", 80, key="sesame")
    for given in (
        {},
        {"authorization": "sesame"},
        {"authorization": "Bearer sesam"},
        {"authorization": "Bearer sesame "},
    ):
        assert verdict(rules, host="localhost", **given) == "wrong_key"
    assert verdict(rules, host="localhost", authorization="Bearer \N{SNOWMAN}") == "wrong_key"
    assert verdict(rules, host="localhost", authorization="bearer sesame") is None
    assert verdict(rules, "/health", host="localhost") is None
    assert verdict(rules, "/health", host="evil.example") == "wrong_host"


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "http://a", "a:99999"])
def test_an_allowed_host_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is neither NAME nor NAME:PORT"):
        LocalRules("127.0.0.1", 8080, (name,))


def settings(tmp_path: Path, **changes: Any) -> AgentConfig:
    tiny, full = checkpoints()
    return AgentConfig(tiny, full, port=0, state=tmp_path / "state", edge_layers=0, threads=1, **changes)


@pytest.mark.anyio
async def test_a_page_s_simple_request_does_nothing(tmp_path: Path) -> None:
    """What a browser sends for a page without asking first: a text body, and the page's origin."""
    async with serving(settings(tmp_path)) as server, httpx.AsyncClient(base_url=f"http://{server.address}") as http:
        body = '{"model": "tandem", "prompt": "hello"}'
        headers = {"origin": "https://evil.example", "content-type": "text/plain"}
        got = await http.post("/v1/completions", content=body, headers=headers)
        assert (got.status_code, got.json()["error"]["code"]) == (403, "wrong_origin")
        asked_first = await http.options("/v1/completions", headers=headers)
        assert asked_first.status_code == 403
        assert "access-control-allow-origin" not in asked_first.headers
        assert (await http.get("/v1/models", headers={"host": "evil.example"})).status_code == 403
        assert list(server.agent.decisions.described()) == []


@pytest.mark.anyio
async def test_a_unix_socket_is_this_user_s_alone_and_gone_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, key = tmp_path / "agent.sock", tmp_path / "key"
    key.write_text("sesame\n")
    key.chmod(0o600)
    async with serving(settings(tmp_path, unix=path, api_key="sesame")) as server:
        assert server.address == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        asked = ["ask", "hello", "--max-tokens", "4", "--unix", str(path)]
        assert await asyncio.to_thread(main, asked) == 2
        assert "wants its key" in capsys.readouterr().err
        assert await asyncio.to_thread(main, [*asked, "--api-key-file", str(key)]) == 0
        assert "[local by small-1" in capsys.readouterr().err
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with bound_unix(path) as first:
        with pytest.raises(OSError, match=r"cannot listen on .*agent.sock: Address already in use"), bound_unix(path):
            pass
        first.close()  # as after a crash
        with bound_unix(path):
            assert path.is_socket()
    path.write_text("mine")
    with pytest.raises(OSError, match="there is a file, and it is not a socket"), bound_unix(path):
        pass
    assert path.read_text() == "mine"
    with pytest.raises(OSError, match="cannot listen on"), bound_unix(tmp_path / ("x" * 200)):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--allow-host", "a/b"), "'a/b' is neither NAME nor NAME:PORT"),
        (("--api-key-file", "OPEN"), "has mode 0644"),
        (("--api-key-file", "/nowhere/key"), "/nowhere/key"),
        (("--unix", "OPEN"), "it is not a socket"),
    ],
)
def test_rules_that_cannot_be_kept_are_told_at_the_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, str], words: str
) -> None:
    (tmp_path / "open").write_text("sesame")
    (tmp_path / "open").chmod(0o644)
    tiny, full = checkpoints()
    given = [str(tmp_path / "open") if one == "OPEN" else one for one in arguments]
    usual = ["--tiny", str(tiny), "--full", str(full), "--state", str(tmp_path / "state"), "--port", "0"]
    assert main(["serve", "--no-cloud", *usual, *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
