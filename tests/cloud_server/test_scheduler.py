"""Who runs in the next step, with how much, and who waits."""

from __future__ import annotations

import pytest
import torch

from cloud_server.admission import REMEMBERED_S, RequestTable, Rooms
from cloud_server.rows import Row
from cloud_server.scheduler import Scheduler
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Reason
from split_model.cache import Cache
from split_model.prefix import Prefixes
from split_model.sampling import Sampling
from support.edge import shape


def scheduler(slots: int = 4, step_tokens: int = 32) -> Scheduler:
    config = shape(context=256)
    return Scheduler(Prefixes(Cache(config, slots)), step_tokens, frozenset({1}))


def row(length: int, entry: int = 0, max_tokens: int = 8) -> Row:
    return Row(entry, [] if entry else [5] * length, length, length, max_tokens, Sampling(), None)


def feed(one: Row, count: int) -> None:
    one.hidden.push(torch.zeros(count, 4, dtype=torch.bfloat16), 8 * count)


def run(plans: Scheduler, token: int = 7) -> dict[Row, int]:
    """One step, as the engine would leave it; the shares by row."""
    step = plans.plan()
    if step is None:
        return {}
    for part in step.parts:
        if part.row.entry:
            part.row.hidden.take(part.count)
    shares = {part.row: part.count for part in step.parts}
    plans.apply(step, [token for part in step.parts for _ in range(part.wanted)])
    return shares


def test_a_long_prompt_does_not_stall_those_that_decode() -> None:
    plans = scheduler()
    short, long = row(3), row(200)
    plans.add(short)
    run(plans)
    plans.add(long)
    chunks = []
    while long.length == 200:
        shares = run(plans)
        if not short.ended:
            assert shares[short] == 1
        assert sum(shares.values()) <= 32
        chunks.append(shares[long])
    assert sum(chunks) == 200
    assert len(chunks) > 5


def test_chunks_end_on_tiles_so_that_none_is_computed_twice() -> None:
    plans, long = scheduler(step_tokens=21), row(100)
    plans.add(long)
    while long.done < 100:
        run(plans)
        assert long.done % 8 == 0 or long.done == 100


def test_prompts_share_the_budget_and_none_starves() -> None:
    plans, rows = scheduler(), [row(100) for _ in range(4)]
    for one in rows:
        plans.add(one)
    shares = run(plans)
    assert set(shares) == set(rows)
    assert max(shares.values()) - min(shares.values()) <= 8


def test_parts_are_sorted_by_entry_and_a_row_without_hidden_states_waits() -> None:
    plans = scheduler()
    rows = [row(10, entry=2), row(10), row(10, entry=1), row(10, entry=3)]
    for one in rows:
        plans.add(one)
    feed(rows[0], 10)
    feed(rows[2], 4)
    step = plans.plan()
    assert step is not None
    assert [(part.row, part.count, part.wanted) for part in step.parts] == [
        (rows[1], 10, True), (rows[2], 4, False), (rows[0], 10, True),
    ]  # fmt: skip


def test_rows_beyond_the_slots_wait_in_order_and_take_the_first_free_slot() -> None:
    plans, rows = scheduler(slots=2), [row(4, max_tokens=n) for n in (1, 8, 8, 8)]
    for one in rows:
        plans.add(one)
    assert set(run(plans)) == set(rows[:2])
    assert rows[0].ended
    assert rows[0].slot is None
    assert set(run(plans)) == {rows[1], rows[2]}
    assert list(plans.waiting) == [rows[3]]


def test_a_dropped_row_is_gone_wherever_it_was_and_may_be_dropped_again() -> None:
    plans, rows = scheduler(slots=1), [row(4), row(4)]
    for one in rows:
        plans.add(one)
    run(plans)
    for one in (rows[1], rows[0], rows[0]):
        plans.drop(one)
    assert (plans.rows, list(plans.waiting), plans.plan()) == ([], [], None)


def test_a_paused_row_keeps_its_slot_and_does_not_run() -> None:
    plans, one = scheduler(), row(4)
    plans.add(one)
    run(plans)
    one.paused = True
    assert run(plans) == {}
    one.paused = False
    assert run(plans) == {one: 1}


def test_an_answer_ends_at_a_stop_token_or_its_limit() -> None:
    for limit, token, reason in ((8, 1, Reason.STOP), (1, 7, Reason.LENGTH), (8, 7, None)):
        assert row(4, max_tokens=limit).accept([token], frozenset({1})).finish is reason


def test_a_slot_is_handed_on_with_as_much_as_both_logs_share() -> None:
    plans, old = scheduler(slots=1), row(20)
    plans.add(old)
    run(plans)
    new = row(20)
    new.log = [*old.log[:12], 9, 9, 9]
    new.length = 15
    plans.hand_on(old, new)
    assert (new.slot, new.done, old.slot, plans.rows) == (0, 12, None, [new])


def test_a_place_in_the_line_is_handed_on() -> None:
    plans, rows = scheduler(slots=1), [row(4) for _ in range(3)]
    for one in rows:
        plans.add(one)
    run(plans)
    new = row(5)
    plans.hand_on(rows[1], new)
    assert list(plans.waiting) == [new, rows[2]]


def test_a_split_s_slot_is_handed_on_empty() -> None:
    plans, old = scheduler(slots=1), row(10, entry=2)
    plans.add(old)
    feed(old, 10)
    run(plans)
    plans.add(row(4))
    new = row(11, entry=2)
    plans.hand_on(old, new)
    assert (new.slot, new.done, plans.rows) == (0, 0, [new])


def test_many_prompts_stay_within_the_budget_and_all_get_on() -> None:
    plans, rows = scheduler(slots=12, step_tokens=32), [row(40) for _ in range(12)]
    for one in rows:
        plans.add(one)
    for _ in range(16):
        assert sum(run(plans).values()) <= 32 + 8
    assert all(one.answer_tokens for one in rows)


def test_room_is_counted_and_given_back() -> None:
    rooms = Rooms(1, 1)
    rooms.enter(0)
    rooms.enter(0)
    with pytest.raises(SessionFault, match="2 sessions running and waiting, limit 2") as refused:
        rooms.enter(3.0)
    assert (refused.value.code, refused.value.retry_after_s) == (FaultCode.BUSY, 3.0)
    rooms.draining = True
    with pytest.raises(SessionFault, match="shutting down"):
        rooms.enter(0)
    rooms.enter(0, replacing=True)
    for _ in range(3):
        rooms.leave()
    assert rooms.vacant.is_set()


def test_request_ids_belong_to_their_device_and_are_forgotten_in_time() -> None:
    now = 0.0
    table = RequestTable(clock=lambda: now)
    table.claim("a", bytes(16), 1)
    table.claim("b", bytes(16), 1)
    with pytest.raises(SessionFault, match="newest is 1"):
        table.claim("a", bytes(16), 1)
    now = REMEMBERED_S + 1
    table.claim("a", bytes(16), 1)


def test_a_running_request_is_not_forgotten() -> None:
    now = 0.0
    table = RequestTable(clock=lambda: now)
    attempt, _ = table.claim("a", bytes(16), 1)
    attempt.row = row(4)
    now = REMEMBERED_S + 1
    _, older = table.claim("a", bytes(16), 2)
    assert older is attempt.row
