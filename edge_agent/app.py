"""The phone's own HTTP endpoint: OpenAI's shapes, with a plan in the request and in the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import ConfigDict, Discriminator, Field, Tag

from edge_agent.agent import Agent, Busy, Decided
from edge_agent.answer import Answer
from edge_agent.dashboard import Dashboard, Page
from edge_agent.decisions import KEPT, describe, described_pair, measured
from edge_agent.job import Job, Privacy, Quality, Route, Wish
from edge_agent.local_rules import LocalRules
from edge_agent.plan import NoPlan
from protocol import limits
from protocol.api import ChatAnswer, CompletionAnswer, Status, answers, new_api, serve_models
from protocol.api_errors import ApiError, shown
from protocol.http_gate import Guard
from protocol.openai import ChatRequest, CompletionRequest, Strict, Whole
from protocol.reply import Reply, answer
from protocol.request_log import RequestLog, Tally, log_request, tally_of
from split_model.chat_template import TemplateError

requests = logging.getLogger("edge_agent.requests")
AUTO = "tandem"  # the model name that leaves the choice to the agent


class PlanBody(Strict):
    """What a request may ask of its plan; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")
    route: Literal["auto", "local", "cloud", "split", "speculative"] = "auto"
    split: Annotated[int, Field(ge=0), Whole] | None = None
    draft: Annotated[int, Field(ge=0, le=limits.MAX_DRAFT), Whole] | None = None
    deadline_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_bytes: Annotated[int, Field(ge=0), Whole] | None = None
    quality: Annotated[Quality, Field(strict=False)] = Quality.BALANCED
    privacy: Annotated[Privacy, Field(strict=False)] = Privacy.ANY
    hidden_bits: Annotated[Literal[8, 16], Whole] | None = None
    sparse: bool = False


class EdgeChat(ChatRequest):
    """A chat request with wishes for its plan."""

    plan: PlanBody = PlanBody()


class EdgeCompletion(CompletionRequest):
    """A completion request with wishes for its plan."""

    plan: PlanBody = PlanBody()


Body = EdgeChat | EdgeCompletion
AnyBody = Annotated[
    Annotated[EdgeChat, Tag("<chat>")] | Annotated[EdgeCompletion, Tag("<completion>")],
    Discriminator(lambda body: "<completion>" if isinstance(body, dict) and "prompt" in body else "<chat>"),
]


Limit = Annotated[int, Query(ge=1, le=KEPT)]


def make_app(agent: Agent, rules: LocalRules, board: Dashboard) -> FastAPI:
    """The application of one running agent."""
    app = new_api("Tandem edge agent", s401="No valid key", s403="Not an address or origin of this agent",
                  s404="No such model", s429="The cloud's quota", s502="The cloud's fault",
                  s503="No plan may run, or busy, or draining")  # fmt: skip
    app.add_middleware(Guard, check=rules.check)
    guarded = [Security(HTTPBearer(auto_error=False))] if rules.locked else []  # for the description; `rules` does it
    app.add_middleware(RequestLog, ended=partial(log_request, requests))

    @app.post("/v1/chat/completions", dependencies=guarded, responses=answers(ChatAnswer))
    async def chat(body: EdgeChat, http: Request) -> Response:
        return await _answer(agent, http, body)

    @app.post("/v1/completions", dependencies=guarded, responses=answers(CompletionAnswer))
    async def completion(body: EdgeCompletion, http: Request) -> Response:
        return await _answer(agent, http, body)

    @app.post("/v1/plan", dependencies=guarded)
    async def plan(body: AnyBody) -> dict[str, object]:
        decided = await _decide(agent, await _job(agent, body))
        decided.close()
        return {"plan": describe(decided.plan), "conditions": asdict(decided.now)}

    kinds: dict[str, object] = {"application/json": {}, "application/jsonl": {}}

    @app.get("/v1/decisions", dependencies=guarded, responses={200: {"content": kinds}})
    async def decisions(limit: Limit = KEPT, format: Literal["json", "jsonl"] = "json") -> Response:
        """What was decided lately, the newest first, and what came of it; as JSON, or as a line of JSON for each."""
        if format == "jsonl":
            return Response("".join(agent.decisions.lines(agent.pair, limit)), media_type="application/jsonl")
        found = list(agent.decisions.described(limit))
        return JSONResponse({"object": "list", "pair": described_pair(agent.pair), "data": found})

    def models() -> list[dict[str, object]]:
        names = (AUTO, agent.pair.tiny.name, agent.pair.full.name)
        return [{"id": name, "object": "model", "created": 0, "owned_by": "tandem"} for name in names]

    serve_models(app, models, guarded)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Loading or draining", "model": Status}})
    async def ready() -> Response:
        cloud = "none" if not agent.means.links else "ok" if agent.means.links.reachable else "unreachable"
        status = "draining" if agent.draining else "ready"
        return JSONResponse({"status": status, "cloud": cloud}, 503 if agent.draining else 200)

    page = Page()  # described nowhere: it is for people, and its events have no end
    app.add_api_route("/", page.index, include_in_schema=False)
    app.mount("/page", page)
    app.add_api_route("/v1/events", board.events, include_in_schema=False)

    @app.get("/metrics", dependencies=guarded, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(agent.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _answer(agent: Agent, http: Request, body: Body) -> Response:
    first, tally = await _job(agent, body), tally_of(http.scope)
    tally.request = first.id.hex()
    decided = await _decide(agent, first)
    try:
        answers = agent.answer(decided, _choices(first, body.n or 1))
    except Busy as busy:
        raise ApiError(503, str(busy), code="busy", retry_after_s=1) from None
    tally.ending = partial(_note, tally, answers)
    seed = first.sampling.seed
    known = describe(decided.plan) | {"seed": seed, "cost": round(decided.plan.score.cost, 6)}
    del known["candidates"]
    reply = Reply(body, body.model, len(first.prompt), answers, _report(decided, answers, seed))
    return await answer(http, reply, {"x-tandem-plan": json.dumps(known, separators=(",", ":"))})


def _note(tally: Tally, answers: list[Answer]) -> None:
    """What the answers came to, for the request's line in the log."""
    for outcome in filter(None, (one.outcome for one in answers)):
        tally.route, tally.transport, tally.early = outcome.route.value, outcome.transport, outcome.early_data
        tally.peer = outcome.replica
        tally.link_up = (tally.link_up or 0) + outcome.bytes_up
        tally.link_down = (tally.link_down or 0) + outcome.bytes_down


def _report(decided: Decided, answers: list[Answer], seed: int) -> Callable[[], dict[str, object]]:
    """The `plan` of a finished answer: what was decided, and what came of it; sums over the choices."""

    def report() -> dict[str, object]:
        outcomes = [one.outcome for one in answers if one.outcome is not None]
        found = describe(decided.plan) | {"seed": seed}
        if outcomes:
            first = measured(outcomes[0])
            del first["finish"], first["tokens"]
            found |= first | {
                "bytes_up": sum(one.bytes_up for one in outcomes),
                "bytes_down": sum(one.bytes_down for one in outcomes),
                "exact": all(one.exact for one in outcomes),
                "degraded": any(one.degraded for one in outcomes),
            }
        return {"plan": found}

    return report


async def _decide(agent: Agent, job: Job) -> Decided:
    try:
        return await agent.decide(job)
    except NoPlan as error:
        raise ApiError(503, f"no plan may run: {error}", param="plan", code="no_plan", retry_after_s=1) from None
    except ValueError as error:
        raise ApiError(400, str(error), param="plan", code="invalid_value") from None


async def _job(agent: Agent, body: Body) -> Job:
    wish = _wish(agent, body)
    prompt, context = await asyncio.to_thread(_prompt, agent, body), agent.pair.full.context
    if not 0 < len(prompt) < context:
        message = f"a prompt of {len(prompt)} tokens, must be 1 to {context - 1}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded" if prompt else "invalid_value")
    room = context - len(prompt)
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
    sampling = agent.pair.full.usual.asked(body.temperature, body.top_p, body.top_k, seed)
    limit = min(body.answer_limit or room, room)
    return Job(os.urandom(limits.REQUEST_ID), tuple(prompt), limit, sampling, body.stops, wish)


def _choices(first: Job, count: int) -> list[Job]:
    """The `n` of a request: each with a seed and an id of its own."""
    how = first.sampling
    others = (replace(how, seed=(how.seed + index) % (1 << 64)) for index in range(1, count))
    return [first, *(replace(first, id=os.urandom(limits.REQUEST_ID), sampling=one) for one in others)]


def _prompt(agent: Agent, body: Body) -> list[int]:
    if isinstance(body, EdgeCompletion):
        return agent.means.tokenizer.encode(body.text)
    try:
        return agent.means.tokenizer.chat([message.plain() for message in body.messages])
    except TemplateError as error:
        raise ApiError(400, str(error), param="messages") from None


def _wish(agent: Agent, body: Body) -> Wish:
    tiny, full = agent.pair.tiny.name, agent.pair.full.name
    if body.model not in (AUTO, tiny, full):
        message = f"model {shown(body.model)} is none of {AUTO!r}, {tiny!r} and {full!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    asked = body.plan
    route = None if asked.route == "auto" else Route(asked.route)
    if asked.split is not None and route is None:
        route = Route.SPLIT
    quality = Quality.BEST if body.model == full else asked.quality
    bits = asked.hidden_bits or (16 if quality is Quality.BEST else agent.config.hidden_bits)
    try:
        deadline_s = None if asked.deadline_ms is None else asked.deadline_ms / 1000
        return Wish(route, asked.split, quality, asked.privacy, body.model == tiny, bits, asked.draft, deadline_s,
                    asked.max_bytes, asked.sparse)  # fmt: skip
    except ValueError as error:
        raise ApiError(400, str(error), param="plan", code="invalid_value") from None
