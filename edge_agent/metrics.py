"""The agent's counters, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_agent.decisions import Decision

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
RATIOS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counted by the route that was planned."""

    def __init__(self, under_way: Callable[[], float], reachable: Callable[[], float]):
        self._registry = registry = CollectorRegistry()
        self._answers = Counter(
            "tandem_edge_answers", "Answers by route and how they ended", ["route", "finish"], registry=registry
        )
        self._tokens = Counter("tandem_edge_tokens", "Answer tokens", ["route"], registry=registry)
        self._bytes = Counter("tandem_edge_bytes", "Bytes, packets estimated", ["direction"], registry=registry)
        self._early = Counter("tandem_edge_early_data", "Answers whose request was early data", registry=registry)
        self._resumed = Counter("tandem_edge_attempts", "Attempts at sessions", registry=registry)
        self._moves = Counter("tandem_edge_moves", "Moves of an answer's rest to a better plan", registry=registry)
        self._queries = Counter("tandem_edge_prefix_queries", "Prompt tokens that a site might have held", ["site"],
                                registry=registry)  # fmt: skip
        self._hits = Counter("tandem_edge_prefix_hits", "Of these, held", ["site"], registry=registry)
        self._drafted = Counter(
            "tandem_edge_draft_tokens", "Drafted tokens, up to the first wrong one of each draft", registry=registry
        )
        self._accepted = Counter("tandem_edge_accepted_tokens", "Of these, accepted", registry=registry)
        self._carried = Counter(
            "tandem_edge_carried",
            "Answers that a replica had a part in, by transport",
            ["transport"],
            registry=registry,
        )
        self._rtt = Histogram(
            "tandem_edge_rtt_seconds", "Round trip to the best replica, as known at a decision", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._degraded = Counter("tandem_edge_degraded", "Answers that were marked degraded", registry=registry)
        self._first = Histogram(
            "tandem_edge_first_token_seconds", "Time to the first token", ["route"], buckets=SECONDS, registry=registry
        )
        self._error = Histogram(
            "tandem_edge_prediction_error", "First-token time: |predicted - measured| / measured", ["route"],
            buckets=RATIOS, registry=registry,
        )  # fmt: skip
        Gauge("tandem_edge_under_way", "Answers under way", registry=registry).set_function(under_way)
        Gauge("tandem_edge_cloud_reachable", "1 when a replica is thought reachable", registry=registry).set_function(
            reachable
        )

    def finished(self, decision: Decision) -> None:
        route, outcome = decision.plan.route.value, decision.outcome
        self._answers.labels(route, outcome.finish.partition(":")[0]).inc()
        self._tokens.labels(route).inc(outcome.tokens)
        self._bytes.labels("up").inc(outcome.bytes_up)
        self._bytes.labels("down").inc(outcome.bytes_down)
        self._early.inc(outcome.early_data)
        self._resumed.inc(outcome.attempts)
        self._moves.inc(outcome.moves)
        self._drafted.inc(outcome.drafted)
        self._accepted.inc(outcome.accepted)
        self._degraded.inc(outcome.degraded)
        for site, held in (("edge", outcome.held_edge), ("cloud", outcome.held_cloud)):
            if held is not None:
                self._queries.labels(site).inc(len(decision.job.prompt))
                self._hits.labels(site).inc(min(held, len(decision.job.prompt)))
        if outcome.transport:
            self._carried.labels(outcome.transport).inc()
        if decision.conditions.cloud is not None:
            self._rtt.observe(decision.conditions.cloud.rtt_s)
        if outcome.first_token_s:
            self._first.labels(route).observe(outcome.first_token_s)
            wrong = abs(decision.plan.score.first_token_s - outcome.first_token_s) / outcome.first_token_s
            self._error.labels(route).observe(wrong)

    def text(self) -> bytes:
        return generate_latest(self._registry)
