"""Answers as OpenAI clients expect them: pieces of several choices, merged, then whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Send

from protocol.api_errors import ApiError, as_error
from protocol.errors import WireError
from protocol.openai import ChatRequest, CompletionRequest
from protocol.request_log import Tally, tally_of

log = logging.getLogger(__name__)
COMMENT_AFTER = 1.0  # seconds without a piece after which a stream says that it still lives
T = TypeVar("T")


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


async def _merged(choices: Sequence[AsyncIterator[Piece]], tally: Tally) -> AsyncIterator[tuple[int, Piece] | None]:
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
                tally.failed(item)
                raise item
            if item is None:
                left -= 1
            else:
                tally.made(item[1].tokens, item[1].finish)
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
        yield sse(as_error(error).body())
        yield "data: [DONE]\n\n"
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def answer(http: Request, reply: Reply, headers: dict[str, str] | None = None) -> Response:
    """Answers whole or streamed, as asked; a client that leaves cancels its choices at once.

    A stream's status waits for the first piece, or COMMENT_AFTER seconds, so that a refusal is a status, not an event.
    """
    tally = tally_of(http.scope)
    tally.tokens_in = reply.prompt_tokens
    pieces = _merged(reply.choices, tally)
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
