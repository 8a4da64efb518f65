"""The agent's page, as a person sees it: a real browser, a real agent, and a real cloud server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from playwright.sync_api import Browser, Page, expect

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import running
from edge_agent.config import AgentConfig
from edge_agent.server import EdgeServer, serving
from support.browser import chromium, opened
from support.edge import checkpoints

QUESTION = "the table for ing at res"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def portal(browser: Browser) -> Iterator[BlockingPortal]:
    """A thread for the programs; after the browser, since without one there is nothing to do."""
    with start_blocking_portal() as made:
        yield made


def alone(portal: BlockingPortal, state: Path, **settings: Any) -> AbstractContextManager[EdgeServer]:
    """A running agent; without a cloud if none is given."""
    tiny, full = checkpoints()
    config = AgentConfig(tiny, full, **{"port": 0, "state": state, "threads": 1, "edge_layers": 2, **settings})
    return portal.wrap_async_context_manager(serving(config))


@pytest.fixture(scope="module")
def agent(portal: BlockingPortal, key_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an agent that has a cloud."""
    _, full = checkpoints()
    cloud = ServerConfig(full, port=0, http_port=0, keys=key_folder, threads=1)
    with ExitStack() as stack:
        server = stack.enter_context(portal.wrap_async_context_manager(running(cloud)))
        trust = {"ca": (key_folder / "ca.pem").read_bytes(), "token": keys.issue(key_folder, "tester", 3600)}
        made = alone(portal, tmp_path_factory.mktemp("agent"), clouds=(server.address,), **trust)
        yield f"http://{stack.enter_context(made).address}"


def connected(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("connected")


def ask(page: Page, route: str = "auto", tokens: int = 12) -> None:
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_label("Route").select_option(route)
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_label("Question").press("Enter")


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_the_page_loads_without_an_error_or_a_request_to_another_host(agent: str, browser: Browser) -> None:
    with opened(browser, "about:blank") as page:
        wrong: list[str] = []
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(agent) else wrong.append(asked.url))
        page.goto(agent)
        connected(page)
        ask(page, "cloud")
        expect(page.locator("#ran")).to_contain_text("cloud")
        expect(page.locator("#bars li").first).to_be_visible()
        expect(page.get_by_role("img", name="Round trip")).to_be_visible()
        expect(page.get_by_role("img", name="Whole answer")).to_be_visible()
        assert wrong == []


def test_an_answer_streams_into_the_page_and_its_plan_follows(agent: str, browser: Browser) -> None:
    with opened(browser, agent) as page:
        ask(page, "local")
        expect(page.locator("#ran")).to_contain_text("local small-1")
        body = {
            "model": "tandem", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12,
            "plan": {"route": "local"},
        }  # fmt: skip
        said = httpx.post(f"{agent}/v1/chat/completions", json=body, timeout=60).json()
        expect(page.get_by_role("region", name="Answer")).to_have_text(said["choices"][0]["message"]["content"])
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_an_answer_can_be_stopped(agent: str, browser: Browser) -> None:
    with opened(browser, agent) as page:
        page.evaluate(
            "new MutationObserver(() => document.getElementById('stop').click())"
            ".observe(document.getElementById('answer'), {childList: true})"
        )
        ask(page, "cloud", 900)
        expect(page.get_by_role("alert").filter(has_text="stopped")).to_be_visible()
        expect(page.locator("#live-list")).to_contain_text("Nothing runs now")


def test_what_a_refusal_says_is_shown(agent: str, browser: Browser) -> None:
    with opened(browser, agent) as page:
        page.evaluate("document.querySelector('#route').append(new Option('nowhere'))")
        ask(page, "nowhere")
        expect(page.locator("#ask-wrong")).to_contain_text("plan")
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_live_requests_appear_and_vanish(agent: str, browser: Browser) -> None:
    """An app that takes little and does not read on holds its answer up."""
    little = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])
    body = {"model": "tandem", "prompt": "the table", "max_tokens": 900, "temperature": 0, "stream": True,
            "plan": {"route": "split", "split": 2}}  # fmt: skip
    with opened(browser, agent) as page, httpx.Client(base_url=agent, timeout=60, transport=little) as http:
        connected(page)
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept, since the stream ends with it
            next(lines)
            item = page.locator("#live-list li", has_text="split 2")
            expect(item).to_contain_text("of at most 900 tokens")
            expect(item).to_contain_text("quic")
            expect(item).to_contain_text("tokens/s")
            expect(item.get_by_role("progressbar")).to_be_visible()
        expect(item).to_have_count(0)


def test_the_bars_are_those_of_the_last_decision(agent: str, browser: Browser) -> None:
    with opened(browser, agent) as page:
        ask(page, "split")
        expect(page.locator("#bars .chosen")).to_contain_text("split")
        more = page.locator("#bars-all")
        if more.is_visible():
            more.click()
        plan = httpx.get(f"{agent}/v1/decisions").json()["data"][0]["plan"]
        rows = page.locator("#bars li")
        expect(rows).to_have_count(len(plan["candidates"]))
        ranked = sorted(plan["candidates"], key=lambda one: (bool(one["refused"]), one["cost"]))
        values = [one["total_ms"] for one in ranked]  # the page may still show the decision before
        shown = "[...document.querySelectorAll('#bars li data')].map((one) => Number(one.value))"
        page.wait_for_function(f"wanted => JSON.stringify({shown}) === JSON.stringify(wanted)", arg=values)
        reasons = rows.evaluate_all(
            "all => all.map((row) => row.querySelector('.reason, .unseen')?.textContent ?? null)"
        )
        assert reasons == [one["refused"] for one in ranked]
        (chosen,) = [one for one in ranked if one["chosen"]]
        parts = page.locator("#bars .chosen .bar").evaluate_all(
            "all => all.map((one) => one.getBoundingClientRect().width)"
        )
        share = parts[0] / sum(parts)
        assert share == pytest.approx(chosen["network_ms"] / (chosen["network_ms"] + chosen["compute_ms"]), abs=0.02)


def test_a_narrow_screen_need_not_scroll_sideways(agent: str, browser: Browser) -> None:
    with opened(browser, agent, 360, 740) as page:
        ask(page, "cloud")
        expect(page.locator("#ran")).to_contain_text("cloud")
        expect(page.get_by_role("img", name="Wait in the cloud")).to_be_visible()
        page.get_by_text("The last answers as a table").click()
        if page.locator("#bars-all").is_visible():
            page.locator("#bars-all").click()
        assert fits(page)


def test_a_locked_agent_asks_for_its_key(portal: BlockingPortal, browser: Browser, tmp_path: Path) -> None:
    with alone(portal, tmp_path, api_key="sesame") as server, opened(browser, f"http://{server.address}", 360) as page:
        key, unlock = page.locator("#key-text"), page.get_by_role("button", name="Unlock")
        expect(key).to_be_focused()
        assert fits(page)
        key.fill("simsala")
        unlock.click()
        expect(page.get_by_role("alert").filter(has_text="not its key")).to_be_visible()
        key.fill("sesame")
        unlock.click()
        connected(page)
        expect(key).to_be_hidden()
        ask(page)
        expect(page.locator("#ran")).to_contain_text("small-1")
        page.reload()
        connected(page)
        assert "sesame" not in page.url
        assert page.evaluate("localStorage.length") == 0


def test_the_governor_is_shown_where_there_is_a_sensor(
    portal: BlockingPortal, browser: Browser, tmp_path: Path
) -> None:
    battery = tmp_path / "class" / "power_supply" / "battery"
    battery.mkdir(parents=True)
    for name, text in (("type", "Battery"), ("status", "Discharging"), ("power_now", "4200000")):
        (battery / name).write_text(text)
    with (
        alone(portal, tmp_path / "state", sensors=tmp_path) as server,
        opened(browser, f"http://{server.address}") as page,
    ):
        figure = page.locator("figure", has_text="Governor")
        expect(figure).to_contain_text("leaves 80 %")
        expect(figure.get_by_role("img")).to_be_visible()
        expect(page.locator("#governor")).to_contain_text("goes by battery")


def test_the_page_finds_an_agent_that_was_started_again(
    portal: BlockingPortal, browser: Browser, tmp_path: Path
) -> None:
    with opened(browser, "about:blank") as page:
        with alone(portal, tmp_path) as server:
            port = int(str(server.address).rpartition(":")[2])
            page.goto(f"http://{server.address}")
            connected(page)
            ask(page)
            expect(page.locator("#answers tr")).to_have_count(1)
        expect(page.get_by_role("status")).to_contain_text("trying again")
        with alone(portal, tmp_path, port=port):
            connected(page)
            expect(page.locator("#answers tr")).to_have_count(0)
            ask(page)
            expect(page.locator("#answers tr")).to_have_count(1)
