"""A phone and its replicas in virtual time: real runs, links, QUIC, sessions, service and worker on a small model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from edge_agent.conditions import Meter
from edge_agent.job import Job, Wish
from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.runs.cloud import CloudRun, Identity
from edge_agent.runs.local import PhoneModel
from edge_agent.runs.pace import Pace
from edge_agent.runs.speculative import Drafter
from edge_agent.runs.split import Front
from edge_agent.state import State
from protocol.errors import WireError
from protocol.limits import SILENCE_END, STALLED
from protocol.transport.base import Address, Handler, ServerChannel, ServerTls, Trust
from protocol.transport.quic import connect_quic, serve_quic
from protocol.transport.quic_server import Dispatcher, QuicListener
from protocol.transport.tickets import TicketStore
from split_model.drafting import Acceptance
from split_model.model import Model
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer
from support.phone import GREEDY, expected
from support.speculation import blurred
from support.virtual import VirtualCompute, VirtualLoop
from support.virtual_grpc import grpc_to
from support.virtual_network import Network, Where

PORT = 4433
STEP_S = 0.03  # what a step takes in the cloud, and a piece of work on the phone
SLOTS = 3
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # for files whose disk is not under test


def model_folder() -> Path:
    """Three layers, 256 positions."""
    return blurred()[1]


@cache
def model() -> tuple[Model, ChatTokenizer]:
    return Model.load(model_folder()), ChatTokenizer.load(model_folder())


@cache
def tiny_model() -> Model:
    """Often agrees."""
    return Model.load(blurred()[0])


@cache
def tls() -> tuple[ServerTls, Trust]:
    """The same bytes in every run: sizes of datagrams depend on them."""
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("virtual CA", "virtual")]
    made = []
    for number, (key, name) in enumerate(zip(keys, names, strict=True)):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(names[0]).public_key(key.public_key())
        builder = builder.serial_number(number + 1).not_valid_before(datetime(2001, 1, 1, tzinfo=UTC))
        builder = builder.not_valid_after(datetime(2101, 1, 1, tzinfo=UTC))
        if number:
            also = [x509.DNSName(f"cloud-{index}") for index in range(4)] + [x509.IPAddress(ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(also), critical=False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made.append(builder.sign(keys[0], None).public_bytes(Encoding.PEM))
    folder = model_folder().parent
    files = ServerTls(folder / "server.pem", folder / "server.key")
    files.certificate.write_bytes(made[1])
    files.key.write_bytes(keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files, Trust(made[0])


@cache
def undisturbed(prompt: tuple[int, ...], sampling: Sampling, tokens: int) -> tuple[int, ...]:
    """The answer of one process."""
    return expected(model_folder(), prompt, sampling, tokens)


@dataclass(frozen=True, slots=True)
class Replica:
    """One cloud server."""

    service: Service
    compute: VirtualCompute
    listener: QuicListener
    handle: Handler  # for other transports

    @property
    def dispatcher(self) -> Dispatcher:
        return self.listener._dispatcher

    def kept(self) -> dict[str, object]:
        """What a session could have left behind; empty when there is nothing."""
        load, house, service = self.service.worker.load, self.dispatcher, self.service
        found = {
            "rows": load.running, "waiting": load.waiting, "rooms": service.rooms.taken, "guests": len(service._rows),
            "slots": SLOTS - service.prefixes.free_slots, "tasks": len(house.tasks),
            "connections": len(house.links), "closing": len(house.closing), "half open": len(house.half_open),
            "ids": len(house._protocols), "compute": self.compute.failure,
        }  # fmt: skip
        return {name: count for name, count in found.items() if count}


@dataclass(slots=True)
class Asked:
    """One answer: its ids, why it was not completed, and how long it took (seconds; attempts)."""

    ids: tuple[int, ...]
    wanted: tuple[int, ...]
    error: WireError | None
    took_s: float
    attempts: int
    gaps: list[float] = field(default_factory=list)  # between tokens, the first counted from the request

    @property
    def right(self) -> bool:
        """The undisturbed run's, to the end; or a beginning of it where there was an error."""
        return self.ids == (self.wanted if self.error is None else self.wanted[: len(self.ids)])


class World:
    """The phone, and what it reaches."""

    def __init__(self, network: Network, replicas: list[Replica], links: Links, phone: PhoneModel, tiny: PhoneModel):
        self.network, self.replicas, self.links, self.phone, self.tiny = network, replicas, links, phone, tiny
        full = model()[0]
        self._me = Identity(full.config.name, replicas[0].service.digests, full.exact)

    async def ask(self, prompt: tuple[int, ...], tokens: int, split: int = 0, sampling: Sampling = GREEDY,
                  draft: int = 0) -> Asked:  # fmt: skip
        """One answer over the network, as the agent would carry it."""
        network, config = self.network, model()[0].config
        job = Job(os.urandom(16), prompt, tokens, sampling, (), Wish())
        wanted = undisturbed(prompt, sampling, tokens)
        seat = await self.phone.seat(split, ids=prompt, front=True) if split else None
        front = Front(seat, self.phone.compute, len(prompt), bits=16) if seat else None
        pace = Pace(self.tiny, self.phone, split)
        by = Drafter(self.tiny, pace, sampling, draft, Acceptance(), steady=True) if draft else None
        run = CloudRun(job, split, self.links, self._me, config.stops, config.context, front, by)
        log, error, began, gaps, at = list(prompt), None, network.now, [], network.now
        try:
            async with contextlib.aclosing(run.tokens(log)) as answer:
                async for _ in answer:
                    gaps.append(network.now - at)
                    at = network.now
        except WireError as lost:
            error = lost
        finally:
            if by is not None:
                by.close()
            if seat is not None:
                seat.close()
        took = network.now - began
        return Asked(tuple(log[len(prompt) :]), wanted, error, took, run.carried.attempts, gaps)

    def proven(self, where: Where) -> bool:
        """Whether a server's connection has seen that this address is the phone's."""
        houses = [replica.dispatcher for replica in self.replicas]
        links = [link for house in houses for link in (*house.links, *house.closing)]
        return any(path.addr == where and path.is_validated for link in links for path in link.quic._network_paths)

    async def left(self) -> list[str]:
        """What is left on either side once silence would have ended everything; the phone goes first."""
        await self.links.aclose()
        await asyncio.sleep(SILENCE_END + STALLED + 5.0)
        loop, me = asyncio.get_running_loop(), asyncio.current_task()
        assert isinstance(loop, VirtualLoop)
        found = [f"replica {index}: {kept}" for index, one in enumerate(self.replicas) if (kept := one.kept())]
        found += [f"task {task.get_coro()}" for task in asyncio.all_tasks() if task is not me]
        slots = [one.prefixes.free_slots for one in (self.phone, self.tiny)]
        found += [f"timer {timer}" for timer in loop.timers()]
        return found + ([] if slots == [2, 2] else [f"{slots} free slots"])


@asynccontextmanager
async def world(network: Network, replicas: int = 1, grpc: bool = False) -> AsyncIterator[World]:
    """Replicas `cloud-0`… and a phone that has met none of them."""
    async with AsyncExitStack() as stack:
        served = [await stack.enter_async_context(_serving(network, f"cloud-{n}")) for n in range(replicas)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        quic = partial(connect_quic, trust=tls()[1], tickets=TicketStore(folder / "tickets"))
        dial = grpc_to(network, {f"cloud-{n}": one.handle for n, one in enumerate(served)}) if grpc else None
        links = Links([Link(Address(f"cloud-{n}", PORT), quic, dial) for n in range(replicas)], State(folder))
        stack.push_async_callback(links.aclose)
        compute, meter = VirtualCompute(_forward=STEP_S, _draft=STEP_S), Meter(State(folder))
        phone, tiny = (PhoneModel(compute, one, 2, meter) for one in (model()[0], tiny_model()))  # type: ignore[arg-type]
        made = World(network, served, links, phone, tiny)
        network.proven = made.proven
        yield made


@asynccontextmanager
async def _serving(network: Network, name: str) -> AsyncIterator[Replica]:
    compute = VirtualCompute(_step=STEP_S)
    full, tokenizer = model()
    config = ServerConfig(model_folder(), slots=SLOTS)
    service = Service(config, full, tokenizer, compute, None)  # type: ignore[arg-type]
    service.ready = True
    network.host(name)

    async def handle(channel: ServerChannel) -> None:
        await Session(service, channel).serve()

    listener = await serve_quic(name, PORT, tls()[0], handle)
    try:
        yield Replica(service, compute, listener, handle)
    finally:
        await listener.aclose()
