"""The cloud's HTTP side: the OpenAI endpoint, health, replicas and metrics."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator
from functools import partial
from typing import Literal

import httpx
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from cloud_server.config import ServerConfig
from cloud_server.rows import Row
from cloud_server.service import Guest, Service
from cloud_server.tokens import ADMIN, GENERATE
from protocol.api import ChatAnswer, CompletionAnswer, Status, answers, new_api, serve_models
from protocol.api_errors import ApiError, as_api_error, shown
from protocol.errors import SessionFault
from protocol.frames import Reason
from protocol.http_gate import Guard, Slowed, bearer
from protocol.openai import ChatRequest, CompletionRequest
from protocol.reply import Piece, Reply, answer
from protocol.request_log import RequestLog, tally_of
from split_model.chat_template import TemplateError
from split_model.tokenizer import TextStream

DRAFT = 8  # tokens of a draft at most, where this server has a tiny model
PEER_TIMEOUT_S = 1.0
PUBLIC = frozenset({"/ca.pem", "/health", "/ready", "/metrics", "/openapi.json"})  # asked without a token


class Pem(Response):
    """A certificate."""

    media_type = "application/x-pem-file"


class NewToken(BaseModel):
    """A device token, in OAuth's words; `expires_in` is in seconds."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int
    scope: str


def make_app(service: Service) -> FastAPI:
    """The application of one served model."""
    app = new_api(
        "Tandem cloud server", s401="No valid device token", s403="The token's scope does not reach here",
        s404="No such model", s429="Over this device's quota", s503="Busy or draining",
    )  # fmt: skip
    app.add_middleware(Guard, check=partial(_check, service))
    app.add_middleware(Slowed, pace=service.pace)
    app.add_middleware(RequestLog, ended=service.ended)
    guarded = [Security(HTTPBearer(auto_error=False))]  # for the description; `_check` does it

    @app.post("/v1/chat/completions", dependencies=guarded, responses=answers(ChatAnswer))
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await _answer(service, http, body)

    @app.post("/v1/completions", dependencies=guarded, responses=answers(CompletionAnswer))
    async def completion(body: CompletionRequest, http: Request) -> Response:
        return await _answer(service, http, body)

    def models() -> list[dict[str, object]]:
        model = {"id": service.model.config.name, "object": "model", "created": 0, "owned_by": "tandem"}
        return [model | {"max_model_len": service.context}]

    serve_models(app, models, guarded)

    @app.get("/v1/replicas", dependencies=guarded)
    async def replicas(http: Request, peers: bool = True) -> dict[str, object]:
        found = [_self(service)]
        if peers:
            token = http.headers.get("authorization", "")
            found += await asyncio.gather(*(_ask_peer(service, url, token) for url in service.config.peers))
        return {"replicas": found}

    @app.post("/v1/token", dependencies=guarded)
    async def token(http: Request) -> NewToken:
        """A new token for the same device and scopes."""
        caller, signer = http.state.caller, service.verifier.trusted.signer if service.verifier else None
        if signer is None:
            raise ApiError(404, "tokens are not issued here", code="no_tokens")
        life = service.config.token_life_s
        made = signer.token(caller.device, caller.scopes, life, caller.since)
        return NewToken(access_token=made, expires_in=int(life), scope=" ".join(sorted(caller.scopes)))

    @app.get("/ca.pem", response_class=Pem)
    async def ca() -> Response:
        """The certificate of the CA that this server's keys belong to, for phones that know its fingerprint."""
        if not (service.config.keys and service.config.certificate is None):
            raise ApiError(404, "this server's certificate is under no CA of its own", code="no_ca")
        pem = await asyncio.to_thread((service.config.keys / "ca.pem").read_bytes)
        return Pem(pem)

    @app.post("/admin/drain", dependencies=guarded, status_code=202)
    async def drain() -> dict[str, object]:
        """Takes no new sessions; the program ends when the others have, or at its deadline."""
        service.drain()
        return {"status": "draining", "sessions": service.rooms.taken, "deadline_s": service.config.drain_s}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Loading or draining", "model": Status}})
    async def ready() -> Response:
        good = service.ready and not service.rooms.draining
        word = "ready" if good else "draining" if service.rooms.draining else "loading"
        return JSONResponse({"status": word}, 200 if good else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _check(service: Service, http: HTTPConnection) -> None:
    """Lets a request pass that needs no token or has a good one, of the right scope. Raises ApiError."""
    path = http.scope["path"]
    if path in PUBLIC:
        return
    try:
        http.state.caller = service.caller(bearer(http))
    except SessionFault as fault:
        raise as_api_error(fault) from None
    tally_of(http.scope).device = http.state.caller.device
    try:
        if path != "/v1/token":
            http.state.caller.need(ADMIN if path.startswith("/admin/") else GENERATE)
    except SessionFault as fault:
        raise ApiError(403, fault.message, code="missing_scope") from None


def _self(service: Service) -> dict[str, object]:
    now = service.worker.load
    return {
        "address": str(service.address) if service.address else None,  # not told: see --advertise
        "model": service.model.config.name,
        "running": now.running,
        "waiting": now.waiting,
        "slots": now.slots,
        "draining": service.rooms.draining,
        "reachable": True,
    }


async def _ask_peer(service: Service, url: str, token: str) -> dict[str, object]:
    """What a peer says of itself; `reachable: false` when it does not within a second."""
    try:
        async with httpx.AsyncClient(timeout=PEER_TIMEOUT_S, verify=_peer_trust(service.config)) as client:
            got = await client.get(f"{url.rstrip('/')}/v1/replicas?peers=false", headers={"authorization": token})
            got.raise_for_status()
            found: dict[str, object] = got.json()["replicas"][0]
            return found
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return {"address": url, "reachable": False, "reason": type(error).__name__}


def _peer_trust(config: ServerConfig) -> ssl.SSLContext | bool:
    """What is accepted of a peer's HTTPS: the CA of this server's own keys."""
    own = config.keys and config.certificate is None
    return ssl.create_default_context(cafile=str(config.keys / "ca.pem")) if config.keys and own else True


def _prompt(service: Service, body: ChatRequest | CompletionRequest) -> list[int]:
    """Token ids; as slow as the text is long. Raises ApiError."""
    if isinstance(body, CompletionRequest):
        return service.tokenizer.encode(body.text)
    try:
        return service.tokenizer.chat([message.plain() for message in body.messages])
    except TemplateError as error:
        raise ApiError(400, str(error), param="messages") from None


async def _answer(service: Service, http: Request, body: ChatRequest | CompletionRequest) -> Response:
    name = service.model.config.name
    if body.model != name:
        message = f"model {shown(body.model)} is not served here, only {name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if (body.n or 1) > service.rooms.limit:
        raise ApiError(400, f"n is {body.n}, this server holds {service.rooms.limit} answers at once", param="n")
    prompt = await asyncio.to_thread(_prompt, service, body)
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
    room = max(1, service.context - len(prompt))
    limit = min(body.answer_limit or room, room)
    choices, usual = [], service.model.config.usual
    for index in range(body.n or 1):
        sampling = usual.asked(body.temperature, body.top_p, body.top_k, (seed + index) % (1 << 64))
        row = service.new_row(prompt, len(prompt), len(prompt), 0, sampling, limit, cloud_draft=DRAFT)
        choices.append(_pieces(service, row, body.stops, Guest(http.state.caller, len(prompt))))
    return await answer(http, Reply(body, name, len(prompt), choices))


async def _pieces(service: Service, row: Row, stop: tuple[str, ...], guest: Guest) -> AsyncIterator[Piece]:
    """One choice's text; the row leaves its slot when this ends, however it ends."""
    text = TextStream(service.tokenizer, stop)
    service.enter(guest)
    async with service.running(row, "http", guest):
        while True:
            emitted = await service.next(row)
            for left, token in enumerate(emitted.ids, 1 - len(emitted.ids)):
                new = "" if token in service.model.config.stops else text.push(token)
                if text.stopped:
                    yield Piece(new, 1, "stop")
                    return
                if emitted.finish is not None and not left:
                    yield Piece(new + text.finish(), 1, "stop" if emitted.finish is Reason.STOP else "length")
                    return
                yield Piece(new, 1)
