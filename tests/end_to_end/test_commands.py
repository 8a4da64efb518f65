"""Both programs as a user starts them: processes, ports, signals, and the same text on every route."""

from __future__ import annotations

from pathlib import Path

import openai

from support.edge import checkpoints
from support.programs import agent_arguments, cloud_arguments, make_keys, program


def test_a_phone_and_a_cloud_from_the_command_line(tmp_path: Path) -> None:
    tiny, full = checkpoints()
    keys, token = make_keys(tmp_path)
    ask = {"model": "tandem", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    with program(tmp_path, "cloud_server", *cloud_arguments(full, keys)) as cloud:
        trust = ("--cloud", cloud.wire, "--ca", keys / "ca.pem", "--token-file", token, "--edge-layers", 2)
        with program(tmp_path, "edge_agent", *agent_arguments(tiny, full, tmp_path / "state", *trust)) as agent:
            client = openai.OpenAI(base_url=f"{agent.url}/v1", api_key="-", max_retries=0)
            texts = [
                client.post("/chat/completions", body=ask | {"plan": plan}, cast_to=dict)["choices"]
                for plan in ({"route": "cloud"}, {"route": "split", "split": 2})
            ]  # fmt: skip
            assert texts[0] == texts[1]
            assert agent.end() == 0
        assert cloud.end() == 0
