"""OpenTelemetry spans of the gateway, as a collector gets them: OTLP over HTTP, into a real server."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import HELLO, asking, gateway

from fmops.deployment.serving.gateway import process
from fmops.deployment.serving.gateway.process import CONTENT, spans_of
from fmops.errors import FmopsError

CHAT = "/v1/chat/completions"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        bodies: list[bytes] = []

        class Take(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.bodies = bodies
        self.server = HTTPServer(("127.0.0.1", 0), Take)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def spans(self) -> list[dict]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            {
                "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(), "kind": span.kind,
                "parent": span.parent_span_id.hex(), "failed": span.status.code == 2,
                "seconds": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                "said": {one.key: plain(one.value) for one in span.attributes},
            }
            for request in requests for group in request.resource_spans for scope in group.scope_spans
            for span in scope.spans
        ]  # fmt: skip


def plain(value):
    kind = value.WhichOneof("value")
    return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@pytest.fixture
def collector(monkeypatch):
    here = Collector()
    here.thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", here.url)
    yield here
    here.server.shutdown()
    here.thread.join(20)
    here.server.server_close()


def spans(**more: str):
    return spans_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "read by the exporter itself", **more})


@pytest.mark.parametrize("stream", [False, True])
def test_a_callers_trace_goes_on_through_the_gateway_to_the_engine(tmp_path, collector, stream):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine, spans=spans()) as door:
        body = asking("my mail is anna@firm.de", stream=stream, temperature=0.5)
        door.client.post(CHAT, json=body, headers={"traceparent": CALLER, "tracestate": "firm=1"})
        [trace] = door.traces(1)
        [went] = engine.headers
    [span] = collector.spans()
    assert (span["name"], span["kind"]) == ("chat tiny", 3)
    assert (span["trace"], span["parent"]) == tuple(CALLER.split("-")[1:3])
    assert went["traceparent"] == f"00-{span['trace']}-{span['id']}-01"
    assert went["tracestate"] == "firm=1"
    said = span["said"]
    assert said["gen_ai.operation.name"] == "chat"
    assert (said["gen_ai.request.model"], said["gen_ai.response.model"]) == ("tiny", "release-old")
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"]) == (8, 0.5)
    assert said["gen_ai.response.id"] == trace.id
    assert said["gen_ai.response.finish_reasons"] == ["stop"]
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (7, 4)
    assert ("gen_ai.response.time_to_first_chunk" in said) == stream
    assert (said["fmops.tenant"], said["fmops.arm"]) == ("team-a", "champion")
    assert span["seconds"] == pytest.approx(trace.duration_s, abs=1e-3)
    assert not span["failed"]
    assert b"anna" not in b"".join(collector.bodies)
    assert b"release-old xxx" not in b"".join(collector.bodies), "no texts unless somebody asks for them"


def test_texts_are_redacted_when_they_are_asked_for(tmp_path, collector):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine, spans=spans(**{CONTENT: "true"})) as door:
        door.client.post(CHAT, json=asking("my mail is anna@firm.de"))
        door.traces(1)
    [span] = collector.spans()
    [asked], [answered] = (json.loads(span["said"][f"gen_ai.{side}.messages"]) for side in ("input", "output"))
    assert asked == {"role": "user", "parts": [{"type": "text", "content": "my mail is <email>"}]}
    assert answered["parts"] == [{"type": "text", "content": "release-old xxx"}]
    assert answered["finish_reason"] == "stop"


def test_a_failure_and_its_repetition_and_a_mirror_are_spans_of_their_own(tmp_path, collector):
    with (
        FakeEngine("old") as old,
        FakeEngine("new") as new,
        gateway(tmp_path, old, new, shadow_share=1.0, spans=spans()) as door,
    ):
        door.client.post(CHAT, json=asking("[break]"), headers={"traceparent": CALLER})
        door.traces(3)
    found = collector.spans()
    assert {span["trace"] for span in found} == {CALLER.split("-")[1]}
    assert len({span["id"] for span in found}) == len(found) == 3
    assert all(span["failed"] and span["said"]["error.type"] == "502" for span in found)
    assert sum("fmops.retry_of" in span["said"] for span in found) == 1
    assert sum("fmops.shadow_of" in span["said"] for span in found) == 1


def test_a_collector_that_is_away_costs_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine, spans=spans()) as door:
        assert door.client.post(CHAT, json=HELLO).status_code == 200
        door.traces(1)


def test_spans_are_off_unless_a_collector_is_named(monkeypatch):
    assert spans_of({}) is None
    assert spans(OTEL_SDK_DISABLED="true") is None
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(FmopsError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for spans.*pip install 'fmops\[otel\]'"):
        spans()


def test_without_spans_a_callers_context_is_not_passed_on(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        door.client.post(CHAT, json=HELLO, headers={"traceparent": CALLER})
        [went] = engine.headers
    assert "traceparent" not in went
