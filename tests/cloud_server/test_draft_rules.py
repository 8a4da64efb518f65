"""What a session with drafts owes and is owed: silence, pauses, credit, quota, leaving, draining."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_server import keys as key_files
from cloud_server.quota import Quota
from protocol import limits
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Admitted, Draft, Fault, Load, Tokens
from protocol.transport.base import ClientChannel
from protocol.transport.memory import MemoryServerChannel
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.drafting_phone import drafting, guessing, speculate
from support.phone import Phone, expected, until

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
GREEDY = Sampling()
NEVER = 400  # answer tokens: far more than any of these tests waits for


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


async def emptied(server: Cloud) -> None:
    """Until no session holds anything."""
    while server.service.rooms.taken:
        await server.settled()
    assert await server.settled() == (0, 0)
    assert server.service.prefixes.free_slots == server.service.config.slots


async def waiting(server: Cloud, phone: Phone, split: int = 0, max_tokens: int = NEVER) -> ClientChannel:
    """A session whose first token came, and whose row waits for drafts."""
    channel = await server.connection.open()
    await channel.send(drafting(phone.open_frame(PROMPT, split=split, max_tokens=max_tokens)))
    for frame in phone.hidden(PROMPT, split=split, rows=25) if split else ():
        await channel.send(frame)
    first = await until(channel, Tokens)
    assert isinstance(first, Tokens)
    assert len(first.ids) == 1
    return channel


@pytest.mark.parametrize(("split", "words"), [(0, "no drafts for 0.5 s"), (2, "no hidden states for 0.5 s")])
async def test_a_phone_that_owes_drafts_is_ended(
    phone: Phone, monkeypatch: pytest.MonkeyPatch, split: int, words: str
) -> None:
    """It lives and pings, and would hold its slot for ever."""
    monkeypatch.setattr("protocol.limits.HIDDEN_WAIT", 0.5)
    async with cloud(checkpoint()) as server:
        channel = await waiting(server, phone, split)
        if split:
            await channel.send(Draft(51, (7, 7)))  # and no hidden states for it
        fault = await until(channel, Fault)
        assert isinstance(fault, Fault)
        assert (fault.code, fault.message) == (FaultCode.SILENT, words)
        await channel.aclose()
        await emptied(server)


async def test_a_row_that_waits_for_drafts_costs_no_steps(phone: Phone) -> None:
    async with cloud(checkpoint()) as server:
        channel = await waiting(server, phone)
        steps = server.service.worker.load.steps
        for _ in range(2):
            await until(channel, Load)  # comes when no token does
        assert server.service.worker.load.steps == steps
        await channel.aclose()
        await emptied(server)


async def test_a_paused_row_verifies_nothing_until_its_phone_is_heard_again(
    phone: Phone, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = 0.0
    monkeypatch.setattr(MemoryServerChannel, "silent_s", lambda _: silence)
    async with cloud(checkpoint()) as server:
        right = expected(checkpoint(), PROMPT, GREEDY, 8)
        channel = await waiting(server, phone)
        silence = limits.SILENCE_PAUSE + 1
        await until(channel, Load)
        await channel.send(Draft(51, right[1:4]))
        steps = server.service.worker.load.steps
        await until(channel, Load)
        assert server.service.worker.load.steps == steps
        silence = 0.0
        tokens = await until(channel, Tokens)
        assert tokens == Tokens(51, right[1:5], 0)
        await channel.aclose()
        await emptied(server)


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("drafts", [0, 1, 30])
async def test_a_phone_that_leaves_in_mid_draft_frees_its_slot(phone: Phone, split: int, drafts: int) -> None:
    async with cloud(checkpoint()) as server:
        channel = await waiting(server, phone, split)
        for at in range(drafts):
            await channel.send(Draft(51 + at, (7,)))
        await channel.aclose()
        await emptied(server)
        assert (await phone.ask(server.connection, PROMPT)).ids == expected(checkpoint(), PROMPT, GREEDY, 8)


async def test_credit_of_dropped_hidden_states_is_given_back(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts ahead that mostly fail: far more is sent than the credit, and far more than is computed."""
    monkeypatch.setattr("protocol.limits.HIDDEN_CREDIT", 80 * 128)  # bytes of 80 positions
    right = expected(checkpoint(), PROMPT, GREEDY, 60)
    async with cloud(checkpoint(), slots=1) as server:
        said = await speculate(phone, server.connection, PROMPT, guessing(right, 50, 0.3), split=2, draft=4, ahead=3,
                               max_tokens=60)  # fmt: skip
        assert said.ids == right
        assert 5 * said.deviations > 80  # positions of the drafts that failed
        await emptied(server)


async def test_every_token_is_charged_to_the_quota(phone: Phone, key_folder: Path) -> None:
    right = expected(checkpoint(), PROMPT, GREEDY, 30)
    quota = Quota(output_tokens=25)  # a minute
    async with cloud(checkpoint(), key_folder, quota=quota) as server:  # type: ignore[arg-type]
        token, guess = key_files.issue(key_folder, "phone", 60), guessing(right, 50, 0.8)
        said = await speculate(phone, server.connection, PROMPT, guess, max_tokens=30, ahead=1, token=token)
        assert said.rounds < 20
        with pytest.raises(SessionFault, match="25 output tokens a minute"):
            await speculate(phone, server.connection, PROMPT, guess, max_tokens=30, token=token)


async def test_a_draining_server_lets_sessions_with_drafts_finish(phone: Phone) -> None:
    right = expected(checkpoint(), PROMPT, GREEDY, 30)
    async with cloud(checkpoint()) as server:
        asked = asyncio.create_task(
            speculate(phone, server.connection, PROMPT, guessing(right, 50, 0.6), max_tokens=30)
        )
        while not server.service.worker.load.running:
            await server.settled()
        server.service.drain()
        assert (await asked).ids == right
        with pytest.raises(SessionFault, match="draining"):
            await speculate(phone, server.connection, PROMPT, guessing(right, 50, 0.6))


async def test_drafts_before_the_first_token_are_verified_with_the_prompt(phone: Phone) -> None:
    right = expected(checkpoint(), PROMPT, GREEDY, 9)
    async with cloud(checkpoint(), slots=1) as server:
        held = await waiting(server, phone)  # so that the other one waits for its slot
        channel = await server.connection.open()
        await channel.send(drafting(phone.open_frame(PROMPT, max_tokens=9)))
        await until(channel, Admitted)
        await channel.send(Draft(50, right[:4]))
        await channel.send(Draft(54, right[4:7]))
        while not server.service.worker.load.waiting:
            await server.settled()
        await held.aclose()
        tokens = await until(channel, Tokens)
        assert isinstance(tokens, Tokens)
        assert tokens.ids == right[:5]
        await channel.aclose()
        await emptied(server)
