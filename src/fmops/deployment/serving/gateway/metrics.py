"""What the gateway counts.

Enters: the traces of requests, and refusals. Leaves: Prometheus text.
Refuses: labels that a client could choose: their number would have no bound.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fmops.deployment.serving.metrics import DURATION_S, FIRST_TOKEN_S, PER_TOKEN_S
from fmops.traces import Trace


class GatewayMetrics:
    """Counters and histograms of one gateway, by the arm and the release that answered."""

    def __init__(
        self, *, in_flight: Callable[[], float], waiting: Callable[[], float], routes_version: Callable[[], float]
    ) -> None:
        registry = self._registry = CollectorRegistry()
        who = ["gen_ai_operation_name", "arm", "release"]
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds", "From arrival to the end.", [*who, "outcome"],
            registry=registry, buckets=DURATION_S,
        )  # fmt: skip
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "From arrival to the first piece of a stream.", who,
            registry=registry, buckets=FIRST_TOKEN_S,
        )  # fmt: skip
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean time between tokens after the first.", who,
            registry=registry, buckets=PER_TOKEN_S,
        )  # fmt: skip
        self._tokens = Counter(
            "fmops_tokens", "Tokens read (input) and generated (output).", ["gen_ai_token_type", "arm", "release"],
            registry=registry,
        )  # fmt: skip
        self._signals = Counter(
            "fmops_answers_with_signal", "Answers in which an output signal was seen.", ["signal", "arm", "release"],
            registry=registry,
        )  # fmt: skip
        self.requests = Counter(
            "fmops_http_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.refused = Counter(
            "fmops_requests_refused", "Requests that no engine saw, by reason.", ["reason"], registry=registry
        )
        self.lost = Counter("fmops_traces_lost", "Rows that could not be written.", registry=registry)
        self.feedback = Counter("fmops_feedback", "Thumbs and corrections.", ["kind"], registry=registry)
        Gauge("fmops_gateway_requests_in_flight", "Requests under way.", registry=registry).set_function(in_flight)
        Gauge("fmops_gateway_requests_waiting", "Of them, in line before an engine.", registry=registry).set_function(
            waiting
        )
        Gauge("fmops_routes_version", "Version of the routes in force.", registry=registry).set_function(routes_version)

    def answered(self, trace: Trace) -> None:
        """Count one finished request."""
        who = (trace.operation, trace.arm, trace.release)
        self._duration.labels(*who, trace.finish_reason or str(trace.status)).observe(trace.duration_s)
        self._tokens.labels("input", trace.arm, trace.release).inc(trace.prompt_tokens)
        self._tokens.labels("output", trace.arm, trace.release).inc(trace.completion_tokens)
        if trace.first_token_s is not None:
            self._first_token.labels(*who).observe(trace.first_token_s)
            if trace.completion_tokens > 1:
                pace = (trace.duration_s - trace.first_token_s) / (trace.completion_tokens - 1)
                self._per_token.labels(*who).observe(pace)
        for name, value in trace.signals.items():
            if value == 1:
                self._signals.labels(name, trace.arm, trace.release).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text
