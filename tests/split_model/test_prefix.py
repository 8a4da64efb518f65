"""Kept slots: found by their own owner and ids only, free for whoever needs one, zeroed when they are dropped."""

from __future__ import annotations

import pytest
import torch

from split_model.attention import Span
from split_model.cache import Cache, OutOfSlots
from split_model.model import Model
from split_model.prefix import PIECE, Prefixes, common
from split_model.states import States
from support.checkpoints import checkpoint
from support.clock import Clock

MODEL = Model.load(checkpoint(), check=False)
IDS = tuple(range(10, 40))
OTHER = tuple(range(50, 80))


def prefixes(slots: int = 3, **settings: object) -> Prefixes:
    return Prefixes(MODEL.new_cache(slots), **settings)  # type: ignore[arg-type]


def compute(cache: Cache, slot: int, ids: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """Logits behind the last of these ids, those before `start` being in the slot."""
    x = MODEL.embed(torch.tensor(ids[start:]))
    return MODEL.logits(MODEL.run(x, 0, MODEL.stop, cache, MODEL.tiles([Span(slot, start, len(x))]))[-1:])


def left(kept: Prefixes, ids: tuple[int, ...], owner: object) -> int:
    """A session of this owner has come and gone."""
    slot = kept.take(ids, owner).slot
    compute(kept.cache, slot, ids)
    kept.keep(slot, ids, owner)
    return slot


def empty(kept: Prefixes, slot: int) -> bool:
    return not kept.cache.memory[:, slot].any()


def test_a_conversation_goes_on_in_its_slot_with_the_same_bits() -> None:
    kept, longer = prefixes(), (*IDS, 7, 8, 9)
    slot = left(kept, IDS, "a")
    assert kept.free_slots == 3
    assert kept.take(longer, "a") == (slot, len(IDS), 0)
    own = MODEL.new_cache(1)
    assert torch.equal(compute(kept.cache, slot, longer, len(IDS)), compute(own, own.take(), longer))
    assert kept.free_slots == 2


@pytest.mark.parametrize("owner", ["b", None])
def test_nobody_finds_what_is_another_s(owner: str | None) -> None:
    kept = prefixes()
    left(kept, IDS, "a")
    assert kept.held(IDS, owner) == 0
    assert kept.take(IDS, owner).held == 0


def test_the_last_position_is_always_computed() -> None:
    kept = prefixes()
    left(kept, IDS, "a")
    assert kept.take(IDS, "a").held == len(IDS) - 1


def test_a_small_part_of_a_slot_is_copied_and_the_slot_stays() -> None:
    kept, other = prefixes(), (*IDS[:5], *range(100, 130))
    slot = left(kept, IDS, "a")
    found = kept.take(other, "a")
    assert found.held == 5
    assert found.slot != slot
    own = MODEL.new_cache(1)
    assert torch.equal(compute(kept.cache, found.slot, other, 5), compute(own, own.take(), other))
    assert kept.held((*IDS, 1), "a") == len(IDS)


def test_a_small_part_is_taken_over_where_there_is_no_other_slot() -> None:
    kept = prefixes(1)
    slot = left(kept, IDS, "a")
    assert kept.take((*IDS[:5], *range(100, 130)), "a") == (slot, 5, 0)


def test_the_least_recently_used_goes_when_a_slot_is_wanted() -> None:
    clock = Clock(0.0)
    kept = prefixes(2, clock=clock)
    left(kept, IDS, "a")
    clock.now = 1.0
    left(kept, IDS, "b")
    assert kept.take((1, 2, 3), "c").held == 0
    assert (kept.held(IDS, "a"), kept.held(IDS, "b")) == (0, len(IDS) - 1)
    kept.take((1, 2, 3), "c")
    with pytest.raises(OutOfSlots):
        kept.take((1, 2, 3), "c")


def test_what_is_claimed_is_nobody_else_s_until_it_is_given_back() -> None:
    kept = prefixes(1)
    left(kept, IDS, "a")
    place = kept.claim(IDS, "a")
    assert kept.free_slots == 0
    assert kept.claim(IDS, "a").held == 0
    kept.give_back(place)
    assert kept.claim(IDS, "a") == place


def test_what_is_kept_too_long_or_of_no_owner_is_zeroed() -> None:
    clock = Clock(0.0)
    kept = prefixes(clock=clock, life_s=10.0)
    slot = left(kept, IDS, "a")
    assert not empty(kept, slot)
    clock.now = 10.0
    assert kept.held(IDS, "a") == 0
    kept.expire()
    assert empty(kept, slot)
    assert kept.cache.free_slots == 3
    assert empty(kept, left(kept, IDS, None))
    slot = left(kept, IDS, "b")
    kept.forget(lambda owner: owner == "b")
    assert empty(kept, slot)


def test_nothing_is_kept_where_the_time_is_none() -> None:
    kept = prefixes(life_s=0.0)
    assert empty(kept, left(kept, IDS, "a"))
    assert kept.cache.free_slots == 3


def test_the_operator_s_prefix_is_copied_for_everybody_and_stays() -> None:
    kept = prefixes(2)
    slot = kept.take((), None).slot
    compute(kept.cache, slot, IDS)
    kept.share(slot, IDS)
    longer = (*IDS, 5)
    for owner in ("a", None):
        found = kept.take(longer, owner)
        assert found.held == len(IDS)
        assert found.slot != slot
        own = MODEL.new_cache(1)
        assert torch.equal(compute(kept.cache, found.slot, longer, len(IDS)), compute(own, own.take(), longer))
        kept.keep(found.slot, longer, owner)
    kept.forget(lambda owner: True)
    assert kept.free_slots == 1
    assert kept.held(longer, "c") == len(IDS)


def test_the_memory_beside_goes_with_its_slots() -> None:
    states = States(3, 64, 4)
    kept = prefixes(beside=states)
    slot, x = kept.take(IDS, "a").slot, torch.randn(len(IDS), 4, dtype=torch.bfloat16)
    compute(kept.cache, slot, IDS)
    states.write(slot, 0, x)
    kept.keep(slot, IDS, "a", beside=20)
    copied = kept.take((*IDS[:5], 1, 2), "a")
    assert copied.beside == copied.held == 5
    assert torch.equal(states.read(copied.slot, 0, 5), x[:5])
    found = kept.take((*IDS, 1), "a")
    assert (found.held, found.beside) == (len(IDS), 20)
    kept.free(slot)
    assert not states.read(slot, 0, 64).any()


@pytest.mark.parametrize("slot", [-1, 3])
def test_only_slots_that_there_are_can_be_copied(slot: int) -> None:
    cache = MODEL.new_cache(3)
    with pytest.raises(ValueError, match=f"slots {slot} and 0 of 3"):
        cache.copy(slot, 0, 0)


def test_no_more_is_copied_than_was_written() -> None:
    cache = MODEL.new_cache(2)
    compute(cache, cache.take(), IDS)
    with pytest.raises(ValueError, match=f"{len(IDS) + 1} positions, slot 0 holds {len(IDS)}"):
        cache.copy(0, 1, len(IDS) + 1)


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_what_two_logs_have_in_common(length: int) -> None:
    same = list(range(length))
    assert common(same, same) == length
    assert common([*same, 1], same) == length
    assert common([*same, 1, 5], [*same, 2, 5]) == length


def test_who_wants_a_copy_takes_the_slot_itself_when_the_last_other_one_goes_meanwhile() -> None:
    class Raced(Prefixes):
        def _fresh(self) -> int:
            self.claim(OTHER, "b")  # on the event loop
            return super()._fresh()

    kept = Raced(MODEL.new_cache(2))
    slots = [kept.cache.take(), kept.cache.take()]
    kept.keep(slots[0], IDS, "a")
    kept.keep(slots[1], OTHER, "b")
    compute(kept.cache, slots[0], IDS)
    assert kept.take((*IDS[:5], 1, 2), "a") == (slots[0], 5, 0)


def test_what_is_claimed_when_its_owner_is_forgotten_is_not_found_again() -> None:
    kept = prefixes()
    slot = left(kept, IDS, "a")
    place = kept.claim(IDS, "a")
    kept.forget(lambda owner: owner == "a")
    kept.give_back(place)
    assert kept.held(IDS, "a") == 0
    assert kept.free_slots == 3
    kept.expire()
    assert empty(kept, slot)
