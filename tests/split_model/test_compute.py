"""The compute thread: order, crossing, cancellation, failure and closing."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import torch

from split_model.compute import Compute

pytestmark = pytest.mark.anyio


async def test_jobs_run_in_order_on_one_thread_without_gradients() -> None:
    compute, seen = Compute(), []
    for number in range(50):
        compute.post(
            lambda n: seen.append((n, threading.current_thread().name, torch.is_inference_mode_enabled())), number
        )
    await compute.call(lambda: None)
    await compute.aclose()
    assert seen == [(number, "compute", True) for number in range(50)]


async def test_a_call_gives_its_result_or_its_exception() -> None:
    compute = Compute()
    assert await compute.call(divmod, 17, 5) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        await compute.call(divmod, 1, 0)
    assert compute.failure is None
    await compute.aclose()


async def test_posts_may_come_from_any_thread_and_from_the_compute_thread() -> None:
    compute, seen, done = Compute(), [], asyncio.Event()

    def again() -> None:
        seen.append("again")
        compute.to_loop(done.set)

    await asyncio.to_thread(compute.post, lambda: compute.post(again))
    await done.wait()
    await compute.aclose()
    assert seen == ["again"]


async def test_to_loop_runs_on_the_loop_in_order() -> None:
    compute, seen, done = Compute(), [], asyncio.Event()

    def job() -> None:
        for number in range(5):
            compute.to_loop(lambda n: seen.append((n, threading.current_thread() is threading.main_thread())), number)
        compute.to_loop(done.set)

    compute.post(job)
    await done.wait()
    await compute.aclose()
    assert seen == [(number, True) for number in range(5)]


async def test_a_call_cancelled_before_its_turn_does_not_run() -> None:
    compute, gate, ran = Compute(), threading.Event(), []
    compute.post(gate.wait)
    waiting = asyncio.ensure_future(compute.call(ran.append, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    assert await compute.call(lambda: "alive") == "alive"
    assert ran == []
    await compute.aclose()


async def test_a_call_cancelled_while_it_runs_ends_quietly() -> None:
    compute, started, gate, ran = Compute(), asyncio.Event(), threading.Event(), []

    def job() -> None:
        compute.to_loop(started.set)
        gate.wait()
        ran.append(1)

    waiting = asyncio.ensure_future(compute.call(job))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    assert await compute.call(lambda: list(ran)) == [1]
    await compute.aclose()


async def test_a_failed_post_is_logged_and_kept_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    compute = Compute()
    with caplog.at_level(logging.ERROR):
        compute.post(divmod, 1, 0)
        compute.post(int, "x")
        assert await compute.call(lambda: "alive") == "alive"
    assert isinstance(compute.failure, ZeroDivisionError)
    assert len(caplog.records) == 2
    await compute.aclose()


async def test_close_finishes_what_was_posted_and_takes_no_more() -> None:
    compute, seen = Compute(), []
    for number in range(20):
        compute.post(seen.append, number)
    compute.close()
    assert seen == list(range(20))
    with pytest.raises(RuntimeError, match="closed"):
        compute.post(seen.append, 0)
    with pytest.raises(RuntimeError, match="closed"):
        await compute.call(seen.append, 0)
    await compute.aclose()


async def test_close_from_the_compute_thread_does_not_wait_for_itself() -> None:
    compute = Compute()
    await compute.call(compute.close)
    await compute.aclose()


async def test_the_number_of_threads_is_set() -> None:
    compute = Compute(threads=2)
    assert await compute.call(torch.get_num_threads) == 2
    await compute.aclose()


def test_a_closed_loop_is_no_failure() -> None:
    gate = threading.Event()

    async def start() -> Compute:
        compute = Compute()
        compute.post(gate.wait)
        compute.post(lambda: compute.to_loop(print))
        return compute

    compute = asyncio.run(start())
    gate.set()
    compute.close()
    assert compute.failure is None


async def test_a_job_may_let_the_next_one_go_first() -> None:
    compute, seen = Compute(), []
    ready = threading.Event()

    def outer() -> None:
        ready.wait()
        while compute.do_next(0.0):
            pass
        seen.append("outer")

    compute.post(outer)
    for name in ("first", "second"):
        compute.post(seen.append, name)
    ready.set()
    await compute.aclose()
    assert seen == ["first", "second", "outer"]


async def test_a_job_that_waits_for_the_next_one_does_not_swallow_the_end() -> None:
    compute, found, ready = Compute(), [], threading.Event()

    def outer() -> None:
        ready.wait()
        found.append(compute.do_next(60.0))

    compute.post(outer)
    closing = asyncio.create_task(compute.aclose())
    await asyncio.sleep(0)
    ready.set()
    await closing
    assert found == [False]
