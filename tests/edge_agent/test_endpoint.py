"""The agent's OpenAI endpoint over real HTTP, with the real client, and a real cloud behind it over QUIC and gRPC."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer
from cloud_server.server import running as cloud_running
from edge_agent.config import AgentConfig
from edge_agent.link import Link
from edge_agent.server import EdgeServer, serving
from protocol.transport.base import Address, Trust
from protocol.transport.grpc import connect_grpc
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer
from support.edge import checkpoints
from support.phone import expected

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "the table for two"}]
FULL = "big-1"


@pytest.fixture
async def cloud(key_folder: Path) -> AsyncIterator[CloudServer]:
    config = ServerConfig(checkpoints()[1], port=0, http_port=0, keys=key_folder, slots=2, waiting=1, threads=1)
    async with cloud_running(config) as server:
        yield server


def settings(state: Path, key_folder: Path, *clouds: Address, **changes: Any) -> AgentConfig:
    tiny, full = checkpoints()
    values: dict[str, Any] = {
        "clouds": clouds, "port": 0, "ca": (key_folder / "ca.pem").read_bytes(), "state": state, "threads": 1,
        "token": keys.issue(key_folder, "tester", 60), "edge_layers": 3,
    }  # fmt: skip
    return AgentConfig(tiny, full, **{**values, **changes})


@asynccontextmanager
async def client_of(server: EdgeServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{server.address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def edge(cloud: CloudServer, key_folder: Path, tmp_path: Path) -> AsyncIterator[EdgeServer]:
    async with serving(settings(tmp_path, key_folder, cloud.address)) as server:
        yield server


@pytest.fixture
async def client(edge: EdgeServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(edge) as client:
        yield client


@pytest.fixture
async def alone(key_folder: Path, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    """An agent without a cloud."""
    async with serving(settings(tmp_path, key_folder)) as server, client_of(server) as client:
        yield client


def reference(sampling: Sampling, tokens: int, prompt: str | None = None, tiny: bool = False) -> tuple[str, int, int]:
    """Text, answer tokens and prompt tokens."""
    folder = checkpoints()[0 if tiny else 1]
    tokenizer = ChatTokenizer.load(folder)
    ids = tokenizer.encode(prompt) if prompt else tokenizer.chat(ASK)
    answer = expected(folder, ids, sampling, tokens)
    return tokenizer.decode(answer), len(answer), len(ids)


def wish(**plan: object) -> dict[str, object]:
    return {"plan": plan}


ROUTES = [{"route": "cloud"}, {"route": "split", "split": 1}, {"route": "split", "split": 3}]


async def test_chat_is_the_same_on_every_route_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    text, count, prompt = reference(Sampling(temperature=0.8, seed=5), 20)
    for plan in ROUTES:
        asked: dict[str, Any] = {
            "model": "tandem",
            "messages": ASK,
            "temperature": 0.8,
            "seed": 5,
            "extra_body": wish(**plan),
        }
        whole = await client.chat.completions.create(max_tokens=20, **asked)
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (count, prompt)
        stream = await client.chat.completions.create(
            max_completion_tokens=20, stream=True, stream_options={"include_usage": True}, **asked
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == text
        assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == count
        for told in (whole.model_extra, chunks[-2].model_extra):
            assert told is not None
            assert told["plan"]["route"] == plan["route"]
            assert told["plan"]["exact"] is True
            assert told["plan"]["degraded"] is False
            assert told["plan"]["transport"] == "quic"
            assert told["plan"]["bytes_up"] > 100


async def test_8_bits_are_asked_for_by_request_or_by_the_agent_and_best_never_has_them(
    cloud: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    """What a request says goes before the agent's own."""
    split, seen = {"route": "split", "split": 2}, []
    for own in (16, 8):
        config = settings(tmp_path, key_folder, cloud.address, hidden_bits=own)
        async with serving(config) as server, client_of(server) as client:
            for plan in (split, split | {"hidden_bits": 8}, split | {"hidden_bits": 16}, split | {"quality": "best"}):
                got = await client.chat.completions.create(
                    model="tandem", messages=ASK, max_tokens=3, extra_body=wish(**plan)
                )
                assert got.model_extra is not None
                seen.append((got.model_extra["plan"]["hidden_bits"], got.model_extra["plan"]["exact"]))
    whole, rounded = (16, True), (8, False)
    assert seen == [whole, rounded, whole, whole, rounded, rounded, whole, whole]


async def test_completions_and_several_choices(client: openai.AsyncOpenAI) -> None:
    text, _, _ = reference(Sampling(temperature=1.0, seed=3), 6, "the table")
    asked: dict[str, Any] = {"model": FULL, "prompt": "the table", "max_tokens": 6, "temperature": 1, "seed": 3}
    one = await client.completions.create(**asked)
    listed = await client.completions.create(**asked | {"prompt": ["the table"]})
    assert listed.choices[0].text == text
    with pytest.raises(openai.BadRequestError, match="prompt: List should have at most 1 item"):
        await client.completions.create(**asked | {"prompt": ["the table", "the chair"]})
    two = await client.completions.create(n=2, **asked)
    assert one.choices[0].text == two.choices[0].text == text
    assert two.choices[1].text == reference(Sampling(temperature=1.0, seed=4), 6, "the table")[0]
    assert two.usage is not None
    assert two.usage.completion_tokens == 12
    stream = await client.completions.create(stream=True, **asked)
    assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == text


async def test_a_stop_string_ends_the_answer(client: openai.AsyncOpenAI) -> None:
    text, _, _ = reference(Sampling(), 20)
    stop = text[5:8]
    got = await client.chat.completions.create(model=FULL, messages=ASK, temperature=0, max_tokens=20, stop=[stop])
    assert got.choices[0].message.content == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"


async def test_a_missing_seed_is_chosen_and_told(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tandem", "messages": ASK, "max_tokens": 12}
    raw = await client.chat.completions.with_raw_response.create(**asked)
    first = raw.parse()
    assert first.model_extra is not None
    seed = first.model_extra["plan"]["seed"]
    assert json.loads(raw.headers["x-tandem-plan"])["seed"] == seed
    again = await client.chat.completions.create(seed=seed, **asked)
    assert again.choices[0].message.content == first.choices[0].message.content


async def test_the_header_tells_the_plan_before_the_answer(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.with_streaming_response.create(
        model="tandem", messages=ASK, max_tokens=4, stream=True, extra_body=wish(route="split", split=2)
    ) as response:
        told = json.loads(response.headers["x-tandem-plan"])
        assert (told["route"], told["split"], told["model"]) == ("split", 2, FULL)
        assert told["predicted"]["total_ms"] > 0
        lines = [line async for line in response.iter_lines()]
    assert lines[-2:] == ["data: [DONE]", ""]


async def test_the_plan_endpoint_scores_and_runs_nothing(edge: EdgeServer, client: openai.AsyncOpenAI) -> None:
    for body in ({"messages": ASK}, {"prompt": "the table"}):
        found: Any = await client.post("/plan", body={"model": "tandem", **body}, cast_to=object)
        places = [(one["route"], one["split"]) for one in found["plan"]["candidates"]]
        splits, drafted = [("split", split) for split in (1, 2, 3)], [("speculative", split) for split in range(4)]
        assert places == [("local", 0), ("cloud", 0), *splits, *drafted]
        assert all(one["cost"] > 0 for one in found["plan"]["candidates"])
        assert found["conditions"]["cloud"]["address"] == str(edge.agent.config.clouds[0])
    assert edge.agent.under_way == []
    decisions: Any = await client.get("/decisions", cast_to=object)
    assert decisions["data"] == []


async def test_decisions_keep_predicted_and_measured(client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model=FULL, messages=ASK, max_tokens=5)
    found: Any = await client.get("/decisions", cast_to=object)
    (one,) = found["data"]
    assert one["plan"]["predicted"]["first_token_ms"] > 0
    assert one["measured"]["first_token_ms"] > 0
    assert one["measured"]["tokens"] == 5
    assert one["conditions"]["phone"]["full"]["decode"] > 0


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "gpt-9"}, 404, "gpt-9"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "must be 1 to 1023"),
        ({"plan": {"route": "teleport"}}, 400, "plan.route"),
        ({"plan": {"speed": "fast"}}, 400, "plan.speed"),
        ({"plan": {"split": 9}}, 400, "split 9, the phone holds layers for 1 to 3"),
        ({"plan": {"split": 2, "route": "cloud"}}, 400, "goes with route 'split'"),
        ({"plan": {"route": "cloud", "privacy": "device"}}, 400, "forbids"),
        ({"plan": {"quality": "superb"}}, 400, "plan.quality"),
        ({"model": "small-1", "plan": {"route": "cloud"}}, 400, "on the phone only"),
        ({"plan": {"hidden_bits": 4}}, 400, "plan.hidden_bits"),
        ({"plan": {"hidden_bits": 8, "quality": "best"}}, 400, "quality 'best' is exact"),
        ({"plan": {"privacy": "device", "quality": "best"}}, 503, "no plan may run"),
        ({"plan": {"draft": 4}}, 400, "goes with route 'speculative' or 'cloud'"),
        ({"plan": {"draft": 65, "route": "speculative"}}, 400, "plan.draft"),
        ({"plan": {"draft": 0, "route": "speculative"}}, 400, "must be 1 to 64"),
        ({"plan": {"split": 0, "route": "split"}}, 400, "split 0 is route 'cloud'"),
        ({"plan": {"deadline_ms": 0}}, 400, "plan.deadline_ms"),
        ({"plan": {"max_bytes": -1}}, 400, "plan.max_bytes"),
        ({"plan": {"deadline_ms": 0.001}}, 503, "predicted, the deadline is 0.001 ms"),
        ({"plan": {"route": "speculative"}}, 503, "cloud: none is configured"),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused_in_words(
    alone: openai.AsyncOpenAI, change: dict[str, object], status: int, word: str
) -> None:
    body = {"model": "tandem", "messages": ASK, "max_tokens": 3} | change
    with pytest.raises(openai.APIStatusError, match=word) as refused:
        await alone.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.status_code == status
    assert isinstance(refused.value.body, dict)
    assert refused.value.body.keys() == {"message", "type", "param", "code"}


async def test_without_a_cloud_answers_are_degraded_and_best_gets_503(alone: openai.AsyncOpenAI) -> None:
    text, _, _ = reference(Sampling(), 8, tiny=True)
    asked: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 8}
    for model, quality, degraded in (
        ("tandem", "balanced", True),
        ("tandem", "fast", True),
        ("small-1", "fast", False),
    ):
        got = await alone.chat.completions.create(model=model, extra_body=wish(quality=quality), **asked)
        assert got.choices[0].message.content == text
        assert got.model_extra is not None
        assert got.model_extra["plan"]["degraded"] is degraded
    with pytest.raises(openai.InternalServerError, match="cloud: none is configured") as refused:
        await alone.chat.completions.create(model=FULL, **asked)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "1"


async def test_closing_a_stream_frees_the_slot_on_both_sides(
    cloud: CloudServer, edge: EdgeServer, client: openai.AsyncOpenAI
) -> None:
    for plan in ({"route": "cloud"}, {"route": "split", "split": 2}, {"route": "local"}):
        stream = await client.chat.completions.create(
            model="tandem", messages=ASK, temperature=0, stream=True, extra_body=wish(**plan)
        )
        await anext(aiter(stream))
        await stream.close()
        async with asyncio.timeout(10):
            while edge.agent.under_way or cloud.service.worker.load.running:
                await edge.agent.means.tiny.compute.call(lambda: None)
        await edge.agent.means.tiny.compute.call(lambda: None)  # a slot is given back on the compute thread
        assert edge.agent.means.full.prefixes.free_slots == edge.agent.means.tiny.prefixes.free_slots == 4


async def test_closing_a_request_that_is_not_streamed_cancels_it(edge: EdgeServer, client: openai.AsyncOpenAI) -> None:
    async def ask() -> None:
        await client.chat.completions.create(model="small-1", messages=ASK, temperature=0)

    task = asyncio.create_task(ask())
    async with asyncio.timeout(10):
        while not edge.agent.under_way:
            await edge.agent.means.tiny.compute.call(lambda: None)
        task.cancel()
        while edge.agent.under_way:
            await edge.agent.means.tiny.compute.call(lambda: None)
    (decision,) = edge.agent.decisions.described()
    assert decision["measured"]["finish"] == "cancelled"  # type: ignore[index]


def modes(folder: Path) -> list[int]:
    """Of every file in it."""
    return [path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("plan", ROUTES[:2], ids=["cloud", "split"])
async def test_the_first_request_after_a_restart_is_early_data(
    cloud: CloudServer, key_folder: Path, tmp_path: Path, plan: dict[str, object]
) -> None:
    told = []
    for _ in range(2):
        async with serving(settings(tmp_path, key_folder, cloud.address)) as server, client_of(server) as client:
            got = await client.chat.completions.create(
                model=FULL, messages=ASK, temperature=0, max_tokens=8, extra_body=wish(**plan)
            )
            assert got.choices[0].message.content == reference(Sampling(), 8)[0]
            assert got.model_extra is not None
            told.append(got.model_extra["plan"]["early_data"])
    assert told == [False, True]
    assert set(modes(tmp_path)) == {0o600}


async def test_a_network_without_udp_uses_grpc(cloud: CloudServer, key_folder: Path, tmp_path: Path) -> None:
    trust = Trust((key_folder / "ca.pem").read_bytes())

    async def no_udp(address: Address) -> Any:
        await asyncio.Event().wait()

    link = Link(cloud.address, no_udp, lambda address: connect_grpc(address, trust))
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(settings(tmp_path, key_folder), [link]))
        client = await stack.enter_async_context(client_of(server))
        for plan in ROUTES[:2]:
            got = await client.chat.completions.create(
                model=FULL, messages=ASK, temperature=0, max_tokens=8, extra_body=wish(**plan)
            )
            assert got.choices[0].message.content == reference(Sampling(), 8)[0]
            assert got.model_extra is not None
            assert got.model_extra["plan"]["transport"] == "grpc"


def stop_computing(clouds: list[CloudServer], after: int) -> tuple[asyncio.Future[int], threading.Event]:
    """Whichever server has run so many steps first, by its index, stands still until the event is set."""
    standing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    go_on, steps = threading.Event(), Counter[int]()

    def watch(index: int, cloud: CloudServer) -> None:
        worker = cloud.service.worker

        def seen(*_: object) -> None:
            steps[index] += 1
            if steps[index] == after and not standing.done():
                worker._compute.post(go_on.wait)
                standing.set_result(index)

        worker.seen = seen

    for index, cloud in enumerate(clouds):
        watch(index, cloud)
    return standing, go_on


@pytest.mark.parametrize("plan", ROUTES[:2], ids=["cloud", "split"])
async def test_a_server_that_goes_in_mid_answer_is_replaced(
    key_folder: Path, tmp_path: Path, plan: dict[str, object]
) -> None:
    text, _, _ = reference(Sampling(temperature=0.8, seed=5), 60)
    config = ServerConfig(checkpoints()[1], port=0, http_port=0, keys=key_folder, slots=2, threads=1)
    async with AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(AsyncExitStack()) for _ in range(2)]
        clouds = [await end.enter_async_context(cloud_running(config)) for end in ends]
        addresses = (cloud.address for cloud in clouds)
        standing, go_on = stop_computing(clouds, after=6)
        stack.callback(go_on.set)
        server = await stack.enter_async_context(serving(settings(tmp_path, key_folder, *addresses)))
        client = await stack.enter_async_context(client_of(server))
        stream = await client.chat.completions.create(
            model=FULL, messages=ASK, temperature=0.8, seed=5, max_tokens=60, stream=True, extra_body=wish(**plan)
        )
        closing = asyncio.create_task(ends[await standing].aclose())
        chunks = [chunk async for chunk in stream]
        go_on.set()
        await closing
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == text
    told = chunks[-1].model_extra
    assert told is not None
    assert (told["plan"]["attempts"], told["plan"]["exact"], told["plan"]["degraded"]) == (2, True, False)


async def test_a_bad_token_is_told(cloud: CloudServer, key_folder: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, key_folder, cloud.address, token="not-a-token")
    async with serving(config) as server, client_of(server) as client:
        for error in (openai.AuthenticationError, openai.InternalServerError):  # then the plan itself is refused
            with pytest.raises(error, match="token"):
                await client.chat.completions.create(model=FULL, messages=ASK, extra_body=wish(route="cloud"))


async def test_health_models_and_metrics(edge: EdgeServer, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model=FULL, messages=ASK, max_tokens=3, extra_body=wish(route="cloud"))
    async with httpx.AsyncClient(base_url=f"http://{edge.address}") as http:
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/ready")).json() == {"status": "ready", "cloud": "ok"}
        metrics = (await http.get("/metrics")).text
        edge.agent.draining = True
        assert (await http.get("/ready")).status_code == 503
    assert 'tandem_edge_answers_total{finish="length",route="cloud"} 1.0' in metrics
    assert "tandem_edge_cloud_reachable 1.0" in metrics
    names = [model.id async for model in client.models.list()]
    assert names == ["tandem", "small-1", FULL]
    assert [(await client.models.retrieve(name)).id for name in names] == names
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here"):
        await client.models.retrieve("gpt-9")
