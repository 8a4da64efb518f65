"""The OpenAI HTTP shapes that both programs speak: requests and error objects."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

from protocol import limits
from protocol.errors import FaultCode, LinkLost, SessionFault, WireError

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A refusal as an HTTP status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return JSONResponse(self.body(), self.status, headers)


_STATUS = {
    FaultCode.BAD_FRAME: 400,
    FaultCode.BAD_REQUEST: 400,
    FaultCode.UNAUTHENTICATED: 401,
    FaultCode.QUOTA: 429,
    FaultCode.BUSY: 503,
    FaultCode.DRAINING: 503,
}


def as_api_error(error: WireError) -> ApiError:
    """A session's end as the HTTP client should hear it."""
    if isinstance(error, SessionFault):
        status = _STATUS.get(error.code, 502)
        wait = error.retry_after_s or (1.0 if status == 503 else None)
        return ApiError(status, error.message, code=error.code.name.lower(), retry_after_s=wait)
    return ApiError(503, str(error), code="link_lost" if isinstance(error, LinkLost) else None, retry_after_s=1)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, which no text may hold") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class TextPart(BaseModel):
    """One part of a message's content; only text can be read."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it; `developer` is OpenAI's later name for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool = False


REFUSED: dict[str, tuple[object, ...]] = {  # fields that would change the answer, and the values that would not
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_json": (None,),
    "ignore_eos": (None, False),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False, 0),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}


class GenerationRequest(BaseModel):
    """What a chat and a completion request have in common."""

    model_config = ConfigDict(extra="ignore")
    model: str = Field(min_length=1, max_length=limits.MAX_MODEL_NAME)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Text | list[Text] | None = None
    n: int | None = Field(None, ge=1, le=8)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        if isinstance(body, dict):
            for name, harmless in REFUSED.items():
                if name in body and body[name] not in harmless:
                    raise ValueError(f"{name} is not supported")
        return body

    @field_validator("stop")
    @classmethod
    def _bounded_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > limits.MAX_STOPS:
            raise ValueError(f"{len(strings)} stop strings, limit {limits.MAX_STOPS}")
        for one in strings:
            if not 0 < len(one.encode()) <= limits.MAX_STOP:
                raise ValueError(f"a stop string of {len(one.encode())} bytes, must be 1 to {limits.MAX_STOP}")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`; OpenAI's own default of 16 tokens holds."""

    prompt: Text = Field(min_length=1)

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens or 16


def as_error(error: Exception) -> ApiError:
    """Whatever was raised, as the client should hear it."""
    if isinstance(error, ApiError):
        return error
    return as_api_error(error) if isinstance(error, WireError) else ApiError(500, "internal error", code="internal")


def install_errors(app: FastAPI) -> None:
    """Makes every refusal of `app` an OpenAI error object, and none of them a stack trace."""

    async def refused(_: Request, error: Exception) -> Response:
        return as_error(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body",)]
        message = str(first["msg"]).removeprefix("Value error, ")
        param = ".".join(place) or None
        return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value").response()

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail)).response()

    async def internal(_: Request, error: Exception) -> Response:
        log.error("a request broke", exc_info=error)
        return ApiError(500, "internal error", code="internal").response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(WireError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, internal)
