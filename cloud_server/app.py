"""The cloud's HTTP side: the OpenAI endpoint, health, replicas and metrics."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator

import httpx
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from cloud_server.config import ServerConfig
from cloud_server.rows import Row
from cloud_server.service import Service
from protocol.errors import SessionFault
from protocol.frames import Reason
from protocol.openai import ApiError, ChatRequest, CompletionRequest, as_api_error, install_errors
from protocol.reply import Piece, Reply, answer
from split_model.sampling import Sampling
from split_model.tokenizer import TemplateError, TextStream

PEER_TIMEOUT_S = 1.0


def make_app(service: Service) -> FastAPI:
    """The application of one served model."""
    app = FastAPI(title="Tandem cloud server", docs_url=None, redoc_url=None)
    install_errors(app)

    def allowed(http: Request) -> None:
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        try:
            service.device(token if scheme.lower() == "bearer" else "")
        except SessionFault as fault:
            raise as_api_error(fault) from None

    guarded = [Depends(allowed)]

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(body: ChatRequest, http: Request) -> Response:
        try:
            prompt = await asyncio.to_thread(service.tokenizer.chat, [message.plain() for message in body.messages])
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages") from None
        return await _answer(service, http, body, prompt)

    @app.post("/v1/completions", dependencies=guarded)
    async def completion(body: CompletionRequest, http: Request) -> Response:
        return await _answer(service, http, body, await asyncio.to_thread(service.tokenizer.encode, body.prompt))

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, object]:
        config = service.model.config
        model = {
            "id": config.name,
            "object": "model",
            "created": 0,
            "owned_by": "tandem",
            "max_model_len": service.context,
        }
        return {"object": "list", "data": [model]}

    @app.get("/v1/replicas", dependencies=guarded)
    async def replicas(http: Request, peers: bool = True) -> dict[str, object]:
        found = [_self(service)]
        if peers:
            token = http.headers.get("authorization", "")
            found += await asyncio.gather(*(_ask_peer(service, url, token) for url in service.config.peers))
        return {"replicas": found}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        good = service.ready and not service.rooms.draining
        word = "ready" if good else "draining" if service.rooms.draining else "loading"
        return JSONResponse({"status": word}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


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
    return ssl.create_default_context(cafile=str(config.keys / "ca.pem")) if config.keys else True


async def _answer(
    service: Service, http: Request, body: ChatRequest | CompletionRequest, prompt: list[int]
) -> Response:
    name = service.model.config.name
    if body.model != name:
        raise ApiError(
            404, f"model {body.model!r} is not served here, only {name!r}", param="model", code="model_not_found"
        )
    if (body.n or 1) > service.rooms.limit:
        raise ApiError(400, f"n is {body.n}, this server holds {service.rooms.limit} answers at once", param="n")
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
    room = max(1, service.context - len(prompt))
    limit = min(body.answer_limit or room, room)
    choices = []
    for index in range(body.n or 1):
        sampling = Sampling(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            max(0, body.top_k or 0),
            (seed + index) % (1 << 64),
        )
        row = service.new_row(prompt, len(prompt), len(prompt), 0, sampling, limit)
        choices.append(_pieces(service, row, body.stops))
    return await answer(http, Reply(body, name, len(prompt), choices))


async def _pieces(service: Service, row: Row, stop: tuple[str, ...]) -> AsyncIterator[Piece]:
    """One choice's text; the row leaves its slot when this ends, however it ends."""
    text = TextStream(service.tokenizer, stop)
    service.enter()
    async with service.running(row, "http"):
        while True:
            emitted = await row.stream.next()
            if emitted.position == row.prompt_length:
                service.metrics.first_token(row)
            new = text.push(emitted.token)
            if text.stopped:
                yield Piece(new, 1, "stop")
                return
            if emitted.finish is not None:
                yield Piece(new + text.finish(), 1, "stop" if emitted.finish is Reason.STOP else "length")
                return
            yield Piece(new, 1)
