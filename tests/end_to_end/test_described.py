"""Both programs do what their OpenAPI descriptions say, whatever is sent to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import running
from edge_agent.config import AgentConfig
from edge_agent.server import serving
from support.edge import checkpoints

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.ignored_auth,
]


@dataclass(frozen=True, slots=True)
class Served:
    """A running program, as schemathesis asks it."""

    url: str
    headers: dict[str, str]
    models: tuple[str, ...]
    verify: str | bool


@pytest.fixture(scope="module")
def both(key_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """A cloud server and an agent that has it, in a thread of their own."""
    tiny, full = checkpoints()
    ca, token = key_folder / "ca.pem", keys.issue(key_folder, "tester", 3600)
    cloud = ServerConfig(full, port=0, http_port=0, keys=key_folder, threads=1)
    with start_blocking_portal() as portal, ExitStack() as stack:
        server = stack.enter_context(portal.wrap_async_context_manager(running(cloud)))
        agent = AgentConfig(
            tiny, full, (server.address,), port=0, ca=ca.read_bytes(), token=token, threads=1, api_key="the-key",
            state=tmp_path_factory.mktemp("agent"),
        )  # fmt: skip
        edge = stack.enter_context(portal.wrap_async_context_manager(serving(agent)))
        yield {
            "cloud": Served(f"https://{server.http}", {"Authorization": f"Bearer {token}"}, (full.name,), str(ca)),
            "agent": Served(
                f"http://{edge.address}", {"Authorization": "Bearer the-key"}, ("tandem", tiny.name, full.name), True
            ),
        }


@pytest.fixture(params=["cloud", "agent"], scope="module")
def served(request: pytest.FixtureRequest, both: dict[str, Served]) -> Served:
    return both[request.param]


CONFIG = schemathesis.Config.from_dict(
    {"generation": {"allow-extra-parameters": False, "with-security-parameters": False}}  # the one is ignored by right
)
STEADY = settings(
    max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_every_endpoint_answers_as_described(served: Served, mode: GenerationMode) -> None:
    url = f"{served.url}/openapi.json"
    schema = schemathesis.openapi.from_url(url, headers=served.headers, verify=served.verify, config=CONFIG)
    asked = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @STEADY
        @given(case=operation.as_strategy(generation_mode=mode), model=st.sampled_from(served.models))
        def check(case: schemathesis.Case, model: str) -> None:
            if mode.is_positive and isinstance(case.body, dict) and "model" in case.body:
                case.body |= {"model": model, "max_tokens": 3, "max_completion_tokens": 3}
                if isinstance(case.body.get("plan"), dict):
                    case.body["plan"].pop("draft", None)  # by a cloud that has no tiny model: no plan, 503
            asked.add(case.operation.label)
            case.call_and_validate(headers=served.headers, verify=served.verify, checks=CHECKS, timeout=60)

        with contextlib.suppress(Unsatisfiable):  # an endpoint that takes nothing can be asked nothing wrong
            check()
    assert mode.is_negative or len(asked) == schema.statistic.operations.total
