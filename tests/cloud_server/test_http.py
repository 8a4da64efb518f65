"""The cloud's OpenAI endpoint, over real HTTPS, with the real client."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer, running
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer
from support.checkpoints import checkpoint
from support.phone import expected

pytestmark = pytest.mark.anyio
MODEL = "tiny-llama"
ASK = [{"role": "user", "content": "the table for two"}]


@pytest.fixture
async def server(key_folder: Path) -> AsyncIterator[CloudServer]:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=key_folder, slots=2, waiting=1, threads=1)
    async with running(config) as server:
        yield server


def client_of(server: CloudServer, key_folder: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"https://{server.http}",
        verify=ssl.create_default_context(cafile=str(key_folder / "ca.pem")),
        headers={"authorization": f"Bearer {keys.issue(key_folder, 'tester', 60)}"},
    )


@pytest.fixture
async def http(server: CloudServer, key_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(server, key_folder) as client:
        yield client


@pytest.fixture
def client(server: CloudServer, http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    token = http.headers["authorization"].removeprefix("Bearer ")
    return openai.AsyncOpenAI(base_url=f"https://{server.http}/v1", api_key=token, http_client=http, max_retries=0)


def reference(sampling: Sampling, tokens: int) -> tuple[str, int]:
    tokenizer = ChatTokenizer.load(checkpoint())
    ids = expected(checkpoint(), tokenizer.chat(ASK), sampling, tokens)
    return tokenizer.decode(ids), len(ids)


async def test_what_ends_an_answer_and_how_to_draw_are_the_checkpoints(key_folder: Path, tmp_path: Path) -> None:
    """And the text of what ends it is no part of it, though the tokenizer does not call it special."""
    tokenizer, how = ChatTokenizer.load(checkpoint()), Sampling(temperature=0.8, seed=5)
    ids = expected(checkpoint(), tokenizer.chat(ASK), how, 16)
    last = next(index for index in range(4, 16) if ids[index] not in ids[:index] and ids[index] > 6)
    folder = Path(shutil.copytree(checkpoint(), tmp_path / MODEL))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[last]], "temperature": 0.8}))
    ask = {"model": MODEL, "messages": ASK, "seed": 5, "max_tokens": 16}
    async with (
        running(ServerConfig(folder, port=0, http_port=0, keys=key_folder, slots=1, threads=1)) as server,
        client_of(server, key_folder) as http,
    ):
        (choice,) = (await http.post("/v1/chat/completions", json=ask)).json()["choices"]
    assert choice["message"]["content"] == tokenizer.decode(ids[:last])
    assert choice["finish_reason"] == "stop"


async def test_chat_whole_and_streamed_are_the_model_s_own_answer(client: openai.AsyncOpenAI) -> None:
    text, count = reference(Sampling(temperature=0.8, seed=5), 20)
    whole = await client.chat.completions.create(model=MODEL, messages=ASK, temperature=0.8, seed=5, max_tokens=20)
    assert whole.choices[0].message.content == text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == count
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0.8, seed=5, max_completion_tokens=20, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == count


async def test_completion_and_several_choices(client: openai.AsyncOpenAI) -> None:
    one = await client.completions.create(model=MODEL, prompt="the table", max_tokens=6, temperature=1, seed=3)
    listed = await client.completions.create(model=MODEL, prompt=["the table"], max_tokens=6, temperature=1, seed=3)
    assert listed.choices[0].text == one.choices[0].text
    two = await client.completions.create(model=MODEL, prompt="the table", max_tokens=6, temperature=1, seed=3, n=2)
    assert len(two.choices) == 2
    assert two.choices[0].text == one.choices[0].text
    assert two.choices[1].text != one.choices[0].text
    assert two.usage is not None
    assert two.usage.completion_tokens == 12


async def test_a_stop_string_is_not_part_of_the_answer(client: openai.AsyncOpenAI) -> None:
    text, _ = reference(Sampling(), 20)
    stop = text[5:8]
    got = await client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=20, stop=stop)
    assert got.choices[0].message.content == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    client: openai.AsyncOpenAI, change: dict[str, object], word: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        await client.post("/chat/completions", body={"model": MODEL, "messages": ASK} | change, cast_to=object)


async def test_unknown_fields_and_harmless_values_are_ignored(client: openai.AsyncOpenAI) -> None:
    body = {"model": MODEL, "messages": ASK, "max_tokens": 2, "logit_bias": {}, "user": "me", "store": True, "plan": {}}
    assert await client.post("/chat/completions", body=body, cast_to=object)


async def test_errors_have_openai_s_shape(http: httpx.AsyncClient, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        await client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        await client.models.retrieve("gpt")
    (listed,) = [model async for model in client.models.list()]
    assert await client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.AuthenticationError, match="token"):
        await client.with_options(api_key="x").models.list(extra_headers={"authorization": "Bearer x"})
    got = await http.post("/v1/chat/completions", content=b"{")
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"
    assert (await http.get("/nowhere")).json()["error"]["message"]


async def test_leaving_a_stream_frees_its_slot(client: openai.AsyncOpenAI, server: CloudServer) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=900, stream=True)
    assert await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(20):
        await server.service.rooms.vacant.wait()


async def test_health_readiness_replicas_and_metrics(http: httpx.AsyncClient, server: CloudServer) -> None:
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 200
    replicas = (await http.get("/v1/replicas")).json()["replicas"]
    assert [one["address"] for one in replicas] == [str(server.address)]
    await http.post("/v1/completions", json={"model": MODEL, "prompt": "the", "max_tokens": 3})
    assert 'vllm:generation_tokens_total{model_name="tiny-llama"} 3.0' in (await http.get("/metrics")).text
    server.service.rooms.draining = True
    assert (await http.get("/ready")).status_code == 503
    refused = await http.post("/v1/completions", json={"model": MODEL, "prompt": "the"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_server_lists_its_peers(key_folder: Path, http: httpx.AsyncClient, server: CloudServer) -> None:
    peers = (f"https://{server.http}", "https://127.0.0.1:9")
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=key_folder, threads=1, peers=peers)
    async with running(config) as second:
        got = (await http.get(f"https://{second.http}/v1/replicas")).json()["replicas"]
    assert [one["reachable"] for one in got] == [True, True, False]
    assert got[1]["address"] == str(server.address)
