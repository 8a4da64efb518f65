"""Drafts, hidden states and tokens that cross on the way, in any order of events: the log is right and nobody waits."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_server.arrivals import Drafts
from cloud_server.rows import MOST_PENDING, Emitted, Row
from cloud_server.scheduler import Scheduler
from protocol.errors import BadFrame
from protocol.frames import Draft, Hidden, Tokens
from split_model.cache import Cache
from split_model.prefix import Prefixes
from split_model.sampling import Sampling
from support.drafting_phone import Path
from support.edge import shape

PROMPT, ANSWER = 5, 40


def token(position: int) -> int:
    """The full model's."""
    return 100 + position * 7 % 50


class Cloud:
    """Rows and a scheduler with an engine that knows the answer; checks what it is given to compute."""

    def __init__(self, entry: int, limit: int, step_tokens: int = 32):
        self.plans = Scheduler(Prefixes(Cache(shape(context=256), 2)), step_tokens, frozenset({1}))
        log = [] if entry else [5] * PROMPT
        self.row = Row(entry, log, PROMPT, PROMPT, ANSWER, Sampling(), None, Drafts(limit))
        self.plans.add(self.row)
        self.computed = 0

    def take(self, frame: Draft | Hidden) -> None:
        if self.row.ended:
            return
        if isinstance(frame, Draft):
            self.row.propose(frame)
        elif self.row.expects(frame):
            self.row.hidden.push(torch.tensor([[float(one)] for one in frame.data]), frame.size)

    def step(self) -> Emitted | None:
        step = self.plans.plan()
        if step is None:
            return None
        (part,) = step.parts
        stop = part.start + part.count
        self.computed += part.count
        if self.row.entry:  # each is that of its own position, with the token that stood there
            stood = self.row.hidden.take(part.count)[:, 0].tolist()
            known = [*[5] * PROMPT, *self.row.log, *self.row.drafts.pending]
            assert stood == known[part.start : stop]
        else:
            assert len(self.row.ids(part.start, part.count)) == part.count
        drawn = [token(position) for position in range(stop - part.wanted + 1, stop + 1)]
        emitted = self.plans.apply(step, drawn)
        return emitted[0][1] if emitted else None


class Wire:
    """A phone and a cloud with their frames under way in both directions."""

    def __init__(self, entry: int, limit: int, ahead: int, share: float, seed: int, pauses: float):
        self.rng = Random(seed)
        self.cloud = Cloud(entry, limit, self.rng.choice([2, 8, 32]))
        self.phone = Path([5] * PROMPT, self._guess, limit, ahead)
        self.up: deque[Draft | Hidden] = deque()
        self.down: deque[Tokens] = deque()
        self.share, self.pauses, self.front = share, pauses, 0

    def _guess(self, position: int) -> int | None:
        if self.rng.random() < self.pauses:
            return None
        return token(position) if self.rng.random() < self.share else 99

    def speak(self) -> None:
        """What the phone has to say in its present state."""
        if len(self.phone.log) >= PROMPT + ANSWER:
            return
        if self.phone.alone and self.rng.random() < 0.3:
            self.phone.alone = False
        self.up += self.phone.drafts()
        if self.cloud.row.entry:
            tokens = [*self.phone.log, *self.phone.path][self.front :]
            if tokens:
                self.up.append(Hidden(self.front, len(tokens), 1, bytes(tokens), epoch=self.phone.epoch))
                self.front += len(tokens)
        elif not self.phone.path and not self.phone.alone:
            self.phone.alone = True
            self.up.append(Draft(len(self.phone.log), (), self.phone.epoch))

    def hear(self) -> None:
        if self.phone.told(self.down.popleft()):
            self.front = len(self.phone.log) - 1

    def run(self) -> None:
        """One thing after the other, whichever may happen, until nothing can."""
        self.speak()
        while True:
            able = [self._step]
            if self.up:
                able += [self._arrive] * 2
            if self.down:
                able += [self._answer] * 2
            if not self.rng.choice(able)() and not self.up and not self.down:
                return

    def _step(self) -> bool:
        before = self.cloud.computed
        emitted = self.cloud.step()
        if emitted is not None:
            self.down.append(Tokens(emitted.position, emitted.ids, emitted.epoch))
        return self.cloud.computed > before

    def _arrive(self) -> bool:
        self.cloud.take(self.up.popleft())
        return True

    def _answer(self) -> bool:
        self.hear()
        self.speak()
        return True


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([0, 2]), st.integers(1, 6), st.integers(0, 4), st.floats(0.0, 1.0), st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_whatever_crosses_the_answer_is_right_and_comes_to_its_end(
    entry: int, limit: int, ahead: int, share: float, seed: int, pauses: float
) -> None:
    wire = Wire(entry, limit, ahead, share, seed, pauses)
    wire.run()
    assert wire.phone.log == [5] * PROMPT + [token(PROMPT + at) for at in range(ANSWER)]
    row = wire.cloud.row
    assert row.ended
    assert row.slot is None
    assert row.drafts.accepted <= row.drafts.drafted


@pytest.mark.parametrize("entry", [0, 2])
def test_stale_work_costs_no_position(entry: int) -> None:
    """Two drafts ahead of one that fails: neither they nor their hidden states are computed."""
    cloud = Cloud(entry, limit=2)
    tokens = [99, *[token(PROMPT + at) for at in range(1, 6)]]
    frames: list[Draft | Hidden] = [Draft(PROMPT + at, tuple(tokens[at : at + 2])) for at in (0, 2, 4)]
    stale: list[Draft | Hidden] = [Draft(PROMPT + 6, (7,))]
    if entry:
        frames.append(Hidden(0, PROMPT + 6, 1, bytes([5] * PROMPT + tokens)))
        stale.append(Hidden(PROMPT + 6, 1, 1, b"\7"))
    for frame in frames:
        cloud.take(frame)
    assert cloud.step() == Emitted(PROMPT, (token(PROMPT),), None, epoch=1, drafted=2, accepted=0)
    assert cloud.computed == PROMPT + 2
    for frame in stale:
        cloud.take(frame)
    assert cloud.step() is None
    assert cloud.row.starved
    assert not cloud.row.hidden.rows
    assert cloud.row.hidden.freed == (PROMPT + 7 if entry else 0)  # bytes: the credit is given back


def at_work(limit: int = 4) -> Cloud:
    """A row whose first token is known."""
    cloud = Cloud(0, limit)
    assert cloud.step() is not None
    return cloud


def test_a_draft_that_begins_with_what_is_known_is_read_from_there() -> None:
    cloud = at_work()
    cloud.take(Draft(PROMPT, (token(PROMPT), token(PROMPT + 1), 99)))
    emitted = cloud.step()
    assert emitted is not None
    assert emitted.ids == (token(PROMPT + 1), token(PROMPT + 2))
    assert (emitted.drafted, emitted.accepted, emitted.epoch) == (2, 1, 1)


def test_a_draft_that_differs_from_what_is_known_is_dropped_and_counted_as_a_deviation() -> None:
    cloud = at_work()
    cloud.take(Draft(PROMPT, (99, token(PROMPT + 1))))
    assert (cloud.step(), cloud.row.drafts.epoch) == (None, 1)
    cloud.take(Draft(PROMPT + 1, (token(PROMPT + 1),), epoch=1))
    assert cloud.step() is not None


def test_a_phone_that_saw_a_deviation_first_is_followed() -> None:
    """It had drafted past the last verified token without having sent so."""
    cloud = at_work()
    cloud.take(Draft(PROMPT + 1, (token(PROMPT + 1),), epoch=1))
    emitted = cloud.step()
    assert emitted is not None
    assert (emitted.epoch, emitted.accepted) == (1, 1)


def test_the_server_goes_on_alone_when_told_and_until_the_next_draft() -> None:
    cloud = at_work()
    assert cloud.step() is None
    cloud.take(Draft(PROMPT + 1, ()))
    assert [item.ids for item in (cloud.step(), cloud.step()) if item] == [(token(PROMPT + 1),), (token(PROMPT + 2),)]
    cloud.take(Draft(PROMPT + 2, (token(PROMPT + 2), token(PROMPT + 3))))
    emitted = cloud.step()
    assert emitted is not None
    assert emitted.ids == (token(PROMPT + 3), token(PROMPT + 4))
    assert cloud.step() is None


def test_the_last_token_waits_for_no_draft() -> None:
    cloud = Cloud(0, 64)
    cloud.take(Draft(PROMPT, tuple(token(PROMPT + at) for at in range(ANSWER - 2))))
    while not cloud.row.ended:
        assert cloud.step() is not None
    assert cloud.row.log[PROMPT:] == [token(PROMPT + at) for at in range(ANSWER)]


@pytest.mark.parametrize(
    ("drafts", "words"),
    [
        ([Draft(PROMPT + 2, (7,))], "from position 7 on, expected 6"),
        ([Draft(PROMPT - 1, (5,))], "from position 4 on, expected 6"),
        ([Draft(PROMPT + 1, (7,)), Draft(PROMPT + 1, (7,))], "from position 6 on, expected 7"),
        ([Draft(PROMPT + 1, (7,)), Draft(PROMPT + 3, (7,))], "from position 8 on, expected 7"),
        ([Draft(2**32 - 1, (7,))], "from position 4294967295 on, expected 6"),
        ([Draft(PROMPT + 1, (7,), epoch=2)], "epoch 2, at most 1"),
        ([Draft(PROMPT + 1, (7,), epoch=2**32 - 1)], "at most 1"),
    ],
)
def test_a_draft_that_follows_nothing_is_refused(drafts: list[Draft], words: str) -> None:
    cloud = at_work()
    *fine, bad = drafts
    for draft in fine:
        cloud.take(draft)
    with pytest.raises(BadFrame, match=words):
        cloud.take(bad)


def test_drafts_beyond_the_bound_are_refused() -> None:
    cloud = at_work()
    for at in range(0, MOST_PENDING, 64):
        cloud.take(Draft(PROMPT + 1 + at, (7,) * 64))
    with pytest.raises(BadFrame, match=f"{MOST_PENDING + 1} drafts to be verified, limit {MOST_PENDING}"):
        cloud.take(Draft(PROMPT + 1 + MOST_PENDING, (7,)))
    assert len(cloud.row.drafts.pending) == MOST_PENDING


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (Hidden(PROMPT, 2, 1, b"ab"), "expected 5 to at most 5"),
        (Hidden(PROMPT + 1, 1, 1, b"a"), "expected 5 to at most 5"),
        (Hidden(PROMPT, 1, 1, b"a", epoch=2), "epoch 2, at most 1"),
    ],
)
def test_hidden_states_of_what_was_not_drafted_are_refused(hidden: Hidden, words: str) -> None:
    cloud = Cloud(2, 4)
    cloud.take(Hidden(0, PROMPT, 1, bytes([5] * PROMPT)))
    assert cloud.step() is not None
    with pytest.raises(BadFrame, match=words):
        cloud.take(hidden)


def test_an_epoch_without_drafts_is_refused() -> None:
    cloud = Cloud(2, 0)
    cloud.take(Hidden(0, PROMPT, 1, bytes([5] * PROMPT)))
    cloud.step()
    with pytest.raises(BadFrame, match="epoch 1, at most 0"):
        cloud.take(Hidden(PROMPT, 1, 1, b"a", epoch=1))
