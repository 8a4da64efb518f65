"""What both programs' applications do with a request before it is theirs."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.api import new_api, strict_json
from protocol.api_errors import ApiError, shown
from protocol.http_gate import Guard
from protocol.openai import ChatRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_json_is_read_as_it_was_meant(value: object) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_bytes_are_json_or_refused(data: bytes) -> None:
    with contextlib.suppress(ApiError):
        strict_json(data)


@pytest.mark.parametrize("field", ["messages", "content", "stop"])
def test_half_a_million_faults_are_one(field: str) -> None:
    """Each that is listed costs memory and time, on the loop that serves everybody."""
    faults: Any = [1] * 500_000
    message: Any = {"role": "user", "content": faults if field == "content" else "hello"}
    body = {"model": "m", "messages": [message]} | ({} if field == "content" else {field: faults})
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate(body)
    assert raised.value.error_count() == 1


@given(JSON | st.text(st.characters(categories=["Cs"])))
def test_whatever_was_sent_can_be_shown_in_an_error(value: object) -> None:
    said = ApiError(400, f"not {shown(value)}, nor {value}").response()
    assert len(shown(value)) < 1000
    assert json.loads(bytes(said.body))["error"]["message"].startswith("not ")


@pytest.mark.anyio
async def test_refusals_carry_the_headers_that_they_must() -> None:
    def strangers(http: object) -> None:
        raise ApiError(401, "who are you?")

    app, guarded = new_api("open"), new_api("guarded")
    guarded.add_middleware(Guard, check=strangers)

    @app.get("/thing")
    async def thing() -> None:
        raise ApiError(503, "later", retry_after_s=1.2)

    async def ask(app: Any, method: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            return await http.request(method, "/thing")

    wrong, later, stranger = await ask(app, "DELETE"), await ask(app, "GET"), await ask(guarded, "GET")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    assert (later.status_code, later.headers["retry-after"]) == (503, "2")
    assert (stranger.status_code, stranger.headers["www-authenticate"]) == (401, "Bearer")
    assert {one.json()["error"]["type"] for one in (wrong, later, stranger)} == {
        "invalid_request_error", "server_error", "authentication_error",
    }  # fmt: skip


def test_the_description_names_what_is_answered_and_no_422() -> None:
    app = new_api("it", s404="No such thing")

    @app.post("/thing")
    async def thing(body: ChatRequest) -> None: ...

    (said,) = app.openapi()["paths"]["/thing"].values()
    assert sorted(said["responses"]) == ["200", "400", "404", "405", "408", "413"]
