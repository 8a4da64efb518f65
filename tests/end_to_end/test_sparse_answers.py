"""`plan.sparse` over HTTP: on every route it chooses pages of a long prompt, and the answer is not called exact."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import running as cloud_running
from edge_agent.config import AgentConfig
from edge_agent.server import serving
from split_model.sparse import BUDGET, Pages
from split_model.tokenizer import ChatTokenizer
from support.edge import checkpoints

pytestmark = pytest.mark.anyio
SHAPE = {"max_position_embeddings": 4096, "num_hidden_layers": 2}
PROMPT = "the table for two at noon, "


def prompt() -> str:
    """Longer than what is read whole."""
    tokenizer = ChatTokenizer.load(checkpoints(**SHAPE)[1])
    return PROMPT * (11 * BUDGET.least // len(tokenizer.encode(PROMPT * 10)) + 5)


@pytest.fixture
async def client(key_folder: Path, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    tiny, full = checkpoints(**SHAPE)
    token = keys.issue(key_folder, "tester", 60)
    served = ServerConfig(full, port=0, http_port=0, keys=key_folder, slots=2, waiting=1, threads=1)
    async with cloud_running(served) as cloud:
        config = AgentConfig(tiny, full, clouds=(cloud.address,), port=0, ca=(key_folder / "ca.pem").read_bytes(),
                             state=tmp_path, threads=1, token=token, edge_layers=2)  # fmt: skip
        async with serving(config) as edge:
            url = f"http://{edge.address}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                yield client


async def test_every_route_chooses_pages_and_says_so(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, choose = [0], Pages.chosen

    def counted(*arguments: Any) -> Any:
        chosen[0] += 1
        return choose(*arguments)

    monkeypatch.setattr(Pages, "chosen", counted)
    asked: dict[str, Any] = {"model": "tandem", "prompt": prompt(), "max_tokens": 6, "temperature": 0}
    plans = [{"route": "local"}, {"route": "cloud"}, {"route": "split", "split": 1}]
    for plan in plans:
        for sparse in (True, False):
            chosen[0] = 0
            got = await client.completions.create(**asked, extra_body={"plan": plan | {"sparse": sparse}})
            assert got.model_extra is not None
            told = got.model_extra["plan"]
            assert (told["route"], told["model"], told["exact"]) == (plan["route"], "big-1", not sparse)
            assert got.usage is not None
            assert got.usage.prompt_tokens > BUDGET.least
            assert got.usage.completion_tokens == 6
            assert (chosen[0] >= 5) is sparse  # the first layer is read whole, the second chooses
