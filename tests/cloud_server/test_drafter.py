"""Drafts made in the cloud: the same ids whatever drafts, none where they do not pay, and what is said of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.app import make_app
from cloud_server.arrivals import Drafts
from cloud_server.drafter import Drafter, Line
from cloud_server.rows import Row
from protocol.frames import Done, Load, Tokens
from split_model.model import Model
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.drafting_phone import drafting
from support.phone import Phone, expected, prompt_of

pytestmark = pytest.mark.anyio
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=11)
HOWS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
TINY = {"good": {"blur": 0.02}, "bad": {"seed": 5}, "short": {"max_position_embeddings": 128},
        "fewer ids": {"vocab_size": 300}, "more ids": {"vocab_size": 600, "seed": 5}}  # fmt: skip


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it may be, whether that pays or not."""

    def longest(self: Drafter, rows: list[Row], budget: int) -> dict[Row, int]:
        able = {row: min(row.most_drafts, self.cache.context - row.length) for row in rows if row.drafts.local}
        most = (budget - len(rows)) // max(1, len(able))
        return {row: min(limit, most) for row, limit in able.items() if min(limit, most) > 0}

    monkeypatch.setattr(Drafter, "_wanted", longest)


async def ask(phone: Phone, server: Cloud, prompt: tuple[int, ...], draft: int = 4,
              **wanted: object) -> tuple[tuple[int, ...], Done, Load]:  # fmt: skip
    """A session that leaves drafting to the cloud; its ids, its end, and the last load that it was told."""
    channel = await server.connection.open()
    try:
        await channel.send(drafting(phone.open_frame(prompt, **wanted), 0, draft))  # type: ignore[arg-type]
        ids: list[int] = []
        load: Load | None = None
        while not isinstance(frame := await channel.receive(), Done):
            if isinstance(frame, Tokens):
                assert frame.position == len(prompt) + len(ids)
                assert frame.epoch == 0
                ids += frame.ids
            elif isinstance(frame, Load):
                load = frame
        assert load is not None
        return tuple(ids), frame, load
    finally:
        await channel.aclose()


@HOWS
@pytest.mark.parametrize("draft", [1, 4, 16])
@pytest.mark.parametrize("kind", TINY)
async def test_any_tiny_model_gives_the_full_model_s_text(
    phone: Phone, eager: None, kind: str, draft: int, sampling: Sampling
) -> None:
    prompt = prompt_of(100)
    right = expected(checkpoint(), prompt, sampling, 48)
    async with cloud(checkpoint(), tiny=checkpoint(**TINY[kind])) as server:
        ids, done, _ = await ask(phone, server, prompt, draft, sampling=sampling, max_tokens=48)
    assert ids == right
    assert done.drafted > 0
    assert done.accepted <= done.drafted
    if kind == "good":
        assert done.accepted > 8


@HOWS
async def test_batched_with_strangers_of_every_kind(phone: Phone, eager: None, sampling: Sampling) -> None:
    draw = random.Random(7)
    async with cloud(checkpoint(), tiny=checkpoint(blur=0.02), slots=6, waiting=20, step_tokens=40) as server:
        prompts = [prompt_of(draw.randrange(1, 150), seed) for seed in range(16)]
        drafted = [
            ask(phone, server, prompt, 1 + seed % 7, sampling=sampling, max_tokens=20)
            for seed, prompt in enumerate(prompts[:10])
        ]
        plain = [
            phone.ask(server.connection, prompt, split=seed % 6, sampling=sampling, max_tokens=20)
            for seed, prompt in enumerate(prompts[10:])
        ]
        heard, others = await asyncio.gather(asyncio.gather(*drafted), asyncio.gather(*plain))
    found = [ids for ids, _, _ in heard] + [one.ids for one in others]
    assert found == [expected(checkpoint(), prompt, sampling, 20) for prompt in prompts]
    assert sum(done.accepted for _, done, _ in heard) > 0


async def test_a_server_without_a_tiny_model_goes_on_without(phone: Phone) -> None:
    prompt = prompt_of(30)
    async with cloud(checkpoint()) as server:
        ids, done, load = await ask(phone, server, prompt, max_tokens=12)
    assert ids == expected(checkpoint(), prompt, GREEDY, 12)
    assert (done.drafted, load.draft_rate) == (0, 0.0)


async def test_its_rate_is_told_once_it_is_known(phone: Phone) -> None:
    async with cloud(checkpoint(), tiny=checkpoint(blur=0.02)) as server:
        await server.service.worker.warm_up(40)
        _, _, load = await ask(phone, server, prompt_of(30), max_tokens=12)
    assert load.draft_rate > 0
    assert min(load.decode_rate, load.prefill_rate) > 0


async def test_a_session_without_drafts_gets_none(phone: Phone, eager: None) -> None:
    async with cloud(checkpoint(), tiny=checkpoint(blur=0.02)) as server:
        for split in (0, 2):
            heard = await phone.ask(server.connection, prompt_of(30), split=split, max_tokens=12)
            assert heard.ids == expected(checkpoint(), prompt_of(30), GREEDY, 12)
            assert heard.done.drafted == 0


async def test_a_session_taken_over_goes_on_with_drafts(phone: Phone, eager: None) -> None:
    """The slot is handed on, with what both models hold of the same token log."""
    prompt, name = prompt_of(40), b"a name of 16 byt"
    right = expected(checkpoint(), prompt, SAMPLED, 40)
    async with cloud(checkpoint(), tiny=checkpoint(blur=0.02), slots=1, waiting=0) as server:
        older = await server.connection.open()
        await older.send(
            drafting(phone.open_frame(prompt, request_id=name, sampling=SAMPLED, max_tokens=400), 0, 4)
        )  # fmt: skip
        known = 0
        while known < 12:
            if isinstance(frame := await older.receive(), Tokens):
                known += len(frame.ids)
        ids, _, _ = await ask(phone, server, (*prompt, *right[:5]), request_id=name, attempt=2, sampling=SAMPLED,
                              max_tokens=35)  # fmt: skip
        assert ids == right[5:]
        await older.aclose()


async def test_a_tiny_model_that_breaks_costs_nobody_an_answer(
    phone: Phone, eager: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompt_of(30)
    passes = iter([True, True, False])

    def breaking(self: Drafter, todo: object, own: Callable[..., list[int]] = Drafter._pass) -> list[int]:
        if not next(passes):
            raise RuntimeError("the tiny model broke")
        return own(self, todo)

    monkeypatch.setattr(Drafter, "_pass", breaking)
    async with cloud(checkpoint(), tiny=checkpoint(blur=0.02)) as server:
        ids, _, _ = await ask(phone, server, prompt, max_tokens=20)
    assert ids == expected(checkpoint(), prompt, GREEDY, 20)
    assert "drafting failed" in caplog.text


def over_http(server: Cloud) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_app(server.service)), base_url="http://cloud")


@pytest.mark.parametrize("stop", [None, "the"])
async def test_http_gives_the_same_text_with_drafts(eager: None, stop: str | None) -> None:
    texts, counts = [], []
    for tiny in (None, checkpoint(blur=0.02), checkpoint(seed=5)):
        async with cloud(checkpoint(), tiny=tiny) as server, over_http(server) as http:
            body = {"model": "tiny-llama", "prompt": "the table", "max_tokens": 60, "seed": 4, "stop": stop}
            answer = (await http.post("/v1/completions", json=body)).json()
            texts.append((answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]))
            counts.append(server.service.metrics._drafted._value.get())
    assert texts[0] == texts[1] == texts[2]
    assert counts[0] == 0
    assert min(counts[1:]) > 0


def going_on(length: int, draft: int = 8) -> Row:
    """A row with one position to compute."""
    row = Row(0, [7] * length, length, length, 50, Sampling(), None, Drafts(draft, local=True), slot=0)
    row.done = length - 1
    return row


def measured(draft_s: float, step_s: float, position_s: float) -> Drafter:
    made = Drafter(Model.load(checkpoint(), check=False), 4, 128, 512)
    for count in (1, 2, 4, 8):
        made._passes.seen(count, draft_s)
        made._steps.seen(count, step_s + position_s * count)
    return made


def test_nothing_is_drafted_that_does_not_pay() -> None:
    for draft_s, position_s in ((0.05, 0.0), (0.001, 0.1)):
        row = going_on(20)
        measured(draft_s, 0.02, position_s).propose([row], 128)
        assert not row.drafts.pending
        assert row.drafts.held == 0


def test_as_much_is_drafted_as_pays_and_fits() -> None:
    row, other = going_on(20), going_on(20, draft=2)
    other.slot = 1
    measured(0.0001, 0.02, 0.0).propose([row, other], 128)
    assert (len(row.drafts.pending), len(other.drafts.pending)) == (8, 2)
    assert row.drafts.held == 20 + 7
    for budget, most in ((1, 0), (4, 3), (128, 8)):
        row = going_on(20)
        row.drafts.held = 19
        measured(0.0001, 0.02, 0.0).propose([row], budget)
        assert len(row.drafts.pending) <= most


def test_a_long_prompt_is_caught_up_with_in_pieces() -> None:
    made, row = measured(0.001, 0.02, 0.0), going_on(100)
    held = []
    while not row.drafts.pending:
        made.propose([row], 32)
        held.append(row.drafts.held)
    assert held == [32, 64, 96, 100 + len(row.drafts.pending) - 1]


def test_a_share_that_falls_ends_drafting_and_the_next_answer_tries_again() -> None:
    made, row = measured(0.004, 0.02, 0.001), going_on(20)
    made.propose([row], 128)
    assert row.drafts.pending
    for _ in range(40):
        made._acceptance(row).seen(3, 0)
        made._shared[0].seen(3, 0)
    row.drafts.pending.clear()
    row.drafts.held = 19
    made.propose([row], 128)
    assert not row.drafts.pending
    fresh = going_on(20)
    made.propose([fresh], 128)
    assert fresh.drafts.pending


@given(st.floats(1e-4, 1.0), st.floats(0.0, 1e-2), st.lists(st.integers(1, 128), min_size=3, max_size=60))
def test_a_line_is_found(seconds: float, slope: float, counts: list[int]) -> None:
    line = Line()
    for count in counts:
        line.seen(count, seconds + slope * count)
    if len(set(counts[:6])) > 1 and seconds > slope * 64:
        for count in counts[-6:]:
            assert line.at(count) == pytest.approx(seconds + slope * count, rel=1e-3)


def test_a_line_keeps_its_slope_while_all_counts_are_alike_and_is_not_moved_far_by_one_outlier() -> None:
    line = Line()
    assert line.at(5) == 0.0
    for count in (1, 5, 9):
        line.seen(count, 0.004 + 0.0002 * count)
    for _ in range(2000):
        line.seen(4, 0.0048)
    assert line.at(9) == pytest.approx(0.0058, rel=1e-3)
    line.seen(4, 5.0)
    assert line.at(4) < 0.0054
