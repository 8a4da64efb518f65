"""The FastAPI application that both programs build on: strict JSON, OpenAI's errors, and a description that is true."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, NoReturn

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.params import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from protocol.api_errors import ApiError, ErrorBody, as_error, shown
from protocol.errors import WireError
from protocol.limits import MAX_KEYS
from protocol.request_log import tally_of

log = logging.getLogger(__name__)


class Status(BaseModel):
    """How a program is."""

    status: str


class Usage(BaseModel):
    """Tokens of a request and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Said(BaseModel):
    """A message that was answered with."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """One of the `n` answers."""

    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatChoice(Choice):
    """One of the `n` answers to a conversation."""

    message: Said


class TextChoice(Choice):
    """One of the `n` continuations of a prompt."""

    text: str


class Answer(BaseModel):
    """What every answer has; the phone's have a `plan` too."""

    id: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(Answer):
    """The body of an answered `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionAnswer(Answer):
    """The body of an answered `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


def answers(kind: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint that answers whole or streamed."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    content = {"text/event-stream": {"schema": event}}
    return {200: {"model": kind, "content": content, "description": "The answer, or its server-sent events"}}


def new_api(title: str, **refusals: str) -> FastAPI:
    """An application without documentation pages.

    `refusals` are further statuses that any endpoint may answer with, such as `s401="why"`.
    """
    common = {"s400": "Not what this endpoint takes", "s405": "Not this method", "s408": "The body came too slowly",
              "s413": "The body is too large"}  # fmt: skip
    said: dict[int | str, dict[str, Any]] = {
        int(status[1:]): {"model": ErrorBody, "description": why} for status, why in (common | refusals).items()
    }
    app = FastAPI(title=title, docs_url=None, redoc_url=None, redirect_slashes=False, responses=said)
    app.router.route_class = StrictRoute
    install_errors(app)

    def described() -> dict[str, Any]:
        """FastAPI's own, less the 422 that is never sent."""
        if not app.openapi_schema:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
    return app


def serve_models(app: FastAPI, models: Callable[[], list[dict[str, object]]], guarded: Sequence[Depends] = ()) -> None:
    """Lists the models at `/v1/models`, and tells of one at `/v1/models/NAME`."""

    @app.get("/v1/models", dependencies=guarded)
    async def every() -> dict[str, object]:
        return {"object": "list", "data": models()}

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def one(name: str) -> dict[str, object]:
        for model in models():
            if model["id"] == name:
                return model
        raise ApiError(404, f"there is no model {shown(name)} here", param="model", code="model_not_found")


class StrictRequest(Request):
    """A request whose JSON means the same to every reader."""

    async def json(self) -> Any:
        """Raises ApiError."""
        return strict_json(await self.body())


class StrictRoute(APIRoute):
    """Reads requests as StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def strict_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8; keys that come twice, NaN and infinities are refused. Raises ApiError."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        words = f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        words = f"{error.msg} at character {error.pos}"
    except RecursionError:
        words = "nested too deeply"
    except ValueError as error:  # an integer of more digits than Python reads, or no number
        words = str(error)
    raise ApiError(400, f"the body is not JSON: {words}", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ApiError(400, f"an object of {len(pairs)} keys, limit {MAX_KEYS}", code="invalid_json")
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ApiError(400, f"the key {shown(key)} comes twice in one object", code="invalid_json")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def install_errors(app: FastAPI) -> None:
    """Makes every refusal of `app` an OpenAI error object, and none of them a stack trace."""

    async def refused(http: Request, error: Exception) -> Response:
        tally_of(http.scope).failed(as_error(error))
        response = as_error(error).response()
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    async def broke(_: Request, error: Exception) -> Response:
        log.error("a request broke", exc_info=error)
        return as_error(error).response()

    for kind in (HTTPException, WireError, RequestValidationError):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(Exception, broke)
