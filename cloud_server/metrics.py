"""Prometheus metrics, under vLLM's names where those exist."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cloud_server.rows import Row, Step
from cloud_server.worker import WorkerLoad

_SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """One server's registry; counters are touched from the event loop only."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        labels = ("model_name",)

        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(name, about, (*labels, *more), registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, labels, registry=self.registry, buckets=buckets).labels(model)

        self._model = model
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests").labels(model)
        self._generated = counter("vllm:generation_tokens", "Answer tokens").labels(model)
        self._success = counter("vllm:request_success", "Finished requests", "finished_reason")
        self._queue = histogram("vllm:request_queue_time_seconds", "Wait for a slot", _LONG)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _LONG)
        self._first = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _SHORT)
        self._step = histogram("tandem_step_seconds", "One pass of the batch", _SHORT)
        self._rows = histogram("tandem_step_tokens", "Positions in one pass", (1, 2, 4, 8, 16, 32, 64, 128, 256))
        self._sessions = counter("tandem_sessions", "Sessions ended", "route", "outcome")
        self._channels = counter("tandem_channels", "Channels opened on the wire", "transport")
        self._early = counter("tandem_early_data", "Requests that came as early data", "result")
        self._faults = counter("tandem_faults", "Faults sent", "code")

    def watch(self, load: Callable[[], WorkerLoad]) -> None:
        """Gauges that read the worker's state when they are asked."""

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, ("model_name",), registry=self.registry)

        running = gauge("vllm:num_requests_running", "Rows that hold a slot").labels(self._model)
        running.set_function(lambda: load().running)
        waiting = gauge("vllm:num_requests_waiting", "Rows that wait for one").labels(self._model)
        waiting.set_function(lambda: load().waiting)
        usage = gauge("vllm:kv_cache_usage_perc", "Share of slots taken, 0 to 1").labels(self._model)
        usage.set_function(lambda: load().running / load().slots)

    def step(self, step: Step, seconds: float) -> None:
        self._step.observe(seconds)
        self._rows.observe(step.tokens)

    def first_token(self, row: Row) -> None:
        self._first.observe(time.monotonic() - row.arrived)

    def ended(self, row: Row, route: str, outcome: str) -> None:
        self._sessions.labels(self._model, route, outcome).inc()
        self._generated.inc(row.length - row.first)
        if outcome == "done":
            self._prompt.inc(row.prompt_length)
            reason = "length" if row.answer_tokens >= row.max_tokens else "stop"
            self._success.labels(self._model, reason).inc()
            self._queue.observe(row.queue_s)
            self._whole.observe(time.monotonic() - row.arrived)

    def channel(self, transport: str) -> None:
        self._channels.labels(self._model, transport).inc()

    def early(self, result: str) -> None:
        self._early.labels(self._model, result).inc()

    def fault(self, code: str) -> None:
        self._faults.labels(self._model, code).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
