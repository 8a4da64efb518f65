"""The OpenAI HTTP shapes that both programs speak: requests and error objects."""

from __future__ import annotations

import math
import reprlib
from typing import Annotated, Literal

from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from starlette.exceptions import HTTPException

from protocol import limits
from protocol.errors import FaultCode, LinkLost, SessionFault, WireError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxlevel = 3


def shown(value: object) -> str:
    """What a peer sent, short enough for a message."""
    return _SHORT.repr(value)


class ApiError(HTTPException):
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
        super().__init__(status, message)
        self.status, self.param, self.code = status, param, code
        self.message = message.encode(errors="backslashreplace").decode()  # JSON can hold no lone surrogate
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body(), self.status, headers)


_STATUS = {
    FaultCode.BAD_FRAME: 400,
    FaultCode.BAD_REQUEST: 400,
    FaultCode.CONTEXT_LENGTH_EXCEEDED: 400,
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


def _encodable(text: object) -> object:
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate, which no text may hold") from None
    return text


def _fitting(stop: str) -> str:
    if len(stop.encode()) > limits.MAX_STOP:
        raise ValueError(f"a stop string of {len(stop.encode())} bytes, limit {limits.MAX_STOP}")
    return stop


def _integral(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_integral)  # 3.0 is an integer too, says JSON Schema
Text = Annotated[str, BeforeValidator(_encodable)]
SomeText = Annotated[str, Field(min_length=1), BeforeValidator(_encodable)]
Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_NAME), BeforeValidator(_encodable)]
Stop = Annotated[
    str, Field(min_length=1, max_length=limits.MAX_STOP), BeforeValidator(_encodable), AfterValidator(_fitting)
]


class Strict(BaseModel):
    """A part of a request: no text for a number, and unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(Strict):
    """One part of a message's content; only text can be read."""

    type: Literal["text"]
    text: Text


def _kind(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


OneOrMany = Discriminator(_kind)  # one error for a value of another kind, not one for each kind that it is not


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[TextPart], Field(fail_fast=True, max_length=limits.MAX_PARTS), Tag("<list>")],
        OneOrMany,
    ]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it; `developer` is OpenAI's later name for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
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


class GenerationRequest(Strict):
    """What a chat and a completion request have in common."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_LOG), Whole] | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), Whole] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64), Whole] | None = None
    stop: (
        Annotated[
            Annotated[Stop, Tag("<text>")]
            | Annotated[list[Stop], Field(fail_fast=True, max_length=limits.MAX_STOPS), Tag("<list>")],
            OneOrMany,
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=8), Whole] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        if isinstance(body, dict):
            for name, harmless in REFUSED.items():
                if name in body and body[name] not in harmless:
                    message = f"{name} is not supported (got {shown(body[name])})"
                    raise ApiError(400, message, param=name, code="unsupported_parameter")
        return body

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

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MAX_LOG), Whole] | None = None

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`; OpenAI's own default of 16 tokens holds."""

    prompt: Annotated[
        Annotated[SomeText, Tag("<text>")]
        | Annotated[list[SomeText], Field(min_length=1, max_length=1), Tag("<list>")],
        OneOrMany,
    ]

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens or 16
