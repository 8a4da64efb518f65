"""Decisions as they are exported, and what replaying them says: the same under the same conditions, exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.__main__ import main
from edge_agent.conditions import Conditions, Phone, Power, Rates
from edge_agent.cost import Pair
from edge_agent.decisions import Decision, Decisions, Leg, Outcome
from edge_agent.job import Job, Privacy, Quality, Route, Wish
from edge_agent.plan import NoPlan, choose
from edge_agent.replay import Changes, measurements, records, regret, replayed
from split_model.settings import Sampling
from support.cloud import cloud as serving
from support.edge import agent, always, begin, checkpoints, cloud, conditions, job, phone, shape, text_of

SECRETS = ("mellon", "xyzzy")
PLAIN = Changes()
PAIR = Pair(shape("tiny", layers=1, context=512), shape("full", context=1024), 3)


def decided(
    asked: Job, now: Conditions, both: Pair = PAIR, *, route: Route | None = None, ms: float = 500.0
) -> Decision:
    """A complete answer by the plan that is chosen; `route` is forced as by a wish."""
    asked = replace(asked, wish=replace(asked.wish, route=route)) if route else asked
    plan = choose(asked, both, now)
    leg = Leg(plan.route, plan.split, plan.draft, plan.model, 10)
    outcome = Outcome(
        plan.route, plan.split, plan.model, "stop", 10, 0.1, ms / 1000, True, False, plan.reason, legs=(leg,)
    )
    return Decision(asked, plan, now, outcome)


def exported(folder: Path, *some: Decision, both: Pair = PAIR) -> Path:
    kept, file = Decisions(), folder / "decisions.jsonl"
    for one in some:
        kept.add(one)
    file.write_text("".join(kept.lines(both)))
    return file


@pytest.mark.anyio
async def test_an_agent_s_decisions_replay_exactly_and_hold_no_text(tmp_path: Path) -> None:
    wishes: list[dict[str, Any]] = [
        {}, {"tiny": True}, {"route": Route.CLOUD}, {"route": Route.SPLIT, "split": 2}, {"route": Route.SPECULATIVE},
        {"quality": Quality.BEST}, {"privacy": Privacy.DEVICE}, {"max_bytes": 50_000, "deadline_s": 60.0},
        {"route": Route.SPLIT, "hidden_bits": 8}, {"route": Route.CLOUD, "draft": 0},
    ]  # fmt: skip
    async with serving(checkpoints()[1]) as server, agent(tmp_path, always(server.connection), edge_layers=3) as made:
        prompt = tuple(made.means.tokenizer.encode(SECRETS[0] * 3))
        for number, wish in enumerate(wishes):
            sampling = Sampling(0.7 * (number % 2), seed=3)
            answer = await begin(made, Job(os.urandom(16), prompt, 9, sampling, (SECRETS[1],), Wish(**wish)))
            await text_of(answer)
        lines = list(made.decisions.lines(made.pair))
        newest = list(made.decisions.described(2))
    file = tmp_path / "decisions.jsonl"
    file.write_text("".join(lines))
    found = list(records(file))
    assert len(found) == len(wishes)
    assert [one.plan["route"] for one in found[:2]] == [one["plan"]["route"] for one in newest]  # type: ignore[index]
    for one in found:
        assert replayed(one, PLAIN).same, one.plan
        assert one.job.stop == ("." * 5,)
    said = "".join(lines)
    assert not any(secret in said for secret in SECRETS)
    assert str(list(prompt))[1:-1] not in said
    assert ",".join(map(str, prompt)) not in said


rates = st.builds(Rates, st.floats(1e3, 1e12), st.floats(1e3, 1e12))
clouds = st.builds(
    cloud, rtt_s=st.floats(0, 2), up=st.floats(1e3, 1e9), down=st.floats(1e3, 1e9), rates=rates,
    wait_s=st.floats(0, 5), handshake_trips=st.integers(0, 3), cold=st.booleans(), token_bytes=st.integers(0, 500),
    price_s_per_mb=st.floats(0, 5), load_age_s=st.none() | st.floats(0, 9),
    draft_rate=st.just(0.0) | st.floats(1e6, 1e12), unreachable=st.none() | st.just("gone"),
    refused=st.none() | st.just("no"),
)  # fmt: skip
around = st.builds(
    Conditions,
    st.builds(Phone, rates, rates, st.integers(0, 4), st.floats(0, 1), st.integers(0, 1 << 40),
              st.none() | st.floats(0, 1), st.none() | st.booleans(),
              st.builds(Power, st.sampled_from([1.0, 0.8, 0.5]))),
    st.none() | clouds, answer_tokens=st.floats(1, 500), agreement=st.floats(0, 1), held_tiny=st.integers(0, 50),
    alpha=st.floats(0, 1), places=st.lists(st.floats(0, 1), max_size=5).map(tuple), entropy=st.none() | st.floats(0, 9),
)  # fmt: skip
wishes = st.builds(
    Wish, quality=st.sampled_from(Quality), privacy=st.sampled_from(Privacy), deadline_s=st.none() | st.floats(0.1, 99),
    max_bytes=st.none() | st.integers(1000, 10**7),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    now=around,
    wish=wishes,
    prompt=st.integers(1, 400),
    limit=st.integers(1, 600),
    temperature=st.sampled_from([0.0, 0.8]),
)
def test_a_round_trip_gives_the_recorded_scores_exactly(
    tmp_path_factory: pytest.TempPathFactory, now: Conditions, wish: Wish, prompt: int, limit: int, temperature: float
) -> None:
    asked = Job(bytes(16), tuple(range(prompt)), limit, Sampling(temperature), ("ö",), wish)
    try:
        decision = decided(asked, now)
    except NoPlan:
        return
    (record,) = records(exported(tmp_path_factory.mktemp("replay"), decision))
    assert record.conditions == now
    assert record.wish == wish
    assert record.pair == PAIR
    assert record.job.stop == ("..",)
    again = replayed(record, PLAIN)
    assert again.same
    assert again.plan is not None
    assert again.plan == decision.plan  # not only as it is described


NEAR = conditions(phone=phone(full=Rates(1e6, 1e5)), cloud=cloud(rtt_s=0.02, up=1e6, down=1e6, rates=Rates(1e7, 1e6)))


def replays(tmp_path: Path, changes: Changes) -> Any:
    (record,) = records(exported(tmp_path, decided(job(prompt=20, max_tokens=100), NEAR)))
    found = replayed(record, changes)
    assert not found.same
    return found.plan


def test_other_conditions_choose_other_plans(tmp_path: Path) -> None:
    assert choose(job(prompt=20, max_tokens=100), PAIR, NEAR).route is Route.CLOUD
    assert replays(tmp_path, Changes(cloud_rate_factor=0.001)).route is Route.LOCAL
    assert replays(tmp_path, Changes(edge_rate_factor=1000.0)).route is Route.LOCAL
    assert replays(tmp_path, Changes(cloud_wait_s=30.0)).route is Route.LOCAL
    assert replays(tmp_path, Changes(rtt_ms=20_000.0)).route is Route.LOCAL
    assert replays(tmp_path, Changes(up_mbit=1e-5)).route is Route.LOCAL
    assert replays(tmp_path, Changes(price_per_mb=5e3)).route is Route.LOCAL
    plan = replays(tmp_path, Changes(alpha=1.0))
    assert plan.score.cost == pytest.approx(plan.score.network_s)
    apart = replace(NEAR, phone=replace(NEAR.phone, drafts=Rates(8.0, 2.0), front=Rates(6.0, 4.0)))
    halved = Changes(edge_rate_factor=0.5).to(apart).phone
    assert (halved.drafts, halved.front) == (Rates(4.0, 1.0), Rates(3.0, 2.0))
    slower = replays(tmp_path, Changes(governor=0.5))
    by_route = {one.score.model: one.score for one in slower.candidates if one.score.route is Route.LOCAL}
    before = {one.score.model: one.score for one in choose(job(prompt=20, max_tokens=100), PAIR, NEAR).candidates}
    assert by_route["tiny"].compute_s == pytest.approx(2 * before["tiny"].compute_s)


def test_regret_is_by_what_was_measured_of_requests_that_are_alike(tmp_path: Path) -> None:
    asked = job(prompt=20, max_tokens=100)
    some = [
        decided(asked, NEAR, route=Route.CLOUD, ms=300), decided(asked, NEAR, route=Route.CLOUD, ms=340),
        decided(asked, NEAR, route=Route.SPLIT, ms=200), decided(job(prompt=21, max_tokens=100), NEAR, ms=1.0),
    ]  # fmt: skip
    found = list(records(exported(tmp_path, *some)))[::-1]  # as they were decided
    spent = measurements(found)
    free = Changes(any_route=True)
    assert [regret(replayed(one, free), spent) for one in found] == [pytest.approx(0.6)] * 3 + [None]
    stays = [regret(replayed(one, PLAIN), spent) for one in found]
    assert stays == [pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.0), None]


def test_the_command_prints_both_plans_and_a_summary_without_torch(tmp_path: Path) -> None:
    file = exported(tmp_path, *(decided(job(prompt=size, max_tokens=100), NEAR) for size in (20, 30)))
    script = (
        "import sys; from edge_agent.__main__ import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, "replay", str(file), "--cloud-rate-factor", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2 recorded decisions" in done.stdout
    assert "0 of 2 with exactly the recorded scores, 2 with another plan" in done.stdout
    assert "local by full" in done.stdout


def test_unchanged_the_command_says_that_nothing_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported(tmp_path, *(decided(job(prompt=size, max_tokens=100), NEAR) for size in (20, 30)))
    assert main(["replay", str(file)]) == 0
    assert "2 of 2 with exactly the recorded scores, 0 with another plan" in capsys.readouterr().out


def spoilt(line: str, path: str, value: object) -> str:
    record = json.loads(line)
    *way, last = path.split(".")
    place = record
    for name in way:
        place = place[name]
    place[last] = value
    return json.dumps(record) + "\n"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("conditions.phone.tiny.decode", "fast", "line 2: conditions.phone.tiny.decode: "),
        ("conditions.cloud.rtt_s", float("nan"), "line 2 is no record: NaN is no number"),
        ("prompt_tokens", 0, "line 2: prompt_tokens: "),
        ("prompt_tokens", 10**9, "line 2: prompt_tokens: "),
        ("wish.route", "by pigeon", "line 2: wish.route: "),
        ("wish.split", 3, "line 2: wish: Value error, split 3 goes with route"),
        ("id", "zz", "line 2: id: "),
        ("pair", None, "line 2: pair: "),
    ],
)
def test_what_is_no_record_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, value: object, words: str
) -> None:
    file = exported(tmp_path, decided(job(), NEAR))
    line = file.read_text()
    file.write_text(line + spoilt(line, path, value))
    assert main(["replay", str(file)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rtt-ms", "-1"], "--rtt-ms -1, must be 0 or more"),
        (["--up-mbit", "0"], "--up-mbit 0, must be more than 0"),
        (["--alpha", "2"], "--alpha 2, must be 0 to 1"),
        (["--governor", "0"], "--governor 0, must be more than 0 to 1"),
        (["--cloud-rate-factor", "nan"], "--cloud-rate-factor nan, must be more than 0"),
    ],
)
def test_conditions_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    file = exported(tmp_path, decided(job(), NEAR))
    assert main(["replay", str(file), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_missing_or_empty_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    assert main(["replay", str(tmp_path / "empty")]) == 2
    assert "holds no record" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
