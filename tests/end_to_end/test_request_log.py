"""The logs of real requests on every route: one line each, the same id on both sides, and nothing of what was said."""

from __future__ import annotations

import json
import re
import ssl
from pathlib import Path
from typing import Any

import httpx

from edge_agent.traffic import PACKET_OVERHEAD
from support.edge import checkpoints
from support.programs import agent_arguments, cloud_arguments, make_keys, program, started, until

SECRET = "xylophone 4711"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 12, "temperature": 0}
REFUSED: tuple[dict[str, Any], ...] = (
    CHAT | {"max_tokens": SECRET},
    CHAT | {"stop": [SECRET] * 99},
    CHAT | {"messages": [{"role": "user", "content": SECRET * 2000}]},
    CHAT | {"messages": [{"role": SECRET, "content": SECRET}]},
    CHAT | {"model": SECRET},
)


def lines(log: Path, name: str) -> list[dict[str, Any]]:
    """The request lines of a JSON log; every line of it is JSON."""
    found = [json.loads(line) for line in log.read_text().splitlines()]
    return [one for one in found if one["logger"] == f"{name}.requests"]


def plain(log: Path) -> list[dict[str, str]]:
    """The request lines of a plain log."""
    found = [line.split(": ", 1)[1] for line in log.read_text().splitlines() if "edge_agent.requests" in line]
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in found]


def test_logs_tell_all_of_a_request_but_what_was_said(tmp_path: Path) -> None:
    tiny, full = checkpoints()
    keys, token = make_keys(tmp_path)
    secret = token.read_text().strip()
    said: list[str] = []
    with started(tmp_path, "cloud_server", *cloud_arguments(full, keys, "--log-format", "json")) as cloud:
        cloud.wait_for("serving")
        said_first = [json.loads(line).get("message", "") for line in cloud.log.read_text().splitlines()]
        where = next(line for line in said_first if "serving" in line)
        wire, https = re.findall(r"127\.0\.0\.1:\d+", where)
        trust = ("--cloud", wire, "--ca", keys / "ca.pem", "--token-file", token, "--edge-layers", 2)
        with program(tmp_path, "edge_agent", *agent_arguments(tiny, full, tmp_path / "state", *trust)) as agent:
            with httpx.Client(base_url=agent.url, timeout=60) as http:
                for plan in ({"route": "local"}, {"route": "cloud"}, {"route": "split", "split": 2}):
                    wish = {"model": "tandem", "plan": plan | {"quality": "fast"}}
                    answer = http.post("/v1/chat/completions", json=CHAT | wish)
                    said.append(answer.json()["choices"][0]["message"]["content"])
                    whole = http.post("/v1/chat/completions?key=" + secret[:40], json=CHAT | wish | {"stream": True})
                    assert "[DONE]" in whole.text
                for wrong in REFUSED:
                    assert http.post("/v1/chat/completions", json={"model": "tandem"} | wrong).status_code >= 400
            verify = ssl.create_default_context(cafile=str(keys / "ca.pem"))
            with httpx.Client(base_url=f"https://{https}", verify=verify, timeout=60) as http:
                ours, forged = {"authorization": f"Bearer {secret}"}, {"authorization": f"Bearer {secret[:-9]}"}
                answer = http.post("/v1/chat/completions", json=CHAT | {"model": "big-1"}, headers=ours)
                assert answer.status_code == 200
                answered = answer.headers["x-request-id"]
                assert http.post("/v1/completions", json=CHAT, headers=forged).status_code == 401
                for wrong in REFUSED:
                    body = {"model": "big-1"} | wrong
                    assert http.post("/v1/chat/completions", json=body, headers=ours).status_code >= 400
                http.get(f"/{secret[:30]}?{SECRET}", headers=ours)
            sessions = lambda: [one for one in lines(cloud.log, "cloud_server") if "attempt" in one]  # noqa: E731
            until(lambda: len(sessions()) == 4, "four sessions in the cloud's log")
            assert agent.end() == 0
        assert cloud.end() == 0
        phone, wired = plain(agent.log), sessions()
        over_http = [one for one in lines(cloud.log, "cloud_server") if "method" in one]
        texts = agent.log.read_text() + cloud.log.read_text()
    check_phone(phone)
    check_cloud(phone, wired, over_http)
    assert over_http[0]["request"] == answered
    private = (keys / "server.key").read_text().splitlines()[1]
    token_parts = (secret[:24], secret.split(".")[1][:24])
    for word in ("xylophone", "4711", private, *token_parts, *(text for text in said if len(text) > 6)):
        assert word not in texts


def check_phone(phone: list[dict[str, str]]) -> None:
    done = [one for one in phone if one["status"] == "200"]
    assert [one["route"] for one in done] == ["local", "local", "cloud", "cloud", "split", "split"]
    assert all(one["reason"] in ("length", "stop") and int(one["tokens_out"]) > 0 for one in done)
    assert all(int(one["tokens_in"]) > 3 and float(one["total_ms"]) >= float(one["first_token_ms"]) for one in done)
    assert all(int(one["link_up"]) > 100 and one["transport"] in ("quic", "grpc") for one in done[2:])
    assert len(phone) == 6 + len(REFUSED)
    assert {one["status"] for one in phone if one not in done} <= {"400", "404"}


def check_cloud(phone: list[dict[str, str]], wired: list[dict[str, Any]], over_http: list[dict[str, Any]]) -> None:
    shared = {one["request"]: one for one in phone if one["route"] in ("cloud", "split")}
    assert {one["request"] for one in wired} == set(shared)
    for here in wired:
        there = shared[here["request"]]
        assert here["route"] == there["route"]
        assert here["device"] == "phone"
        around = int(there["link_up"]) - here["bytes_in"]  # the phone counts the packets around the frames too
        assert around > 0
        assert around % PACKET_OVERHEAD == 0
        assert here["tokens_in"] == int(there["tokens_in"])
        assert here["reason"] in ("length", "stop", "lost")  # the phone need not wait for the end it knows
        assert here["bytes_out"] > 0
        assert here["total_ms"] >= here["first_token_ms"] > 0
    reasons = [(one["status"], one["reason"]) for one in over_http]
    assert reasons[0][0] == 200
    assert reasons[1] == (401, "unauthorized")
    assert reasons[-1] == (404, "not_found")
    assert over_http[0]["device"] == "phone"
    assert over_http[0]["tokens_out"] > 0
    assert "device" not in over_http[1]
    assert over_http[0]["endpoint"] == "/v1/chat/completions"
    assert "endpoint" not in over_http[-1]
    assert len(over_http) == 3 + len(REFUSED)
