"""The built-in pair over real QUIC and gRPC: the same ids as the whole model in one process, wherever it is cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer, running
from protocol.transport.base import Address, Connection, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import TicketStore
from split_model.sampling import Sampling
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer
from support.phone import Phone, expected

pytestmark = pytest.mark.anyio
FULL = "assistant-20m"
QUESTIONS = (
    "I want to find a restaurant in San Jose.",
    "Can you book me a one way flight to Seattle for next Monday, in the morning if possible?",
    "How much money is in my savings account?",
)


@pytest.fixture
async def server(key_folder: Path) -> AsyncIterator[CloudServer]:
    config = ServerConfig(find_model(FULL), port=0, http_port=0, keys=key_folder, slots=16, threads=1)
    async with running(config) as server:
        yield server


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(find_model(FULL))


def prompts() -> list[list[int]]:
    tokenizer = ChatTokenizer.load(find_model(FULL))
    return [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]


async def connect(transport: str, server: CloudServer, key_folder: Path, tickets: Path | None = None) -> Connection:
    trust = Trust((key_folder / "ca.pem").read_bytes())
    if transport == "grpc":
        return await connect_grpc(server.address, trust)
    return await connect_quic(server.address, trust, TicketStore(tickets) if tickets else None)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.95, 0, 7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("transport", ["quic", "grpc"])
async def test_cloud_and_three_splits_give_the_whole_model_s_ids(
    transport: str, sampling: Sampling, phone: Phone, server: CloudServer, key_folder: Path
) -> None:
    connection = await connect(transport, server, key_folder)
    token = keys.issue(key_folder, "tester", 60)
    try:
        asked = [(prompt, split) for prompt in prompts() for split in (0, 3, 7, 12)]
        heard = await asyncio.gather(
            *(
                phone.ask(connection, prompt, split=split, sampling=sampling, max_tokens=24, token=token)
                for prompt, split in asked
            )
        )
    finally:
        await connection.aclose()
    for (prompt, split), one in zip(asked, heard, strict=True):
        assert one.ids == expected(find_model(FULL), prompt, sampling, 24), f"split {split} of {prompt}"
        assert one.admitted.exact


async def test_the_second_connection_s_request_is_early_data(
    phone: Phone, server: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    token, prompt = keys.issue(key_folder, "tester", 60), prompts()[0]
    early = []
    for _ in range(2):
        connection = await connect("quic", server, key_folder, tmp_path)
        try:
            age = connection.ticket_age_s
            heard = await phone.ask(connection, prompt, token=token, ticket_age_s=age)
            await connection.handshake()
            early.append((age is not None, heard.admitted.early, connection.facts().early_accepted))
        finally:
            await connection.aclose()
    assert early == [(False, False, False), (True, True, True)]
    assert 'result="accepted"' in server.service.metrics.text().decode()


async def test_a_stale_ticket_age_waits_for_the_handshake_and_is_served(
    phone: Phone, server: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    token, prompt = keys.issue(key_folder, "tester", 60), prompts()[0]
    for age in (None, 500.0):
        connection = await connect("quic", server, key_folder, tmp_path)
        try:
            heard = await phone.ask(connection, prompt, token=token, ticket_age_s=age)
        finally:
            await connection.aclose()
    assert heard.ids == expected(find_model(FULL), prompt, Sampling(), 8)
    assert 'result="waited"' in server.service.metrics.text().decode()


async def test_a_device_without_a_token_is_refused(phone: Phone, server: CloudServer, key_folder: Path) -> None:
    connection = await connect("quic", server, key_folder)
    try:
        with pytest.raises(Exception, match="no device token"):
            await phone.ask(connection, prompts()[0])
    finally:
        await connection.aclose()


def test_addresses() -> None:
    assert Address.parse("[::1]:4433") == Address("::1", 4433)
    with pytest.raises(ValueError, match="'x' is not HOST:PORT"):
        Address.parse("x")
