"""Every case of early data, by the code of both programs over QUIC on loopback: the same text, run once, in each."""

from __future__ import annotations

import os
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from aioquic.quic.packet import QuicPacketType

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer
from cloud_server.server import running as cloud_running
from edge_agent.agent import running as agent_running
from edge_agent.config import AgentConfig
from edge_agent.decisions import Outcome
from edge_agent.job import Job, Quality, Route, Wish
from protocol.transport.base import Address
from protocol.transport.quic_door import Bounds
from protocol.transport.tickets import ServerTickets
from split_model.sampling import Sampling
from support.edge import begin, checkpoints, text_of
from support.eventually import eventually
from support.phone import expected, runner
from support.programs import cloud_arguments, program
from support.quic_raw import Peer
from support.relay import UdpRelay

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
ANSWER = 8  # tokens
GREEDY = Sampling()
LONG = {"max_position_embeddings": 32_768, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
CLOUD = {"route": Route.CLOUD, "quality": Quality.BEST}


def reference(prompt: tuple[int, ...], full: Path) -> str:
    return runner(full).tokenizer.decode(expected(full, prompt, GREEDY, ANSWER))


async def ask(address: Address, full: Path, ca: bytes, token: str, state: Path, prompt: tuple[int, ...] = PROMPT,
              **wish: object) -> Outcome:  # fmt: skip
    """What an agent that has just been started is answered; the text is the undisturbed one."""
    config = AgentConfig(checkpoints()[0], full, (address,), ca=ca, token=token, edge_layers=1, state=state, threads=1)
    async with agent_running(config) as agent:
        job = Job(os.urandom(16), prompt, ANSWER, GREEDY, (), Wish(**(CLOUD | wish)))  # type: ignore[arg-type]
        answer = await begin(agent, job)
        assert await text_of(answer) == reference(prompt, full)
    assert answer.outcome is not None
    assert (answer.outcome.transport, answer.outcome.exact, answer.outcome.attempts) == ("quic", True, 1)
    return answer.outcome


class World:
    """A cloud server behind a relay, and phones whose state outlives their agents."""

    relay: UdpRelay
    server: CloudServer
    _life: AsyncExitStack  # of the server

    def __init__(self, folder: Path, key_folder: Path, full: Path, stack: AsyncExitStack, **settings: Any):
        self.folder, self.keys, self.full, self.stack = folder, key_folder, full, stack
        self.ca = (key_folder / "ca.pem").read_bytes()
        self._settings = settings

    @classmethod
    async def make(cls, folder: Path, key_folder: Path, full: Path, stack: AsyncExitStack, **settings: Any) -> World:
        """`settings` are those of ServerConfig."""
        world = cls(folder, key_folder, full, stack, **settings)
        await world._start(0)
        world.relay = await stack.enter_async_context(await UdpRelay.start(world.server.address))
        return world

    async def _start(self, port: int) -> None:
        self._life = await self.stack.enter_async_context(AsyncExitStack())
        self.server = await self._life.enter_async_context(self.another(port))

    def another(self, port: int = 0) -> AbstractAsyncContextManager[CloudServer]:
        """One more replica, under the same keys."""
        return cloud_running(
            ServerConfig(self.full, port=port, http_port=0, keys=self.keys, slots=2, threads=1, **self._settings)
        )

    async def restart(self) -> None:
        """Another process on the same port, as far as a phone can tell: nothing is remembered."""
        await self._life.aclose()
        await self._start(self.server.address.port)

    async def ask(self, prompt: tuple[int, ...] = PROMPT, phone: str = "phone", **wish: object) -> Outcome:
        """`phone` names its state."""
        token = keys.issue(self.keys, phone, 600)
        return await ask(self.relay.address, self.full, self.ca, token, self.folder / phone, prompt, **wish)


def told(server: CloudServer) -> str:
    return server.service.metrics.text().decode()


def counted(metrics: str, name: str, **labels: str) -> float:
    """The sum of a counter's samples that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in metrics.splitlines() if line.startswith(f"{name}_total{{")]
    return sum(float(line.split()[-1]) for line in lines if all(one in line for one in wanted))


def early(server: CloudServer | str) -> tuple[float, float, float]:
    """Early requests that ran at once, that waited for their handshake, and connections whose ticket was refused."""
    metrics = server if isinstance(server, str) else told(server)
    accepted, waited, refused = (
        counted(metrics, "tandem_early_data", result=result) for result in ("accepted", "waited", "refused")
    )
    return accepted, waited, refused


def sessions(server: CloudServer) -> float:
    """That were opened on the wire, whatever became of them."""
    return counted(told(server), "tandem_channels")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not a lost path."""
    monkeypatch.setattr("edge_agent.runs.session.SUSPICION_S", 30.0)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def world(tmp_path: Path, key_folder: Path, stack: AsyncExitStack) -> World:
    return await World.make(tmp_path, key_folder, checkpoints()[1], stack)


@pytest.fixture
async def long_world(tmp_path: Path, key_folder: Path, stack: AsyncExitStack) -> World:
    """Its model has room for 32,768 positions."""
    return await World.make(tmp_path, key_folder, checkpoints(**LONG)[1], stack)


async def test_cold_there_is_no_early_data_and_a_ticket_for_the_next_time(world: World) -> None:
    outcome = await world.ask()
    assert not outcome.early_data
    assert early(world.server) == (0, 0, 0)
    assert list((world.folder / "phone" / "tickets").iterdir())


async def test_with_a_ticket_the_request_is_early_data_and_runs_at_once(world: World) -> None:
    for route in (CLOUD, {"route": Route.SPLIT, "split": 1, "quality": Quality.BEST}):
        await world.ask(phone=str(route["route"]), **route)
        outcome = await world.ask(phone=str(route["route"]), **route)
        assert outcome.early_data
    assert early(world.server) == (2, 0, 0)
    assert sessions(world.server) == 4


async def test_a_ticket_used_twice_is_refused_and_the_request_runs_once(world: World) -> None:
    """As from a phone whose state was put back from a copy."""
    await world.ask()
    shutil.copytree(world.folder / "phone", world.folder / "twin")
    assert (await world.ask()).early_data
    outcome = await world.ask(phone="twin")
    assert not outcome.early_data
    assert early(world.server) == (1, 0, 1)
    assert sessions(world.server) == 3


async def test_a_ticket_that_the_server_has_forgotten_is_refused_and_the_request_runs_once(
    tmp_path: Path, key_folder: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory holds so many, and the oldest goes."""
    monkeypatch.setattr("cloud_server.server.ServerTickets", partial(ServerTickets, limit=1))
    world = await World.make(tmp_path, key_folder, checkpoints()[1], stack)
    await world.ask()
    await world.ask(phone="another")
    outcome = await world.ask()
    assert not outcome.early_data
    assert early(world.server) == (0, 0, 1)
    assert sessions(world.server) == 3
    assert (await world.ask()).early_data


async def test_a_retry_costs_a_round_trip_and_the_request_stays_early_data(
    tmp_path: Path, key_folder: Path, stack: AsyncExitStack
) -> None:
    world = await World.make(tmp_path, key_folder, checkpoints()[1], stack, quic=Bounds(retry_above=0))
    await world.ask()
    outcome = await world.ask()
    assert outcome.early_data
    assert early(world.server) == (1, 0, 0)
    assert sessions(world.server) == 2


async def test_a_server_restarted_in_between_refuses_and_answers_in_the_handshake(world: World) -> None:
    await world.ask()
    await world.restart()
    outcome = await world.ask()
    assert not outcome.early_data
    assert early(world.server) == (0, 0, 1)
    assert sessions(world.server) == 1
    assert (await world.ask()).early_data


async def test_a_stale_flight_waits_for_its_handshake_and_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.ask()
    monkeypatch.setattr("protocol.limits.EARLY_AGE_TOLERANCE", 0.0)  # as if it had been ten seconds on its way
    await world.ask()
    assert early(world.server) == (0, 1, 0)
    assert sessions(world.server) == 2


@pytest.mark.parametrize("kilobytes", [8, 40])
async def test_a_request_of_8_kb_is_early_data_and_one_of_40_runs_with_the_handshake(
    long_world: World, kilobytes: int
) -> None:
    """Two bytes an id. What does not fit in the first flight follows in the second."""
    prompt = tuple(130 + i % 380 for i in range(kilobytes * 500))
    await long_world.ask()
    outcome = await long_world.ask(prompt)
    assert outcome.bytes_up > kilobytes * 1000
    assert outcome.early_data == (kilobytes == 8)
    assert early(long_world.server) == (float(kilobytes == 8), 0, 0)
    assert sessions(long_world.server) == 2


async def test_of_a_long_split_the_request_is_early_data_and_the_hidden_states_follow(long_world: World) -> None:
    await long_world.ask()
    outcome = await long_world.ask(tuple(130 + i % 380 for i in range(620)), route=Route.SPLIT, split=1)
    assert outcome.bytes_up > 40_000
    assert outcome.early_data
    assert early(long_world.server) == (1, 0, 0)


def thrice(flight: list[bytes], server: CloudServer) -> Peer:
    """Sends all of it three times, from an address that is not the phone's."""
    attacker = Peer(server.address, "127.0.3.1")
    for data in flight * 3:
        attacker.send(data)
    return attacker


async def test_a_recorded_first_flight_runs_once_and_brings_no_output(world: World) -> None:
    other = await world.stack.enter_async_context(world.another())
    await world.ask()
    before = len(world.relay.heard)
    assert (await world.ask()).early_data
    flight = [data for data in world.relay.heard[before:] if data[0] & 0x80]  # what is sealed for the handshake
    steps = other.service.worker.load.steps
    attackers = [thrice(flight, server) for server in (world.server, other)]
    await eventually(lambda: attackers[1].received)
    assert (await world.ask()).early_data  # whatever was sent before has been read by now
    for attacker in attackers:
        assert attacker.received <= 3 * attacker.sent
        assert attacker.kinds() <= {QuicPacketType.INITIAL, QuicPacketType.HANDSHAKE}
        attacker.close()
    assert sessions(world.server) == 3
    assert early(world.server)[0] == 2
    assert (sessions(other), early(other)[0], other.service.worker.load.steps) == (0, 0, steps)


@contextmanager
def clock(seconds: float) -> Iterator[None]:
    """This process's wall clock is off by so much, wherever a phone reads it."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=seconds)

    real = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + seconds)
        patch.setattr("aioquic.tls.utcnow", lambda: Shifted.now(UTC))
        patch.setattr("protocol.transport.quic_client.datetime", Shifted)
        yield


@pytest.mark.parametrize("apart", [300, -300])
async def test_clocks_five_minutes_apart_change_nothing_and_a_clock_that_is_set_costs_a_round_trip(
    tmp_path: Path, key_folder: Path, apart: int
) -> None:
    """The server is a process of its own. Only ages are compared: a phone that was always wrong knows them too."""
    full, ca, token = checkpoints()[1], key_folder / "ca.pem", keys.issue(key_folder, "phone", 600)
    seen, before = [], (0.0, 0.0, 0.0)
    with program(tmp_path, "cloud_server", *cloud_arguments(full, key_folder)) as cloud:
        trust = ssl.create_default_context(cafile=str(ca))
        wire = await UdpRelay.start(Address.parse(cloud.wire))  # without a way for gRPC
        async with httpx.AsyncClient(verify=trust) as http, wire as relay:
            for off in (apart, apart, 0, apart):
                with clock(off):
                    outcome = await ask(relay.address, full, ca.read_bytes(), token, tmp_path / "phone")
                now = early((await http.get(f"{cloud.https}/metrics")).text)
                seen.append((outcome.early_data, *(after - one for after, one in zip(now, before, strict=True))))
                before = now
    cold, at_once, waits = (False, 0, 0, 0), (True, 1, 0, 0), (True, 0, 1, 0)
    # A clock that was put back makes the ticket one of the future, which is not used.
    assert seen == ([cold, at_once, cold, waits] if apart > 0 else [cold, at_once, waits, cold])
