"""The rules of one session: what is refused, taken over, granted, and given back."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import pytest
import torch

from cloud_server.rows import Part
from protocol import limits
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.frames import Admitted, Close, Fault, Frame, Hidden, Load, Open, Reason, Tokens
from protocol.tensor import pack, unpack
from protocol.transport.base import ClientChannel
from protocol.transport.memory import MemoryServerChannel
from split_model.flops import head_flops, layer_flops, layers_flops
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.phone import Phone, expected, until

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
NEVER = 400  # answer tokens: far more than any of these tests waits for


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


async def drained(channel: ClientChannel) -> None:
    while True:
        await channel.receive()


async def fault_of(server: Cloud, *frames: Frame) -> Fault:
    channel = await server.connection.open()
    try:
        for frame in frames:
            fresh = isinstance(frame, Open)
            await channel.send(dataclasses.replace(frame, request_id=os.urandom(16)) if fresh else frame)  # type: ignore[arg-type]
        fault = await until(channel, Fault)
        assert isinstance(fault, Fault)
        return fault
    finally:
        await channel.aclose()


async def test_an_attempt_seen_before_runs_nothing(phone: Phone) -> None:
    name = os.urandom(16)
    async with cloud(checkpoint()) as server:
        await phone.ask(server.connection, PROMPT, request_id=name, attempt=2)
        steps = server.service.worker.load.steps
        for attempt in (2, 1):
            with pytest.raises(SessionFault, match="replayed"):
                await phone.ask(server.connection, PROMPT, request_id=name, attempt=attempt)
        assert server.service.worker.load.steps == steps
        heard = await phone.ask(server.connection, PROMPT, request_id=name, attempt=3)
    assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)


async def test_a_higher_attempt_takes_the_session_over_with_what_was_computed(phone: Phone) -> None:
    name = os.urandom(16)
    async with cloud(checkpoint(), slots=1, waiting=0) as server:
        older = await server.connection.open()
        await older.send(phone.open_frame(PROMPT, request_id=name, max_tokens=NEVER))
        await until(older, Tokens)
        newer = asyncio.create_task(phone.ask(server.connection, PROMPT, request_id=name, attempt=2, max_tokens=12))
        fault = await until(older, Fault)
        assert isinstance(fault, Fault)
        assert fault.code is FaultCode.SUPERSEDED
        heard = await newer
        assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 12)
        await older.aclose()


async def test_room_is_refused_in_words_when_slots_and_line_are_full(phone: Phone) -> None:
    async with cloud(checkpoint(), slots=1, waiting=1) as server:
        channels = [await server.connection.open() for _ in range(2)]
        for channel in channels:
            await channel.send(phone.open_frame(PROMPT, max_tokens=NEVER))
            await until(channel, Admitted)
        name = os.urandom(16)
        with pytest.raises(SessionFault, match="limit 2") as refused:
            await phone.ask(server.connection, PROMPT, request_id=name)
        assert refused.value.code is FaultCode.BUSY
        assert refused.value.retry_after_s >= 1
        for channel in channels:
            await channel.aclose()
        while server.service.rooms.taken:
            await server.settled()
        heard = await phone.ask(server.connection, PROMPT, request_id=name)  # a refusal is no attempt
        with pytest.raises(SessionFault, match="replayed"):
            await phone.ask(server.connection, PROMPT, request_id=name)
    assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)


async def test_a_session_in_the_line_hears_that_the_server_lives(phone: Phone) -> None:
    async with cloud(checkpoint(), slots=1) as server:
        first, second = await server.connection.open(), await server.connection.open()
        await first.send(phone.open_frame(PROMPT, split=2, max_tokens=NEVER))  # holds the slot: sends no hidden states
        await until(first, Admitted)
        await second.send(phone.open_frame(PROMPT))
        await until(second, Admitted)
        while (load := await until(second, Load)) and isinstance(load, Load) and not load.waiting:
            pass
        assert (load.running, load.waiting) == (1, 1)
        await first.aclose()
        assert isinstance(await until(second, Tokens), Tokens)
        await second.aclose()


@pytest.mark.parametrize("split", [0, 3])
async def test_a_phone_that_leaves_frees_its_slot(phone: Phone, split: int) -> None:
    async with cloud(checkpoint()) as server:
        for goodbye in (True, False):
            channel = await server.connection.open()
            await channel.send(phone.open_frame(PROMPT, split=split, max_tokens=NEVER))
            await until(channel, Admitted)
            if goodbye:
                await channel.send(Close())
            await channel.aclose()
            while server.service.rooms.taken:
                await server.settled()
            assert await server.settled() == (0, 0)


def hidden(position: int, rows: int, value: float = 0.5, width: int = 64) -> Hidden:
    return next(pack(torch.full((rows, width), value, dtype=torch.bfloat16), position))


async def test_other_numerics_run_and_are_marked(phone: Phone) -> None:
    digests = dataclasses.replace(phone.digests, numerics=b"another machine!")
    async with cloud(checkpoint()) as server:
        heard = await phone.ask(server.connection, PROMPT, digests=digests)
    assert not heard.admitted.exact
    assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)


async def test_credit_is_renewed_when_half_of_it_is_used(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt by split is not held up by the quarter of a second after which a Load comes in any case."""
    monkeypatch.setattr("protocol.limits.HIDDEN_CREDIT", 32 * 128)  # bytes of 32 positions
    monkeypatch.setattr("cloud_server.session.LOAD_AFTER", 1000.0)
    prompt = tuple(6 + i % 500 for i in range(300))
    frames = phone.hidden(prompt, split=2, rows=8)
    async with cloud(checkpoint(), step_tokens=16) as server:
        channel = await server.connection.open()
        await channel.send(phone.open_frame(prompt, split=2, max_tokens=1))
        credit, sent = 0, 0
        for frame in frames:
            while sent + len(frame.data) > credit:
                got = await channel.receive()
                assert isinstance(got, Admitted | Load)
                assert credit <= got.credit <= sent + 32 * 128
                credit = got.credit
            await channel.send(frame)
            sent += len(frame.data)
        tokens = await until(channel, Tokens)
        assert isinstance(tokens, Tokens)
        await channel.aclose()
    assert tokens.ids == expected(checkpoint(), prompt, Sampling(), 1)


async def test_credit_counts_8_bits_as_what_they_are(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed of them makes room for as much, not for what 16 bits would have taken."""
    monkeypatch.setattr("protocol.limits.HIDDEN_CREDIT", 32 * 128)
    monkeypatch.setattr("cloud_server.session.LOAD_AFTER", 1000.0)
    prompt = tuple(6 + i % 500 for i in range(304))
    x = torch.cat([unpack(frame, 64) for frame in phone.hidden(prompt, split=2, rows=8)])
    frames = [frame for at in range(0, len(x), 8) for frame in pack(x[at : at + 8], at, 8)]
    async with cloud(checkpoint(), step_tokens=16) as server:
        channel = await server.connection.open()
        await channel.send(phone.open_frame(prompt, split=2, max_tokens=1))
        credit = sent = 0
        for frame in frames:
            while sent + frame.size > credit:
                got = await channel.receive()
                assert isinstance(got, Admitted | Load)
                assert credit <= got.credit <= sent + 32 * 128
                credit = got.credit
            await channel.send(frame)
            sent += frame.size
        assert isinstance(await until(channel, Tokens), Tokens)
        assert 300 * 68 < sent < 320 * 76
        await channel.aclose()


async def test_a_split_that_sends_no_hidden_states_is_ended(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and pings, and would hold its slot for ever."""
    monkeypatch.setattr("protocol.limits.HIDDEN_WAIT", 0.5)
    async with cloud(checkpoint()) as server:
        fault = await fault_of(server, phone.open_frame(PROMPT, split=2), hidden(0, 8))
    assert fault.code is FaultCode.SILENT
    assert "no hidden states for 0.5 s" in fault.message


async def test_not_a_number_in_one_session_changes_no_other(phone: Phone) -> None:
    async with cloud(checkpoint(), slots=4) as server:
        rounds = [
            phone.ask(server.connection, tuple(range(6 + i, 90 + i)), split=i, max_tokens=16) for i in range(3)
        ]  # fmt: skip
        poison = fault_of(server, phone.open_frame(PROMPT, split=2), hidden(0, 20), hidden(20, 20, float("nan")))
        *heard, fault = await asyncio.gather(*rounds, poison)
        assert fault.code is FaultCode.NOT_FINITE
        again = await phone.ask(server.connection, PROMPT, split=2)  # may sit in the poisoned slot
    for i, one in enumerate(heard):
        assert one.ids == expected(checkpoint(), tuple(range(6 + i, 90 + i)), Sampling(), 16)
    assert again.ids == expected(checkpoint(), PROMPT, Sampling(), 8)


async def test_rates_count_what_the_cloud_computed() -> None:
    """A row that enters at the last layer costs the cloud a head, and must not make it look many times as fast."""
    async with cloud(checkpoint()) as server:
        config, service = server.service.model.config, server.service
        for entry, layers in ((0, 5), (3, 2), (5, 0)):
            row = service.new_row([] if entry else [9] * 10, 10, 10, entry, Sampling(), 4)
            whole = service.worker.flops(Part(row, 0, 10, wanted=1))
            assert whole == layers * layer_flops(config, 0, 10) + head_flops(config)
            row.sparse = True  # its prompt is read whole, what comes behind is not
            assert service.worker.flops(Part(row, 4000, 99, wanted=0)) == layers * layer_flops(config, 4000, 99)
            few = layers_flops(config, range(entry, 5), 4000, 2, sparse=True)
            assert service.worker.flops(Part(row, 4000, 2, wanted=0)) == few


async def test_a_stop_string_ends_the_answer_in_the_cloud(phone: Phone) -> None:
    async with cloud(checkpoint()) as server:
        whole = await phone.ask(server.connection, PROMPT, max_tokens=20)
        decode = server.service.tokenizer.decode
        stop = decode(whole.ids)[4:7]
        heard = await phone.ask(server.connection, PROMPT, max_tokens=20, stop=(stop,))
    assert stop in decode(heard.ids)
    assert stop not in decode(heard.ids[:-1])
    assert heard.ids == whole.ids[: len(heard.ids)]
    assert heard.done.reason is Reason.STOP


async def test_a_draining_server_refuses_new_sessions(phone: Phone) -> None:
    async with cloud(checkpoint()) as server:
        server.service.rooms.draining = True
        with pytest.raises(SessionFault, match="draining"):
            await phone.ask(server.connection, PROMPT)


async def test_a_server_that_goes_is_a_lost_link(phone: Phone) -> None:
    async with cloud(checkpoint()) as server:
        channel = await server.connection.open()
        await channel.send(phone.open_frame(PROMPT, max_tokens=NEVER))
        await until(channel, Tokens)
        await server.connection.aclose()
        with pytest.raises(LinkLost):
            await drained(channel)


async def test_a_silent_phone_is_paused_and_then_ended(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = 0.0
    monkeypatch.setattr(MemoryServerChannel, "silent_s", lambda _: silence)
    async with cloud(checkpoint()) as server:
        channel = await server.connection.open()
        await channel.send(phone.open_frame(PROMPT, max_tokens=NEVER))
        await until(channel, Tokens)
        silence = limits.SILENCE_PAUSE + 1
        await until(channel, Load)  # comes only when no token does
        silence = 0.0
        await until(channel, Tokens)
        silence = limits.SILENCE_END + 1
        fault = await until(channel, Fault)
        assert isinstance(fault, Fault)
        assert fault.code is FaultCode.SILENT
        await channel.aclose()
        while server.service.rooms.taken:
            await server.settled()
        assert await server.settled() == (0, 0)
