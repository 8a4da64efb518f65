"""Prometheus metrics, under vLLM's names where those exist."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counting
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from cloud_server.rows import Emitted, Row, Step
from cloud_server.worker import WorkerLoad
from protocol.request_log import RequestLine

_SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

LEFT = frozenset({"cancelled", "lost", "silent", "superseded", "draining"})  # nothing was wrong with the session


class Metrics:
    """One server's registry; counters are touched from the event loop only."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("model_name",)

        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(name, about, (*labels, *more), registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, labels, registry=self.registry, buckets=buckets).labels(model)

        self._model = model
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests").labels(model)
        self._generated = counter("vllm:generation_tokens", "Answer tokens").labels(model)
        self._success = counter("vllm:request_success", "Finished requests", "finished_reason")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens that might be held").labels(model)
        self._hits = counter("vllm:prefix_cache_hits", "Those that were held").labels(model)
        self._queue = histogram("vllm:request_queue_time_seconds", "Wait for a slot", _LONG)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _LONG)
        self._first = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _SHORT)
        self._iteration = histogram("vllm:iteration_tokens_total", "Positions in one pass of the batch", _POWERS)
        self._rounds = counter("vllm:spec_decode_num_drafts", "Drafts verified").labels(model)
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens of those drafts").labels(model)
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Those that were right").labels(model)
        per_place = "vllm:spec_decode_num_accepted_tokens_per_pos"
        self._places = counter(per_place, "Those that were right, by place in the draft", "position")
        asked = ("method", "status", "handler")
        self._http = Counter("http_requests", "HTTP requests answered", asked, registry=self.registry)
        self._step = histogram("tandem_step_seconds", "One pass of the batch", _SHORT)
        self._rows = counter("tandem_rows", "Rows in passes, by the layer they enter at", "entry")
        self._sessions = counter("tandem_sessions", "Sessions ended", "route", "outcome")
        self._channels = counter("tandem_channels", "Channels opened on the wire", "transport")
        self._early = counter("tandem_early_data", "Requests in early data, by what became of it", "result")
        self._faults = counter("tandem_faults", "Faults sent on the wire", "code")
        self._expires = Gauge("tandem_certificate_expiry_timestamp_seconds", "When the certificate expires",
                              registry=self.registry)  # fmt: skip
        self._bytes = counter("tandem_bytes", "Bytes of frames and bodies", "transport", "direction")
        self._rtt = histogram("tandem_rtt_seconds", "Round trip that a session's connection measured", _SHORT)

    def watch(self, load: Callable[[], WorkerLoad], draining: Callable[[], bool]) -> None:
        """Gauges that read the state when they are asked."""

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, ("model_name",), registry=self.registry)

        running = gauge("vllm:num_requests_running", "Rows that hold a slot").labels(self._model)
        running.set_function(lambda: load().running)
        waiting = gauge("vllm:num_requests_waiting", "Rows that wait for one").labels(self._model)
        waiting.set_function(lambda: load().waiting)
        usage = gauge("vllm:kv_cache_usage_perc", "Share of slots taken, 0 to 1").labels(self._model)
        usage.set_function(lambda: load().running / load().slots)
        gauge("tandem_tasks", "Tasks of the event loop").labels(self._model).set_function(
            lambda: len(asyncio.all_tasks())
        )
        gauge("tandem_draining", "1 when no new session is taken").labels(self._model).set_function(draining)

    def step(self, step: Step, seconds: float) -> None:
        self._step.observe(seconds)
        self._iteration.observe(step.tokens)
        for entry, rows in Counting(part.row.entry for part in step.parts).items():
            self._rows.labels(self._model, str(entry)).inc(rows)

    def round(self, emitted: Emitted) -> None:
        """What became of a draft, if there was one."""
        if not emitted.drafted:
            return
        self._rounds.inc()
        self._drafted.inc(emitted.drafted)
        self._accepted.inc(emitted.accepted)
        for place in range(emitted.accepted):
            self._places.labels(self._model, str(place)).inc()

    def first_token(self, row: Row) -> None:
        self._first.observe(time.monotonic() - row.arrived)

    def ended(self, row: Row, route: str, outcome: str) -> None:
        self._sessions.labels(self._model, route, outcome).inc()
        self._generated.inc(row.length - row.first)
        if row.started is not None and not row.entry:
            self._queries.inc(row.first)
            self._hits.inc(row.reused)
        reason = "length" if row.answer_tokens >= row.max_tokens else "stop"
        if outcome != "done":
            reason = "abort" if outcome in LEFT else "error"
        self._success.labels(self._model, reason).inc()
        if outcome == "done":
            self._prompt.inc(row.prompt_length)
            self._queue.observe(row.queue_s)
            self._whole.observe(time.monotonic() - row.arrived)

    def channel(self, transport: str) -> None:
        self._channels.labels(self._model, transport).inc()

    def early(self, result: str) -> None:
        self._early.labels(self._model, result).inc()

    def fault(self, code: str) -> None:
        self._faults.labels(self._model, code).inc()

    def certificate(self, expires: float) -> None:
        self._expires.set(expires)

    def rtt(self, seconds: float | None) -> None:
        if seconds is not None:
            self._rtt.observe(seconds)

    def request(self, line: RequestLine) -> None:
        """A request that has ended, on the wire or over HTTP."""
        transport = line.transport or "http"
        self._bytes.labels(self._model, transport, "in").inc(line.bytes_in)
        self._bytes.labels(self._model, transport, "out").inc(line.bytes_out)
        if line.status is not None:
            self._http.labels(line.method or "", f"{line.status // 100}xx", line.endpoint or "none").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
