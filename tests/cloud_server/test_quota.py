"""Quotas: a minute's worth at once, then at the rate; what is refused costs nothing and names the wait."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server import quota
from cloud_server.quota import Quota, Quotas
from protocol.errors import FaultCode, SessionFault
from support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(quotas: Quotas, prompt_tokens: int = 1, device: str = "phone") -> SessionFault:
    with pytest.raises(SessionFault) as refused:
        quotas.enter(device, prompt_tokens)
    assert refused.value.code is FaultCode.QUOTA
    return refused.value


def test_requests_run_out_and_come_back_at_their_rate(clock: Clock) -> None:
    quotas = Quotas(Quota(requests=3), clock)
    for _ in range(3):
        quotas.enter("phone", 1)
    refused = refusal(quotas)
    assert "limit of 3 requests a minute" in refused.message
    assert refused.retry_after_s == pytest.approx(20)
    quotas.enter("another", 1)
    clock.now += refused.retry_after_s - 0.1
    assert refusal(quotas).retry_after_s == pytest.approx(0.1)
    clock.now += 0.1
    quotas.enter("phone", 1)
    refusal(quotas)


def test_a_prompt_larger_than_a_minute_s_worth_needs_a_full_bucket_and_leaves_a_debt(clock: Clock) -> None:
    quotas = Quotas(Quota(prompt_tokens=100), clock)
    quotas.enter("phone", 10)
    assert refusal(quotas, 300).retry_after_s == pytest.approx(6)
    clock.now += 6
    quotas.enter("phone", 300)
    assert refusal(quotas, 1).retry_after_s == pytest.approx(120.6)


def test_an_answer_may_end_in_debt_that_the_next_request_waits_for(clock: Clock) -> None:
    quotas = Quotas(Quota(output_tokens=60), clock)
    quotas.enter("phone", 1)
    quotas.spent("phone", 90)
    refused = refusal(quotas)
    assert "60 output tokens a minute" in refused.message
    assert refused.retry_after_s == pytest.approx(31)


def test_sessions_count_until_they_are_left(clock: Clock) -> None:
    quotas = Quotas(Quota(sessions=2), clock)
    quotas.enter("phone", 1)
    quotas.enter("phone", 1)
    assert "2 sessions of this device are open, limit 2" in refusal(quotas).message
    quotas.enter("phone", 1, replacing=True)
    quotas.leave("phone")
    quotas.leave("phone")
    quotas.enter("phone", 1)


def test_a_refusal_by_one_limit_charges_no_other(clock: Clock) -> None:
    quotas = Quotas(Quota(requests=2, sessions=1), clock)
    quotas.enter("phone", 1)
    for _ in range(5):
        refusal(quotas)
    quotas.leave("phone")
    quotas.enter("phone", 1)


def test_nothing_is_limited_by_default(clock: Clock) -> None:
    quotas = Quotas(quota.UNLIMITED, clock)
    for _ in range(100):
        quotas.enter("phone", 10_000)
        quotas.spent("phone", 10_000)


def test_the_table_is_bounded_and_keeps_those_with_a_session(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_DEVICES", 4)
    quotas = Quotas(Quota(requests=1), clock)
    quotas.enter("stays", 1)
    for number in range(20):
        quotas.enter(f"phone-{number}", 1)
        quotas.leave(f"phone-{number}")
        assert len(quotas) <= 4
    refusal(quotas, device="stays")
    refusal(quotas, device="phone-19")


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=40))
def test_no_device_gets_more_than_its_rate_and_one_bucket(events: list[tuple[float, int]]) -> None:
    clock = Clock()
    quotas, granted = Quotas(Quota(prompt_tokens=60), clock), 0
    for seconds, tokens in events:
        clock.now += seconds
        with contextlib.suppress(SessionFault):
            quotas.enter("phone", tokens)
            granted += tokens
    assert granted <= 60 + (clock.now - 1000) + 1e-3
