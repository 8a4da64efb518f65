"""The attempts that carry an answer: when another is made, and when the cloud counts as lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import edge_agent.runs.attempts
import edge_agent.runs.session
from edge_agent.agent import Agent
from edge_agent.answer import Answer
from edge_agent.job import Quality, Route
from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.runs.attempts import Attempts
from edge_agent.state import State
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.frames import Admitted, Digests, Done, Fault, Hidden, Open, Reason, Tokens
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.cloud import cloud
from support.edge import agent, always, begin, checkpoints, job, text_of
from support.eventually import eventually
from support.phone import Phone, runner

pytestmark = pytest.mark.anyio
Serve = Callable[[ServerChannel, Open], Awaitable[None]]


class Script(MemoryConnection):
    """A replica that does as it is told for each session in turn, the last for all that follow."""

    def __init__(self, *turns: Serve):
        super().__init__(self._serve)
        self._turns = turns
        self.opened: list[Open] = []

    async def _serve(self, channel: ServerChannel) -> None:
        opened = await channel.receive()
        assert isinstance(opened, Open)
        self.opened.append(opened)
        with contextlib.suppress(LinkLost):
            await self._turns[min(len(self.opened), len(self._turns)) - 1](channel, opened)


def digests() -> Digests:
    return Phone(checkpoints()[1]).digests


async def admit(channel: ServerChannel, exact: bool = True) -> None:
    await channel.send(Admitted(digests(), exact, held=0, credit=4 << 20, early=False))


async def crash(channel: ServerChannel, opened: Open) -> None:
    await admit(channel)


async def mute(channel: ServerChannel, opened: Open) -> None:
    while True:
        await channel.receive()


async def admit_and_fall_silent(channel: ServerChannel, opened: Open) -> None:
    await admit(channel)
    await mute(channel, opened)


def says(*ids: int, exact: bool = True, shift: int = 0, to_the_end: bool = False) -> Serve:
    """Admits, gives these tokens, and goes."""

    async def serve(channel: ServerChannel, opened: Open) -> None:
        await admit(channel, exact)
        for index, token in enumerate(ids):
            await channel.send(Tokens(opened.log_length + index + shift, (token,)))
        if to_the_end:
            await channel.send(Done(Reason.LENGTH, len(ids)))

    return serve


def text(*ids: int) -> str:
    return runner(checkpoints()[1]).tokenizer.decode(ids)


async def asked(made: Agent, tokens: int = 4, **wish: object) -> tuple[str, Answer]:
    answer = await begin(made, job(max_tokens=tokens, **wish))
    return await text_of(answer), answer


async def test_a_warm_connection_that_has_died_is_dialled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 30.0)
    waiting = [Script(mute), Script(says(20, 21, 22, 23))]

    async def dial(address: Address) -> Connection:
        return waiting.pop(0)

    async with agent(tmp_path, dial) as made:
        (link,) = made.means.links.links
        await eventually(lambda: link.dialler.warm)
        said, answer = await asked(made, quality=Quality.BEST)
        assert said == text(20, 21, 22, 23)
        assert answer.outcome is not None
        assert answer.outcome.attempts == 2
        assert not waiting


@pytest.mark.parametrize("serve", [crash, admit_and_fall_silent], ids=["crash", "silence"])
async def test_a_replica_that_only_ever_admits_is_lost_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.5)
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_S", 0.1)
    dialled: list[Script] = []

    async def dial(address: Address) -> Connection:
        dialled.append(Script(serve))
        return dialled[-1]

    async with agent(tmp_path, dial) as made:
        async with asyncio.timeout(60):
            _, answer = await asked(made, route=Route.CLOUD)
        assert answer.outcome is not None
        assert answer.outcome.model == "small-1"
        assert answer.outcome.attempts <= 6


@pytest.mark.parametrize(("heard_s", "brought", "again"), [(0.0, False, False), (60.0, False, True), (0.0, True, True)])
async def test_the_cloud_s_time_runs_while_nobody_is_there_and_begins_anew_with_every_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard_s: float, brought: bool, again: bool
) -> None:
    """Waiting in a replica's line is not waiting for a replica."""
    link = Link(Address("here", 1), always(Script(mute)))
    attempts = Attempts(Links([link], State(tmp_path)))
    attempts._heard_at -= 2 * edge_agent.runs.session.LOST_S  # so long ago
    attempts.ended(heard_s, brought)
    ended = contextlib.nullcontext() if again else pytest.raises(LinkLost, match="no replica answers: reset")
    with ended:
        await attempts.failed(link, LinkLost("reset"), begun=brought)
    assert (link.unreachable is None) == again


async def test_hidden_states_follow_open_without_waiting_for_admission(tmp_path: Path) -> None:
    async def serve(channel: ServerChannel, opened: Open) -> None:
        hidden = await channel.receive()
        assert isinstance(hidden, Hidden)
        assert hidden.rows == opened.log_length
        await says(20)(channel, opened)

    async with agent(tmp_path, always(Script(serve)), edge_layers=2) as made:
        said, _ = await asked(made, tokens=1, quality=Quality.BEST, route=Route.SPLIT, split=2)
    assert said == text(20)


async def test_exact_is_every_replica_that_gave_tokens(tmp_path: Path) -> None:
    rest = says(21, 22, 23)
    for first, exact in ((says(20, exact=False), False), (says(20), True)):
        async with agent(tmp_path, always(Script(first, rest))) as made:
            _, answer = await asked(made, quality=Quality.BEST)
        assert answer.outcome is not None
        assert answer.outcome.exact is exact
    async with agent(tmp_path, always(Script(says(exact=False), says(20, 21, 22, 23)))) as made:
        _, answer = await asked(made, quality=Quality.BEST)
    assert answer.outcome is not None
    assert answer.outcome.exact  # the first gave nothing


async def unadmitted(channel: ServerChannel, opened: Open) -> None:
    await channel.send(Tokens(opened.log_length, (20,)))


@pytest.mark.parametrize("serve", [says(20, shift=1), unadmitted], ids=["misplaced", "before Admitted"])
async def test_tokens_that_do_not_fit_are_the_server_s_fault(tmp_path: Path, serve: Serve) -> None:
    async with agent(tmp_path, always(Script(serve)), always(Script(says(20, 21, 22, 23)))) as made:
        made.means.links.links[1].path.rtt_s = 1.0  # the second choice
        said, _ = await asked(made, quality=Quality.BEST)
        assert said == text(20, 21, 22, 23)
    async with agent(tmp_path, always(Script(serve))) as made:
        _, answer = await asked(made, quality=Quality.FAST, route=Route.CLOUD)
        assert answer.outcome is not None
        assert answer.outcome.model == "small-1"
        with pytest.raises(SessionFault, match="the server sent tokens at position") as fault:
            await asked(made, quality=Quality.BEST)
        assert fault.value.code is FaultCode.INTERNAL


async def test_a_split_that_the_phone_finishes_is_no_split_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.2)
    gone = Script(says(20), crash)
    async with agent(tmp_path, always(gone), edge_layers=2) as made:
        _, answer = await asked(made, route=Route.SPLIT, split=2)
        assert answer.outcome is not None
        assert (answer.outcome.route, answer.outcome.split, answer.outcome.degraded) == (Route.LOCAL, 0, True)


async def test_a_prompt_beyond_a_server_s_own_limit_is_answered_elsewhere(tmp_path: Path) -> None:
    async with cloud(checkpoints()[1], context=16) as small, agent(tmp_path, always(small.connection)) as made:
        made.means.links.links[0].path.rtt_s = 0.0

        async def ask(**wish: object) -> Answer:
            answer = await begin(made, job(prompt=20, max_tokens=4, **wish))
            await text_of(answer)
            return answer

        answer = await ask()  # "balanced": the tiny model is not good enough, until there is nobody else
        assert (answer.plan.route, answer.plan.degraded) == (Route.CLOUD, False)
        assert answer.outcome is not None
        assert (answer.outcome.model, answer.outcome.degraded) == ("small-1", True)
        for wish in ({"quality": Quality.BEST}, {"route": Route.CLOUD}):
            with pytest.raises(SessionFault, match=r"20 tokens .* the context holds 16") as fault:
                await ask(**wish)
            assert fault.value.code is FaultCode.CONTEXT_LENGTH_EXCEEDED


def refuses(code: FaultCode, retry_after_s: float = 0.0) -> Serve:
    async def serve(channel: ServerChannel, opened: Open) -> None:
        await channel.send(Fault(code, "not now", retry_after_s))

    return serve


async def test_a_replica_that_drained_carries_the_answer_when_it_is_back(tmp_path: Path) -> None:
    """It refuses this very answer, is started again, and the other one dies."""
    first = Script(refuses(FaultCode.DRAINING), says(21, 22, 23))

    async def outlast(channel: ServerChannel, opened: Open) -> None:
        await admit(channel)
        await channel.send(Tokens(opened.log_length, (20,)))
        await asyncio.sleep(2 * edge_agent.runs.attempts.PAUSE_S)  # longer than the refusal stands
        raise LinkLost("killed")

    second = Script(outlast, refuses(FaultCode.BUSY, 60.0))
    async with agent(tmp_path, always(first), always(second)) as made:
        made.means.links.links[1].path.rtt_s = 1.0  # the second choice
        said, answer = await asked(made, quality=Quality.BEST, route=Route.CLOUD)
        assert said == text(20, 21, 22, 23)
        assert answer.outcome is not None


async def test_a_replica_thought_lost_is_tried_where_the_other_refuses(tmp_path: Path) -> None:
    back, drains = Script(says(20, 21, 22, 23)), Script(refuses(FaultCode.DRAINING, 5.0))
    async with agent(tmp_path, always(back), always(drains)) as made:
        made.means.links.links[0].lost("killed a while ago")
        said, _ = await asked(made, quality=Quality.BEST, route=Route.CLOUD)
        assert said == text(20, 21, 22, 23)
