"""The OpenAI requests that both programs take."""

from __future__ import annotations

from typing import Annotated, Literal

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

from protocol import limits
from protocol.api_errors import ApiError, shown


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
