"""OpenTelemetry: a span for each exchange with an engine, under the names of its conventions for generative AI.

Enters: the caller's trace context, and the trace of the exchange when it has ended. Leaves: spans, by OTLP over HTTP.
Refuses: texts, unless asked for; they are redacted then, as on disk. Endpoint, headers, sampler and the rest come from
OpenTelemetry's own environment variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, …).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fmops.traces import Trace

FLUSH_MS = 3_000
"""How long the end of a process waits for a collector."""


class OpenSpan:
    """An exchange under way; `headers` carry the trace context to its engine."""

    def __init__(self, span: Span, *, content: bool) -> None:
        self._span, self._content = span, content
        self.headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(self.headers, set_span_in_context(span))

    def end(self, trace: Trace) -> None:
        """Say what is known of it."""
        if not self._span.is_recording():
            return
        self._span.set_attributes(attributes(trace, content=self._content))
        if trace.error or trace.status >= 400:
            # The engine's words may quote the prompt; they stay in the trace on disk.
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(end_time=round((trace.started_s + trace.duration_s) * 1e9))


class Spans:
    """Spans of one gateway, sent from a thread of their own: a collector that is away costs spans, not answers."""

    def __init__(self, *, content: bool = False) -> None:
        provider = self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "fmops-gateway"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = provider.get_tracer("fmops")
        self._content = content

    def start(
        self, caller: Mapping[str, str], *, operation: str, started_s: float, asked: Mapping[str, Any]
    ) -> OpenSpan:
        """Begin a span.

        Args:
            caller: the request's headers; `traceparent` and `tracestate` are read (W3C Trace Context).
            asked: checked fields of the request; those that have a name in the conventions are kept.
        """
        known: dict[str, Any] = {
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "fmops", "gen_ai.request.model": asked["model"],
        }  # fmt: skip
        for field in ("max_tokens", "temperature", "top_p", "seed", "stream"):
            if (value := asked.get(field)) is not None:
                known[f"gen_ai.request.{field}"] = value
        span = self._tracer.start_span(
            f"{operation} {asked['model']}", kind=SpanKind.CLIENT, attributes=known, start_time=round(started_s * 1e9),
            context=TraceContextTextMapPropagator().extract(caller),
        )  # fmt: skip
        return OpenSpan(span, content=self._content)

    def close(self) -> None:
        """Send what is left; blocks for `FLUSH_MS` at most."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def attributes(trace: Trace, *, content: bool) -> dict[str, Any]:
    """A finished exchange under the conventions' names; what they have no name for starts with `fmops.`."""
    found: dict[str, Any] = {
        "gen_ai.response.id": trace.id, "gen_ai.response.model": trace.release,
        "gen_ai.usage.input_tokens": trace.prompt_tokens, "gen_ai.usage.output_tokens": trace.completion_tokens,
        "fmops.tenant": trace.tenant, "fmops.arm": trace.arm, "http.response.status_code": trace.status,
    }  # fmt: skip
    if trace.finish_reason:
        found["gen_ai.response.finish_reasons"] = [trace.finish_reason]
    if trace.first_token_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = trace.first_token_s
    if trace.error or trace.status >= 400:
        found["error.type"] = str(trace.status) if trace.status >= 400 else "stream_failed"
    if linked := trace.retry_of or trace.shadow_of:
        found["fmops.retry_of" if trace.retry_of else "fmops.shadow_of"] = linked
    if content:
        found["gen_ai.input.messages"] = _message("user", trace.prompt)
        found["gen_ai.output.messages"] = _message("assistant", trace.response, finish=trace.finish_reason)
    return found


def _message(role: str, text: str, *, finish: str | None = None) -> str:
    """One message as the conventions' JSON schema has it."""
    said: dict[str, Any] = {"role": role, "parts": [{"type": "text", "content": text}]}
    return json.dumps([said | ({"finish_reason": finish} if finish else {})], ensure_ascii=False)
