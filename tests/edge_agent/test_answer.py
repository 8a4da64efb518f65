"""Answers by every route, and what happens to them when a replica refuses, falls silent or goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import pytest

import edge_agent.link
import edge_agent.runs.attempts
from edge_agent.agent import Agent, Busy
from edge_agent.answer import Answer
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.learned import Agreement
from edge_agent.plan import NoPlan
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.frames import Admitted, Load
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from split_model.sampling import Sampling
from support.cloud import Cloud, cloud
from support.edge import agent, always, begin, checkpoints, text_of
from support.phone import expected, runner

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
LAYERS = 5
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7)


def job(max_tokens: int = 16, sampling: Sampling = GREEDY, stop: tuple[str, ...] = (), **wish: object) -> Job:
    return Job(os.urandom(16), PROMPT, max_tokens, sampling, stop, Wish(**wish))  # type: ignore[arg-type]


def reference(max_tokens: int = 16, sampling: Sampling = GREEDY, tiny: bool = False) -> str:
    folder = checkpoints()[0 if tiny else 1]
    return runner(folder).tokenizer.decode(expected(folder, PROMPT, sampling, max_tokens))


@pytest.fixture
async def server() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


async def settled(made: Agent) -> tuple[int, int]:
    """Free slots of both models, once the compute thread has done all it was asked."""
    await made.means.tiny.compute.call(lambda: None)
    return made.means.tiny.prefixes.free_slots, made.means.full.prefixes.free_slots


WISHES = [
    {"route": Route.CLOUD}, *({"route": Route.SPLIT, "split": k} for k in range(1, LAYERS + 1)),
    {"route": Route.LOCAL, "quality": Quality.BEST},
]  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
async def test_every_route_of_the_full_model_gives_the_same_text(
    server: Cloud, tmp_path: Path, sampling: Sampling
) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        for wish in WISHES:
            answer = await begin(made, job(sampling=sampling, **wish))
            assert await text_of(answer) == reference(sampling=sampling), wish
            outcome = answer.outcome
            assert outcome is not None
            assert (outcome.route, outcome.finish, outcome.tokens) == (wish["route"], "length", 16)
            assert (outcome.exact, outcome.degraded) == (True, False)
        assert await settled(made) == (4, 4)
    assert await server.settled() == (0, 0)


async def test_the_tiny_model_answers_on_its_own_and_is_not_exact(tmp_path: Path) -> None:
    async with agent(tmp_path) as made:
        answer = await begin(made, job(tiny=True))
        assert await text_of(answer) == reference(tiny=True)
        assert answer.outcome is not None
        assert (answer.outcome.exact, answer.outcome.degraded) == (False, False)


async def test_answers_at_once_do_not_change_each_other(server: Cloud, tmp_path: Path) -> None:
    wishes = [{"tiny": True}, {"route": Route.LOCAL, "quality": Quality.BEST}, *WISHES[:2]] * 2
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        answers = [await begin(made, job(sampling=SAMPLED, **wish)) for wish in wishes]
        texts = await asyncio.gather(*(text_of(answer) for answer in answers))
    assert texts == [reference(sampling=SAMPLED, tiny="tiny" in wish) for wish in wishes]


async def test_an_answer_counts_bytes_tokens_and_time(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=2) as made:
        for wish in ({"route": Route.CLOUD}, {"route": Route.SPLIT, "split": 2}):
            answer = await begin(made, job(**wish))
            await text_of(answer)
            outcome, score = answer.outcome, answer.plan.score
            assert outcome is not None
            # predicted and measured count the same: frames with the overhead of packets
            assert 0.8 < score.bytes_down / outcome.bytes_down < 1.2
            assert 0.8 < score.bytes_up / outcome.bytes_up < 1.7
            assert outcome.first_token_s is not None
            assert 0 < outcome.first_token_s <= outcome.total_s
            assert (outcome.transport, outcome.replica, outcome.attempts) == ("memory", "memory:1", 1)
        kept = list(made.decisions.described())
    assert [one["plan"]["route"] for one in kept] == ["split", "cloud"]  # type: ignore[index]
    assert "10, 11" not in json.dumps(kept)  # never the prompt


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud that has gone is given up at once."""
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.2)


async def read(answer: Answer, count: int) -> str:
    """The first pieces."""
    return "".join([(await anext(answer)).text for _ in range(count)])


@pytest.mark.parametrize("wish", [{"route": Route.CLOUD}, {"route": Route.SPLIT, "split": 2}], ids=["cloud", "split"])
async def test_a_lost_replica_is_replaced_without_losing_or_repeating_a_token(
    tmp_path: Path, wish: dict[str, object]
) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(cloud(checkpoints()[1])) for _ in range(2)]
        dials = always(first.connection), always(second.connection)
        made = await stack.enter_async_context(agent(tmp_path, *dials, edge_layers=2))
        answer = await begin(made, job(max_tokens=60, sampling=SAMPLED, **wish))
        begun = await read(answer, 3)
        used = first if first.connection._sessions else second
        await used.connection.aclose()
        assert begun + await text_of(answer) == reference(60, SAMPLED)
        assert answer.outcome is not None
        assert (answer.outcome.attempts, answer.outcome.exact, answer.outcome.tokens) == (2, True, 60)
        assert await settled(made) == (4, 4)


@pytest.mark.usefixtures("impatient")
async def test_without_a_replica_the_tiny_model_goes_on_and_says_so(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection)) as made:
        answer = await begin(made, job(max_tokens=60, route=Route.CLOUD))
        begun = await read(answer, 3)
        await server.connection.aclose()
        text = begun + await text_of(answer)
        outcome = answer.outcome
    assert outcome is not None
    assert text.startswith(reference(3))
    assert (outcome.route, outcome.model, outcome.degraded, outcome.exact) == (Route.LOCAL, "small-1", True, False)
    assert outcome.tokens == 60
    assert "small-1 took over on the phone" in outcome.reason


@pytest.mark.usefixtures("impatient")
async def test_a_phone_with_the_whole_full_model_goes_on_exactly(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        answer = await begin(made, job(max_tokens=60, sampling=SAMPLED, route=Route.SPLIT, split=3))
        begun = await read(answer, 3)
        await server.connection.aclose()
        assert begun + await text_of(answer) == reference(60, SAMPLED)
        assert answer.outcome is not None
        assert (answer.outcome.degraded, answer.outcome.exact) == (False, True)


@pytest.mark.usefixtures("impatient")
async def test_best_ends_with_an_error_where_nothing_can_go_on(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection)) as made:
        answer = await begin(made, job(max_tokens=60, quality=Quality.BEST))
        await read(answer, 3)
        await server.connection.aclose()
        with pytest.raises(LinkLost):
            await text_of(answer)
        assert answer.outcome is not None
        assert answer.outcome.finish.startswith("failed: ")


async def test_the_cloud_is_used_again_when_it_is_back(
    server: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_agent.link, "FIRST_BACKOFF_S", 0.01)
    back = asyncio.Event()

    async def dial(address: Address) -> Connection:
        if not back.is_set():
            raise LinkLost("nobody listens")
        return server.connection

    async with agent(tmp_path, dial) as made:
        answer = await begin(made, job(route=Route.CLOUD))
        await text_of(answer)
        assert answer.outcome is not None
        assert answer.outcome.degraded
        (link,) = made.means.links.links
        with pytest.raises(LinkLost, match="nobody listens"):
            await text_of(await begin(made, job(quality=Quality.BEST)))
        assert link.unreachable == "nobody listens"
        back.set()
        async with asyncio.timeout(10):
            while link.unreachable:  # the watch of the replicas finds it
                await settled(made)
        answer = await begin(made, job(quality=Quality.BEST))
        assert await text_of(answer) == reference()


async def test_a_full_replica_sends_us_to_the_next(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        full, other = [await stack.enter_async_context(cloud(checkpoints()[1], slots=1, waiting=0)) for _ in range(2)]
        full.service.rooms.taken = full.service.rooms.limit
        made = await stack.enter_async_context(agent(tmp_path, always(full.connection), always(other.connection)))
        answer = await begin(made, job(quality=Quality.BEST))
        assert await text_of(answer) == reference()
        assert answer.outcome is not None
        assert (answer.outcome.replica, answer.outcome.attempts) == ("memory:2", 2)
        other.service.rooms.taken = other.service.rooms.limit
        with pytest.raises(SessionFault, match="sessions running and waiting") as refused:
            await text_of(await begin(made, job(quality=Quality.BEST)))
        assert refused.value.code is FaultCode.BUSY
        spare = await begin(made, job(route=Route.CLOUD))
        await text_of(spare)
        assert spare.outcome is not None
        assert spare.outcome.degraded


async def test_a_replica_of_another_model_is_refused_in_words(tmp_path: Path) -> None:
    async with cloud(checkpoints()[0]) as other, agent(tmp_path, always(other.connection)) as made:
        with pytest.raises(SessionFault, match=r"'big-1' with weights .* this server has 'small-1'"):
            await text_of(await begin(made, job(route=Route.CLOUD)))
        with pytest.raises(NoPlan, match="memory:1 refused: wrong_model"):
            await made.decide(job(quality=Quality.BEST))
        answer = await begin(made, job())
        await text_of(answer)
        assert answer.plan.route is Route.LOCAL


async def test_a_silent_replica_is_given_up_for_the_next(server: Cloud, tmp_path: Path) -> None:
    async def silent(channel: ServerChannel) -> None:
        with contextlib.suppress(LinkLost):
            while True:
                await channel.receive()

    async with agent(tmp_path, always(MemoryConnection(silent)), always(server.connection)) as made:
        answer = await begin(made, job(quality=Quality.BEST))
        assert await text_of(answer) == reference()
        assert answer.outcome is not None
        assert answer.outcome.replica == "memory:2"


async def test_a_replica_that_falls_silent_in_mid_answer_is_given_up_too(server: Cloud, tmp_path: Path) -> None:
    """It admits the session and then says nothing, not even its load."""
    digests = server.service.digests

    async def mute(channel: ServerChannel) -> None:
        await channel.receive()
        await channel.send(Admitted(digests, True, 0, 0, False))
        with contextlib.suppress(LinkLost):
            await channel.receive()

    async with agent(tmp_path, always(MemoryConnection(mute)), always(server.connection), edge_layers=2) as made:
        answer = await begin(made, job(quality=Quality.BEST, route=Route.SPLIT, split=2))  # no credit: it must wait
        assert await text_of(answer) == reference()
        assert answer.outcome is not None
        assert answer.outcome.attempts == 2


@pytest.mark.parametrize("wish", [*WISHES[:2], WISHES[-1], {"tiny": True}], ids=str)
async def test_closing_an_answer_frees_every_slot(server: Cloud, tmp_path: Path, wish: dict[str, object]) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        answer = await begin(made, job(max_tokens=900, **wish))
        async with aclosing(answer):
            await read(answer, 3)
        assert await settled(made) == (4, 4)
        assert answer.outcome is not None
        assert answer.outcome.finish == "cancelled"
        assert made.under_way == []
        while await server.settled() != (0, 0):
            pass
        assert made.learned.lengths.expected(None, False) == 40  # a cancelled answer teaches nothing


async def test_an_answer_that_never_begins_holds_nothing(tmp_path: Path) -> None:
    async with agent(tmp_path, requests=1) as made:
        made.learned.agreement = Agreement(((99.0, 0.9, 100), (math.inf, 0.1, 100)), 0.9)
        answer = await begin(made, job(route=Route.LOCAL))
        assert answer.now.held_tiny == len(PROMPT)
        assert await settled(made) == (3, 4)
        with pytest.raises(Busy, match="1 answers under way, limit 1"):
            await begin(made, job(route=Route.LOCAL))
        del answer
        assert await settled(made) == (4, 4)
        again = await begin(made, job(route=Route.LOCAL))
        assert await text_of(again) == reference(tiny=True)
        assert again.outcome is not None
        assert not again.outcome.degraded
        assert [one["measured"]["finish"] for one in made.decisions.described()] == ["length"]  # type: ignore[index]


@pytest.mark.parametrize("leave", ["aclose", "abort"])
async def test_an_answer_that_is_ended_before_it_begins_is_booked_at_once(tmp_path: Path, leave: str) -> None:
    async with agent(tmp_path) as made:
        answer = await begin(made, job(tiny=True))
        if leave == "abort":
            answer.abort(LinkLost("leaving"))
            with pytest.raises(LinkLost, match="leaving"):
                await anext(answer)
        else:
            await answer.aclose()
        assert made.under_way == []
        assert answer.outcome is not None
        assert (answer.outcome.finish, answer.outcome.tokens) == ("cancelled", 0)
        await answer.aclose()
        assert len(list(made.decisions.described())) == 1
        assert await settled(made) == (4, 4)


async def test_a_fault_of_ours_is_booked_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("secret")

    async with agent(tmp_path) as made:
        answer = await begin(made, job(tiny=True))
        monkeypatch.setattr("split_model.tokenizer.TextStream.push", broken)
        with pytest.raises(ZeroDivisionError):
            await text_of(answer)
        assert answer.outcome is not None
        assert answer.outcome.finish == "failed: ZeroDivisionError"
        assert await settled(made) == (4, 4)


@pytest.mark.parametrize(("agreement", "route"), [(0.9, Route.LOCAL), (0.3, Route.CLOUD)])
async def test_the_tiny_model_s_entropy_decides_whether_it_may_answer(
    server: Cloud, tmp_path: Path, agreement: float, route: Route
) -> None:
    async with agent(tmp_path, always(server.connection)) as made:
        made.learned.agreement = Agreement(((99.0, agreement, 100), (math.inf, 1.2 - agreement, 100)), 0.7)
        made.means.links.links[0].path.rtt_s = 10.0  # far away: the phone is the cheaper place
        answer = await begin(made, job())
        assert (answer.plan.route, answer.now.agreement) == (route, agreement)
        assert await text_of(answer) == reference(tiny=route is Route.LOCAL)
        assert await settled(made) == (4, 4)
        await begin(made, job(quality=Quality.BEST))  # nothing to learn: the prompt is not run
        assert await settled(made) == (4, 4)


async def test_a_prompt_is_not_read_where_no_entropy_could_change_the_plan(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection)) as made:
        link = made.means.links.links[0]
        for rtt_s, worst, asked in ((10.0, 0.81, False), (10.0, 0.79, True), (0.0, 0.79, False)):
            made.learned.agreement = Agreement(((1.0, 0.95, 100), (math.inf, worst, 100)), 0.9)
            link.path.rtt_s = rtt_s
            if not rtt_s:  # the phone is slow: the cloud is the place in any case
                link.heard(Load(0, 0, 1, 0.0, 1e15, 1e15, 1e12, 0, False))
            decided = await made.decide(job())
            assert (decided.now.entropy is not None) == asked, (rtt_s, worst)
            decided.close()


async def test_more_answers_than_slots_wait_for_one(tmp_path: Path) -> None:
    async with agent(tmp_path, slots=1) as made:
        answers = [await begin(made, job(sampling=SAMPLED, tiny=True)) for _ in range(3)]
        texts = await asyncio.gather(*(text_of(answer) for answer in answers))
        assert set(texts) == {reference(sampling=SAMPLED, tiny=True)}
        assert await settled(made) == (1, 1)


@pytest.mark.parametrize("wish", [*WISHES[:2], WISHES[-1]], ids=str)
async def test_a_stop_string_ends_the_answer_before_it(server: Cloud, tmp_path: Path, wish: dict[str, object]) -> None:
    whole = reference(60, SAMPLED)
    stop = whole[20:23]
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        answer = await begin(made, job(60, SAMPLED, (stop,), **wish))
        assert await text_of(answer) == whole[: whole.index(stop)]
        assert answer.outcome is not None
        assert answer.outcome.finish == "stop"
        assert await settled(made) == (4, 4)


@pytest.mark.parametrize("wish", [WISHES[0], WISHES[-1]], ids=["cloud", "local"])
async def test_the_text_of_an_id_that_ends_the_answer_is_not_part_of_it(
    server: Cloud, tmp_path: Path, wish: dict[str, object]
) -> None:
    """Also where the tokenizer does not call it special."""
    ids = expected(checkpoints()[1], PROMPT, SAMPLED, 16)
    last = next(index for index in range(4, 16) if ids[index] not in ids[:index] and ids[index] > 6)
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        made.means.full.config = replace(made.means.full.config, stops=frozenset({ids[last]}))
        answer = await begin(made, job(sampling=SAMPLED, **wish))
        assert await text_of(answer) == reference(last, SAMPLED)
        assert answer.outcome is not None
        assert (answer.outcome.finish, answer.outcome.tokens) == ("stop", last + 1)


async def test_what_the_phone_measured_is_known_at_the_next_start(tmp_path: Path) -> None:
    async with agent(tmp_path, edge_layers=2) as made:
        keys = {made.means.tiny.key, made.means.full.key}
    kept = json.loads((tmp_path / "rates.json").read_text())
    assert kept.keys() == keys
    assert all(rates.keys() == {"prefill", "decode"} for rates in kept.values())
    assert (tmp_path / "rates.json").stat().st_mode & 0o777 == 0o600
