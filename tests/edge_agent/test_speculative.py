"""Drafts on the phone: the text of one process whatever they are, made ahead, given up where they do not pay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_agent.job import Job, Route, Wish
from protocol.errors import SessionFault
from protocol.frames import ClientFrame, Done, Draft, Hidden, Load, Open, ServerFrame, Tokens, encode
from protocol.transport.base import LinkFacts, ServerChannel
from protocol.transport.memory import MemoryConnection
from split_model.sampling import Sampling
from support.cloud import Cloud, cloud
from support.edge import always, checkpoints, text_of
from support.eventually import eventually
from support.phone import runner
from support.speculation import GREEDY, LAYERS, PROMPT, SAMPLED, blurred, drafter, drafting_phone, small, speculate

pytestmark = pytest.mark.anyio
CUTS = (0, 2, LAYERS)
BOTH = pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture
async def real() -> AsyncIterator[Cloud]:
    async with cloud(blurred()[1]) as made:
        yield made


def truth(how: Sampling = GREEDY, tokens: int = 24) -> list[int]:
    """What one process says, ends of text being tokens like others."""
    return list(runner(blurred()[1]).tokens(PROMPT, max_tokens=tokens, sampling=how))


class Tapped(MemoryConnection):
    """A path to a real cloud that keeps the frames."""

    def __init__(self, real: Cloud, rtt_s: float = 0.0):
        super().__init__(self._serve)
        self._real, self._rtt_s = real, rtt_s
        self.up: list[ClientFrame] = []
        self.down: list[ServerFrame] = []
        self.bears = asyncio.Event()  # else tokens stay where they are
        self.bears.set()

    async def _serve(self, channel: ServerChannel) -> None:
        send, receive = channel.send, channel.receive

        async def sending(frame: ServerFrame) -> None:
            self.down.append(frame)
            if isinstance(frame, Tokens):
                await self.bears.wait()
            await send(frame)

        async def receiving() -> ClientFrame:
            frame = await receive()
            self.up.append(frame)
            return frame

        channel.send, channel.receive = sending, receiving  # type: ignore[method-assign]
        await self._real.handle(channel)

    def facts(self) -> LinkFacts:
        """A round trip that was measured somewhere else."""
        return LinkFacts(rtt_s=self._rtt_s, min_rtt_s=self._rtt_s)

    def drafts(self) -> list[Draft]:
        return [frame for frame in self.up if isinstance(frame, Draft)]


async def at_rest(real: Cloud) -> None:
    await eventually(lambda: real.service.rooms.taken == 0)
    assert await real.settled() == (0, 0)


@BOTH
@pytest.mark.parametrize("split", CUTS)
@pytest.mark.parametrize("draft", [1, 3, 8])
async def test_the_text_of_one_process(real: Cloud, tmp_path: Path, draft: int, split: int, how: Sampling) -> None:
    async with drafting_phone(tmp_path, always(real.connection)) as made:
        said, carried = await speculate(made, draft, split, how)
        assert said == truth(how)
        assert carried.exact
        assert 0 < carried.accepted <= carried.drafted
        assert 0 < carried.rounds < len(said)
        await made.means.full.compute.call(lambda: None)
        assert made.means.tiny.free._value == made.means.full.free._value == 4
    await at_rest(real)


@BOTH
@pytest.mark.parametrize("split", CUTS)
async def test_a_stranger_s_drafts_change_nothing(real: Cloud, tmp_path: Path, split: int, how: Sampling) -> None:
    stranger = checkpoints()[0]
    async with drafting_phone(tmp_path, always(real.connection), tiny=stranger) as made:
        said, carried = await speculate(made, 4, split, how)
        assert said == truth(how)
        assert carried.accepted < carried.drafted / 2


@pytest.mark.parametrize("split", CUTS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 10])
async def test_an_answer_ends_inside_a_round(real: Cloud, tmp_path: Path, tokens: int, split: int) -> None:
    async with drafting_phone(tmp_path, always(real.connection)) as made:
        perfect = drafter(made, GREEDY, 8, split, made.means.full)
        said, carried = await speculate(made, 8, split, tokens=tokens, by=perfect)
        assert said == truth(tokens=tokens)
        assert carried.accepted == carried.drafted
    await at_rest(real)


@pytest.mark.parametrize("split", CUTS)
async def test_a_stop_ends_a_draft_and_the_answer(real: Cloud, tmp_path: Path, split: int) -> None:
    how = Sampling(1.0, seed=7)
    async with drafting_phone(tmp_path, always(real.connection)) as made:
        said, _ = await speculate(made, 8, split, how, stops=made.means.full.config.stops)
        assert said == truth(how)
        assert len(said) == 2
    await at_rest(real)


@pytest.mark.parametrize("split", CUTS)
async def test_drafts_go_ahead_of_their_verification_within_a_window(real: Cloud, tmp_path: Path, split: int) -> None:
    tapped = Tapped(real, rtt_s=10.0)
    tapped.bears.clear()
    async with drafting_phone(tmp_path, always(tapped)) as made:
        perfect = drafter(made, GREEDY, 3, split, made.means.full)
        asking = asyncio.create_task(speculate(made, 3, split, by=perfect))
        await eventually(lambda: len(tapped.drafts()) == 4)
        await eventually(lambda: any(isinstance(frame, Tokens) for frame in tapped.down))
        assert [(one.position, len(one.tokens)) for one in tapped.drafts()] == [(21, 3), (24, 3), (27, 3), (30, 3)]
        tapped.bears.set()
        said, carried = await asking
        assert said == truth()
        assert carried.accepted == carried.drafted > 10
        assert {one.epoch for one in tapped.up if isinstance(one, Draft | Hidden)} == {0}


async def test_every_deviation_begins_an_epoch_on_both_sides(real: Cloud, tmp_path: Path) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        said, carried = await speculate(made, 4)
    assert said == truth()
    known, epoch, path = len(PROMPT), 0, list[int]()
    for frame in tapped.drafts():
        assert frame.epoch >= epoch
        path = [*(path if frame.epoch == epoch else []), *frame.tokens]
        epoch = frame.epoch
    answers = [frame for frame in tapped.down if isinstance(frame, Tokens)]
    for one in answers:
        assert one.position == known
        known += len(one.ids)
    assert known == len(PROMPT) + 24
    assert 0 < answers[-1].epoch <= carried.drafted - carried.accepted + 1
    (done,) = (frame for frame in tapped.down if isinstance(frame, Done))
    assert (done.drafted, done.accepted) == (carried.drafted, carried.accepted)


@BOTH
async def test_frames_of_a_round_without_a_split_stay_under_100_bytes(
    real: Cloud, tmp_path: Path, how: Sampling
) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        await speculate(made, 16, 0, how, tokens=100)
        await speculate(made, 16, 0, how, tokens=100, by=drafter(made, how, 16, 0, made.means.full))
    ups = [len(encode(frame)) for frame in tapped.up if not isinstance(frame, Open)]
    downs = [len(encode(frame)) for frame in tapped.down if isinstance(frame, Tokens | Load | Done)]
    assert max(len(frame.tokens) for frame in tapped.drafts()) == 16
    assert max(ups) < 100
    assert max(downs) < 100


async def test_drafting_that_does_not_pay_is_given_up_once(real: Cloud, tmp_path: Path) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        hopeless = drafter(made, GREEDY, 4, steady=False, prior=0.0)
        said, carried = await speculate(made, 4, by=hopeless)
    assert said == truth()
    (only,) = tapped.drafts()
    assert (only.position, only.tokens) == (len(PROMPT), ())
    assert (carried.rounds, carried.drafted) == (0, 0)
    assert sum(isinstance(frame, Tokens) for frame in tapped.down) == 24


@pytest.mark.parametrize("prior", [0.3, 0.99])
async def test_a_stranger_soon_gives_up(real: Cloud, tmp_path: Path, prior: float) -> None:
    tapped = Tapped(real, rtt_s=0.1)
    async with drafting_phone(tmp_path, always(tapped), tiny=checkpoints()[0]) as made:
        stranger = drafter(made, GREEDY, 4, steady=False, prior=prior)
        said, _ = await speculate(made, 4, by=stranger, tokens=100)
    assert said == truth(tokens=100)
    assert tapped.drafts()[-1].tokens == ()


async def test_over_a_split_drafts_pay_for_round_trips_even_when_few_are_right(real: Cloud, tmp_path: Path) -> None:
    tapped = Tapped(real, rtt_s=1.0)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        said, carried = await speculate(made, 4, 2, by=drafter(made, GREEDY, 4, 2, steady=False, prior=0.3))
    assert said == truth()
    assert carried.rounds < 20


async def test_a_draft_ends_where_the_tiny_model_is_unsure(real: Cloud, tmp_path: Path) -> None:
    """A chance of next to nothing at every token: there is no second one in a draft."""
    tapped = Tapped(real, rtt_s=1.0)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        unsure = drafter(made, GREEDY, 8, 1, steady=False, prior=0.95)
        unsure.chance = lambda entropy: 1e-9
        said, _ = await speculate(made, 8, 1, by=unsure)
    assert said == truth()
    assert {len(frame.tokens) for frame in tapped.drafts()} == {1}


async def test_without_a_place_for_the_tiny_model_the_cloud_goes_on_alone(real: Cloud, tmp_path: Path) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped), slots=1) as made:
        tiny = made.means.tiny
        taken = await tiny.seat(tiny.config.layers)
        said, _ = await speculate(made, 4)
        assert said == truth()
        assert [frame.tokens for frame in tapped.drafts()] == [()]
        taken.close()
        said, carried = await speculate(made, 4)
        assert said == truth()
        assert carried.rounds > 0


@pytest.mark.parametrize("split", [0, 2])
async def test_drafts_end_with_the_tiny_model_s_context(real: Cloud, tmp_path: Path, split: int) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped), tiny=small(context=32)) as made:
        said, carried = await speculate(made, 4, split)
        assert said == truth()
        assert carried.rounds > 0
    assert max(frame.position + len(frame.tokens) for frame in tapped.drafts() if frame.tokens) == 32


@pytest.mark.parametrize("split", CUTS)
async def test_an_answer_that_is_left_in_the_middle_of_a_draft_leaves_nothing(
    real: Cloud, tmp_path: Path, split: int
) -> None:
    tapped = Tapped(real)
    async with drafting_phone(tmp_path, always(tapped)) as made:
        compute, begun = made.means.tiny.compute, asyncio.Event()
        loop, by = asyncio.get_running_loop(), drafter(made, GREEDY, 64, split)
        by.chance = lambda entropy: loop.call_soon_threadsafe(begun.set) and 1.0  # type: ignore[assignment, return-value]
        asking = asyncio.create_task(speculate(made, 64, split, by=by, tokens=200))
        await begun.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        for model in (made.means.tiny, made.means.full):
            await compute.call(lambda: None)
            assert model.free._value == 4
            assert model.prefixes.free_slots == 4
        assert len(asyncio.all_tasks()) < 20
        await at_rest(real)


@pytest.mark.parametrize("way", ["the app leaves", "the agent shuts down"])
@pytest.mark.parametrize("split", CUTS)
async def test_an_end_from_outside_in_the_middle_of_a_draft_leaves_nothing(
    real: Cloud, tmp_path: Path, split: int, way: str
) -> None:
    async with drafting_phone(tmp_path, always(real.connection)) as made:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def chance(entropy: float) -> float:
            loop.call_soon_threadsafe(begun.set)
            return 1.0

        made.learned.chance = lambda sampling: chance  # type: ignore[method-assign]
        wish = Wish(Route.SPECULATIVE, split=split, draft=64)
        job = Job(bytes(16), PROMPT, 200, Sampling(), (), wish)
        (answer,) = made.answer(await made.decide(job), [job])
        reading = asyncio.create_task(text_of(answer))
        await begun.wait()
        if way == "the app leaves":
            reading.cancel()
        else:
            made.abort()
        (ended,) = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError | SessionFault)
        await answer.aclose()
        assert answer.outcome is not None
        for model in (made.means.tiny, made.means.full):
            await model.compute.call(lambda: None)
            assert model.free._value == 4
            assert model.prefixes.free_slots == 4
        await at_rest(real)
