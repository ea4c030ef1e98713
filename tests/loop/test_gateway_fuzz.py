"""Whatever a stranger or a clumsy client sends: the gateway answers in its own words and stays up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import HELLO, gateway, until

from fmops.deployment.serving.gateway.desk import Limits

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/models", "/v1/models/tiny", "/health"]
PATHS = some.one_of(
    some.sampled_from(ROUTES),
    some.sampled_from(["/metrics", "/docs", "/openapi.json", "/admin", "/v1", "/.env", "/v1/models/../../metrics"]),
    some.text(some.characters(codec="ascii", min_codepoint=33, exclude_characters="?#\\"), max_size=20).map(
        "/{}".format
    ),
)
METHODS = some.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
JSON = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = some.sampled_from(
    ["model", "messages", "prompt", "max_tokens", "stream", "stop", "seed", "temperature", "top_p", "n", "logprobs",
     "top_logprobs", "logit_bias", "user", "response_format", "tools", "stream_options", "cache_salt", "id", "thumb"]
)  # fmt: skip
calm = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("fuzz")
    with FakeEngine("release-old") as engine, gateway(workspace, engine, limits=Limits(tokens_per_minute=10**9)) as box:
        box.engine = engine
        yield box


@calm
@given(
    method=METHODS,
    path=PATHS,
    key=some.text(some.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=80),
)
def test_without_a_key_no_route_and_no_method_gives_anything(door, method, path, key):
    before = len(door.engine.seen)
    answer = door.client.request(method, path, headers={"Authorization": f"Bearer {key}"}, json=HELLO)
    if answer.request.url.path == "/health" and method in ("GET", "HEAD"):
        assert answer.status_code == 200
    else:
        assert answer.status_code in (401, 404, 405)
        assert method == "HEAD" or set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(key) < 8 or key not in answer.text
    assert len(door.engine.seen) == before


@calm
@given(route=some.sampled_from(ROUTES[:3]), changes=some.dictionaries(FIELDS, JSON, min_size=1, max_size=4))
def test_no_field_of_a_valid_key_breaks_the_gateway(door, route, changes):
    answer = door.client.post(route, json={**HELLO, **changes})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"


@calm
@given(route=some.sampled_from(ROUTES[:3]), body=some.binary(max_size=200))
def test_no_bytes_break_the_gateway(door, route, body):
    answer = door.client.post(route, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_after_all_that_it_still_answers(door):
    assert door.client.post(ROUTES[0], json=HELLO).status_code == 200
    until(lambda: door.desk.in_flight == 0)
