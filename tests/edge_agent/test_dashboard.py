"""The page's files, and the events behind it: bounded, silent about texts, and out of the way at the end."""

from __future__ import annotations

import asyncio
import json
import re
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_agent.conditions import Power
from edge_agent.config import AgentConfig
from edge_agent.dashboard import EVERY_S, LISTENERS, Dashboard, Listener, Sample, cloud_bytes
from edge_agent.decisions import Decision, Outcome
from edge_agent.job import Route
from edge_agent.plan import choose
from edge_agent.server import EdgeServer, serving
from support.edge import agent, begin, checkpoints, conditions, job, pair, phone, text_of

pytestmark = pytest.mark.anyio
FOLDER = Path(__file__).resolve().parents[2] / "edge_agent" / "page"
ASK: dict[str, Any] = {"model": "small-1", "prompt": "the table", "max_tokens": 20, "temperature": 0}


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[tuple[EdgeServer, httpx.AsyncClient]]:
    """An agent without a cloud, and a client that is gone before it."""
    tiny, full = checkpoints()
    config = AgentConfig(tiny, full, port=0, state=folder, edge_layers=0, threads=1, **settings)
    async with serving(config) as server:
        yield server, httpx.AsyncClient(base_url=f"http://{server.address}", timeout=60)


async def events(stream: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in stream.aiter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


async def said(listener: Listener) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await anext(listener)).removeprefix("data: "))
    return found


async def test_the_page_is_files_of_its_own_folder_under_a_strict_policy(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, http), http:
        index = await http.get("/")
        named = re.findall(r'(?:src|href)="([^"]+)"', index.text)
        names = {one.removeprefix("page/") for one in named} | {path.name for path in FOLDER.iterdir()}
        assert index.headers["content-type"].startswith("text/html")
        for name in names:
            found = await http.get(f"/page/{name}")
            assert found.status_code == 200, name
            assert found.content == (FOLDER / name).read_bytes()
            assert found.headers["x-content-type-options"] == "nosniff"
            policy = found.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            again = await http.get(f"/page/{name}", headers={"if-none-match": found.headers["etag"]})
            assert again.status_code == 304
        for path in ("/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page"):
            assert (await http.get(path)).status_code == 404, path
        refused = await http.delete("/v1/plan")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_the_page_has_no_script_style_or_address_in_its_markup() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    for path in FOLDER.iterdir():
        addresses = set(re.findall(r"\w+://[^\"'\s]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path


def test_an_installed_agent_has_the_page() -> None:
    made = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in made["edge_agent"] for path in FOLDER.parent.glob(pattern)}
    assert packed >= {path for path in FOLDER.rglob("*") if path.is_file()}


async def test_events_begin_with_a_snapshot_and_follow_an_answer_without_its_words(tmp_path: Path) -> None:
    secret = "xylophone-in-the-prompt"
    body = {**ASK, "prompt": f"{secret} the table", "stop": ["a-secret-stop"]}
    async with served(tmp_path) as (_, http), http, http.stream("GET", "/v1/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = events(stream)
        first = await anext(told)
        assert first["agent"] == {"tiny": "small-1", "full": "big-1", "edge_layers": 0, "layers": 5}
        assert (first["live"], first["answers"], first["decision"]) == ([], [], None)
        assert first["samples"][0]["replica"] is None
        answer = (await http.post("/v1/completions", json=body)).json()
        heard = [first]
        while not heard[-1].get("decision"):
            heard.append(await anext(told))
        (ended,) = heard[-1]["answers"]
        decided = (await http.get("/v1/decisions")).json()["data"][0]
        assert heard[-1]["decision"] == decided
        assert (ended["id"], ended["tokens"]) == (decided["id"], answer["usage"]["completion_tokens"])
        everything = json.dumps(heard, ensure_ascii=False)
        for words in (secret, "a-secret-stop", answer["choices"][0]["text"]):
            assert words not in everything


async def test_an_answer_under_way_is_told_of_at_most_four_times_a_second(tmp_path: Path) -> None:
    async with agent(tmp_path) as made:
        listener = Listener(Dashboard(made))
        assert (await said(listener))["live"] == []
        answer = await begin(made, job(max_tokens=3))
        before = time.monotonic()
        for _ in range(4):
            (live,) = (await said(listener))["live"]
            assert (live["so_far"]["tokens"], live["so_far"]["finish"]) == (0, "running")
        assert time.monotonic() - before > 4 * EVERY_S * 0.9
        await text_of(answer)
        news = await said(listener)
        assert news["live"] == []
        assert [one["tokens"] for one in news["answers"]] == [3]


async def test_whoever_reads_late_hears_of_everything_at_once(tmp_path: Path) -> None:
    async with agent(tmp_path) as made:
        board = Dashboard(made)
        late = Listener(board)
        await said(late)
        for _ in range(3):
            await text_of(await begin(made, job(max_tokens=2)))
        assert len((await said(late))["answers"]) == 3
        assert len((await said(Listener(board)))["answers"]) == 3


async def test_listeners_are_limited_and_those_that_left_make_room(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, http), http, AsyncExitStack() as stack:
        for _ in range(LISTENERS):
            await stack.enter_async_context(http.stream("GET", "/v1/events"))
        refused = await http.get("/v1/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_listeners")
        assert int(refused.headers["retry-after"]) >= 1
        await stack.aclose()

        async def room() -> bool:
            async with http.stream("GET", "/v1/events") as stream:
                return stream.status_code == 200

        async with asyncio.timeout(30):
            while not await room():
                pass


async def test_streams_end_with_the_agent_and_hold_nothing_up(tmp_path: Path) -> None:
    """A stream that uvicorn had to cut off would end in an error."""
    async with AsyncExitStack() as stack:
        async with served(tmp_path) as (server, http):
            stream = await stack.enter_async_context(http.stream("GET", "/v1/events"))
            told = events(stream)
            await anext(told)
            await server.drain(0)
            assert (await http.get("/v1/events")).status_code == 503
        rest = [one async for one in told]
        assert [one["draining"] for one in rest if "draining" in one] in ([], [True])
        await http.aclose()


async def test_events_want_the_key_and_the_page_does_not(tmp_path: Path) -> None:
    async with served(tmp_path, api_key="sesame") as (_, http), http:
        assert (await http.get("/")).status_code == 200
        assert (await http.get("/page/app.js")).status_code == 200
        assert (await http.get("/v1/events")).status_code == 401
        assert (await http.get("/pages")).status_code == 401
        assert (await http.get("/", headers={"host": "evil.example"})).status_code == 403
        evil = {"origin": "https://evil.example", "authorization": "Bearer sesame"}
        assert (await http.get("/v1/events", headers=evil)).status_code == 403
        async with http.stream("GET", "/v1/events", headers={"authorization": "Bearer sesame"}) as stream:
            assert stream.status_code == 200


def test_a_sample_tells_of_the_governor_only_where_it_has_something_to_go_by() -> None:
    held = Sample.of(conditions(phone=phone(power=Power(0.8, 0.75, 3.75, None, "battery"))), 1.0)
    assert (held.leaves, held.level, held.governor) == (0.8, 0.75, "battery")
    free = Sample.of(conditions(), 1.0)
    assert (free.leaves, free.level) == (None, None)
    assert "off" in free.governor


def decision(route: Route, tokens: int, **outcome: Any) -> Decision:
    asked, now = job(route=route, max_tokens=10), conditions()
    plan = choose(asked, pair(), now)
    found = Outcome(route, 0, "full", "length", tokens, 0.1, 1.0, True, False, "", **outcome)
    return Decision(asked, plan, now, found)


def test_bytes_are_compared_with_those_of_the_cloud_for_the_same_answer() -> None:
    whole, half = decision(Route.LOCAL, 10), decision(Route.LOCAL, 5)
    score = next(one.score for one in whole.plan.candidates if one.score.route is Route.CLOUD and not one.score.draft)
    assert cloud_bytes(whole) == round(score.bytes_up + score.bytes_down)
    assert cloud_bytes(half) == round(score.bytes_up + score.bytes_down / 2)


def test_nothing_is_compared_without_a_cloud_or_a_whole_answer() -> None:
    whole = decision(Route.LOCAL, 10)
    alone = replace(whole, plan=choose(whole.job, pair(), conditions(cloud=None)))
    assert cloud_bytes(alone) is None
    assert cloud_bytes(replace(whole, outcome=replace(whole.outcome, finish="cancelled"))) is None
