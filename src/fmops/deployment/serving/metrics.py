"""What the server counts.

Enters: events of requests. Leaves: Prometheus text.
Refuses: a global registry; two servers in one process count apart.

Names follow OpenTelemetry's conventions for generative AI servers where it has one (gen_ai.server.*), with its bucket
boundaries, then vLLM's, so that what was made for vLLM reads any engine here; the rest starts with `fmops_`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self, *, version: str, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        operation = ["gen_ai_operation_name"]
        self.first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "From admission to the first token.", operation,
            registry=registry, buckets=FIRST_TOKEN_S,
        )  # fmt: skip
        self.per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean time between tokens after the first.", operation,
            registry=registry, buckets=PER_TOKEN_S,
        )  # fmt: skip
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds", "From admission to the end.", [*operation, "outcome"],
            registry=registry, buckets=DURATION_S,
        )  # fmt: skip
        self.requests = Counter(
            "fmops_http_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._model = version
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Tokens read.", ["model_name"], registry=registry)
        self._new_tokens = Counter("vllm:generation_tokens", "Tokens generated.", ["model_name"], registry=registry)
        self._gauge("vllm:num_requests_running", "Requests that advance now.", running)
        self._gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", waiting)
        Gauge("fmops_release_info", "The release that is served.", ["version"], registry=registry).labels(version).set(
            1
        )

    def read(self, tokens: int) -> None:
        """Count a prompt."""
        self._prompt_tokens.labels(self._model).inc(tokens)

    def generated(self) -> None:
        """Count a token."""
        self._new_tokens.labels(self._model).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text

    def _gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        Gauge(name, what, ["model_name"], registry=self._registry).labels(self._model).set_function(read)
