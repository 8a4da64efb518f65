"""Starts the whole cloud side, and ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from cloud_server import keys
from cloud_server.app import make_app
from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from cloud_server.shared import read_prefix
from cloud_server.trusted import verifying
from protocol.http_server import Doorway, bound, serving_http
from protocol.limits import HttpLimits
from protocol.process import either
from protocol.transport.base import Address, ServerChannel, ServerTls
from protocol.transport.grpc import serve_grpc
from protocol.transport.quic import serve_quic
from protocol.transport.tickets import ServerTickets
from split_model.compute import Compute, release_heap
from split_model.config import ModelError
from split_model.model import Model
from split_model.tokenizer import ChatTokenizer

T = TypeVar("T")
LINGER_S = 0.25  # for the last frames to reach their phones before the connections are closed
NOTICE_S = 2.0  # for sessions to hear that they are cancelled


@dataclass(frozen=True, slots=True)
class CloudServer:
    """A running server; QUIC and gRPC share `address`, HTTP has its own."""

    service: Service
    address: Address
    http: Address

    async def drain(self, deadline_s: float, hurried: asyncio.Event | None = None) -> int:
        """Refuses new sessions, and lets the running ones finish up to the deadline or until `hurried` is set.

        What is left then is told so and cancelled; returns how many those were.
        """
        rooms = self.service.rooms
        self.service.drain()
        await either(rooms.vacant, *filter(None, [hurried]), limit_s=deadline_s)
        left = rooms.taken
        self.service.abort()
        await either(rooms.vacant, limit_s=NOTICE_S)
        await asyncio.sleep(LINGER_S)
        return left


@asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[CloudServer]:
    """Loads the model, listens on all three ports, and on leaving stops and cancels whatever is left.

    HTTP answers from the start, for whoever asks whether the server is alive or ready. Raises ModelError, BadKeys,
    or OSError for a port that cannot be had.
    """
    config.check()
    tls = config.tls
    expires = _checked(tls) if tls else 0.0
    system = await asyncio.to_thread(read_prefix, config.shared_prefix) if config.shared_prefix else ""
    async with AsyncExitStack() as outer:
        http_socket = outer.enter_context(bound(config.host, config.http_port))
        verifier = await outer.enter_async_context(verifying(config))
        if tls:
            _probe(config.host, config.port)
        door = Doorway()
        http = await outer.enter_async_context(serving_http(door, config.host, http_socket, 2, tls, _limits(config)))
        stack = await outer.enter_async_context(AsyncExitStack())  # all this is closed before HTTP is
        compute = Compute(config.threads)
        stack.push_async_callback(compute.aclose)
        tokenizer = await asyncio.to_thread(ChatTokenizer.load, config.model)
        model = await compute.call(partial(Model.load, config.model, precision=config.precision, own_head=True))
        tiny = await _load_tiny(config, model, tokenizer, compute) if config.tiny else None
        service = Service(config, model, tokenizer, compute, verifier, tiny)
        await stack.enter_async_context(service.expiring())
        if tls:
            service.metrics.certificate(expires)
        await service.worker.warm_up(min(96, service.context // 2))
        if system:
            await service.share(system)
        release_heap()
        address = Address(config.host, config.port)
        if tls:
            address = await _listen_wire(stack, service, config, tls)
        if service.address is None and config.host not in ("0.0.0.0", "::"):
            service.address = address
        door.app = make_app(service)
        service.ready = True
        stack.callback(service.abort)
        yield CloudServer(service, address, http)


async def _load_tiny(config: ServerConfig, full: Model, tokenizer: ChatTokenizer, compute: Compute) -> Model:
    """The model that drafts. Raises ModelError for one that speaks in other tokens than the full model."""
    folder, precision = config.tiny, config.tiny_precision
    assert folder is not None
    own = await asyncio.to_thread(ChatTokenizer.load, folder)
    if own.digest != tokenizer.digest:
        raise ModelError(f"--tiny {folder}: its tokenizer is not that of {full.config.name}, and drafts are its ids")
    return await compute.call(partial(Model.load, folder, precision=precision, check=False))


async def _listen_wire(stack: AsyncExitStack, service: Service, config: ServerConfig, tls: ServerTls) -> Address:
    """gRPC first, since a TCP port that the system chooses is then tried as a UDP port too."""

    async def handle(channel: ServerChannel) -> None:
        await Session(service, channel).serve()

    grpc = await serve_grpc(config.host, config.port, tls, handle)
    stack.push_async_callback(grpc.aclose)
    tickets = ServerTickets(refused=partial(service.metrics.early, "refused"))
    quic = await serve_quic(config.host, grpc.address.port, tls, handle, tickets=tickets, bounds=config.quic)
    stack.push_async_callback(quic.aclose)
    return quic.address


def _limits(config: ServerConfig) -> HttpLimits:
    """Connections enough for every answer that may be under way, and as many that ask."""
    return replace(config.http, connections=max(config.http.connections, 2 * (config.slots + config.waiting)))


def _checked(tls: ServerTls) -> float:
    """When the certificate expires, in Unix time; it and its key have been read and belong together.

    Raises BadKeys that names the file.
    """
    chain = _read(tls.certificate, load_pem_x509_certificates, "a certificate in PEM")
    _read(tls.key, lambda pem: load_pem_private_key(pem, None), "an unencrypted private key in PEM")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)
    except ssl.SSLError as error:
        raise keys.BadKeys(f"{tls.key} does not go with {tls.certificate}: {error.reason}") from None
    return min(one.not_valid_after_utc.timestamp() for one in chain)


def _read(path: Path, load: Callable[[bytes], T], what: str) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise keys.BadKeys(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise keys.BadKeys(f"{path}: not {what}") from None


def _probe(host: str, port: int) -> None:
    """Finds a port in use before a model is loaded, and names it. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for kind, name in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        with contextlib.closing(socket.socket(family, kind)) as trial:
            try:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
                trial.bind((host, port))
            except OSError as error:
                raise OSError(f"cannot listen on {name} {host}:{port}: {error.strerror}") from None
