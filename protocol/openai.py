"""The OpenAI HTTP shapes that both programs speak: requests, answers whole and streamed, error objects."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.types import Send

from protocol import limits
from protocol.errors import FaultCode, LinkLost, SessionFault, WireError

log = logging.getLogger(__name__)
COMMENT_AFTER = 1.0  # seconds without a piece after which a stream says that it still lives
T = TypeVar("T")


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
        headers = {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}
        return JSONResponse(self.body(), self.status, headers)


_STATUS = {
    FaultCode.BAD_FRAME: 400,
    FaultCode.BAD_REQUEST: 400,
    FaultCode.UNAUTHENTICATED: 401,
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


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of one choice's answer: its new text, how many tokens it took, and why it ended if it did."""

    text: str = ""
    tokens: int = 0
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One request's answer in the making: a source of pieces for each of its `n` choices."""

    request: ChatRequest | CompletionRequest
    model: str
    prompt_tokens: int
    choices: Sequence[AsyncIterator[Piece]]
    extra: Callable[[], dict[str, object]] = dict  # added to the answer, or to the chunk that ends the last choice

    @property
    def _chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def _frame(self, kind: str, choices: list[dict[str, object]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self._chat else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece] | None]) -> dict[str, object]:
        """The body of an answer that is not streamed."""
        texts, ends, tokens = [""] * len(self.choices), ["stop"] * len(self.choices), 0
        async for item in pieces:
            if item:
                index, piece = item
                texts[index] += piece.text
                tokens += piece.tokens
                ends[index] = piece.finish or ends[index]
        said: list[dict[str, object]] = [
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text} for text in texts
        ]
        choices = [
            {"index": index, **one, "logprobs": None, "finish_reason": end}
            for index, (one, end) in enumerate(zip(said, ends, strict=True))
        ]
        body = self._frame("chat.completion" if self._chat else "text_completion", choices)
        return body | {"usage": self._usage(tokens)} | self.extra()

    async def stream(self, pieces: AsyncIterator[tuple[int, Piece] | None]) -> AsyncIterator[str]:
        """Server-sent events: a chunk a piece, comments while there is none, usage if wanted, `[DONE]`."""
        head = self._frame("chat.completion.chunk" if self._chat else "text_completion", [])

        def event(
            index: int, delta: dict[str, str], finish: str | None = None, more: dict[str, object] | None = None
        ) -> str:
            said: dict[str, object] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
            choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
            return sse(head | {"choices": [choice]} | (more or {}))

        tokens, ended = 0, 0
        if self._chat:
            for index in range(len(self.choices)):
                yield event(index, {"role": "assistant", "content": ""})
        async for item in pieces:
            if item is None:
                yield ": waiting\n\n"
                continue
            index, piece = item
            tokens += piece.tokens
            if piece.text:
                yield event(index, {"content": piece.text})
            if piece.finish:
                ended += 1
                yield event(index, {}, piece.finish, self.extra() if ended == len(self.choices) else {})
        if self.request.with_usage:
            yield sse(head | {"usage": self._usage(tokens)})
        yield "data: [DONE]\n\n"


def sse(body: object) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _merged(choices: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece] | None]:
    """Pieces of all choices as they come; None when COMMENT_AFTER seconds brought none. Raises what a choice raised."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue(maxsize=4)

    async def pump(index: int, source: AsyncIterator[Piece]) -> None:
        try:
            async for piece in source:
                await queue.put((index, piece))
            await queue.put(None)
        except (ApiError, WireError) as error:
            await queue.put(error)
        except Exception as error:
            log.exception("an answer broke")
            await queue.put(error)

    pumps = [asyncio.create_task(pump(index, source)) for index, source in enumerate(choices)]
    left = len(pumps)
    try:
        while left:
            try:
                async with asyncio.timeout(COMMENT_AFTER):  # wait_for would lose a cancel that comes with an item
                    item = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        # Whoever leaves may cancel again while this cleans up, so a task of its own does it.
        await asyncio.shield(asyncio.ensure_future(_given_up(pumps, choices)))


async def _given_up(pumps: Sequence[asyncio.Task[None]], choices: Sequence[AsyncIterator[Piece]]) -> None:
    for task in pumps:
        task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
    for source in choices:
        if hasattr(source, "aclose"):
            await source.aclose()


class EventStream(StreamingResponse):
    """A stream of events that is closed when its client is gone; starlette leaves that to the garbage collector."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await asyncio.shield(asyncio.ensure_future(self.body_iterator.aclose()))  # type: ignore[attr-defined]


async def _events(
    reply: Reply, first: tuple[int, Piece] | None, rest: AsyncIterator[tuple[int, Piece] | None]
) -> AsyncIterator[str]:
    async def pieces() -> AsyncIterator[tuple[int, Piece] | None]:
        yield first
        async for item in rest:
            yield item

    try:
        async for event in reply.stream(pieces()):
            yield event
    except Exception as error:
        yield sse(_as_error(error).body())
        yield "data: [DONE]\n\n"
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _as_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return as_api_error(error) if isinstance(error, WireError) else ApiError(500, "internal error", code="internal")


async def answer(http: Request, reply: Reply, headers: dict[str, str] | None = None) -> Response:
    """Answers whole or streamed, as asked; a client that leaves cancels its choices at once.

    A stream's status waits for the first piece, or COMMENT_AFTER seconds, so that a refusal is a status, not an event.
    """
    pieces = _merged(reply.choices)
    if not reply.request.stream:
        try:
            body = await until_gone(http, reply.whole(pieces))
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        return JSONResponse(body, headers=headers)
    try:
        first = await anext(pieces, None)
    except BaseException:
        await pieces.aclose()  # type: ignore[attr-defined]
        raise
    events = _events(reply, first, pieces)
    return EventStream(events, headers={"cache-control": "no-store"} | (headers or {}))


async def until_gone(http: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (then ApiError 499, heard by nobody)."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def install_errors(app: FastAPI) -> None:
    """Makes every refusal of `app` an OpenAI error object, and none of them a stack trace."""

    async def refused(_: Request, error: Exception) -> Response:
        return _as_error(error).response()

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
