"""The gateway as its users meet it: over a socket, before engines that answer at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import HELLO, asking, gateway, until

from fmops.deployment.rollout.evidence import signals_of
from fmops.deployment.serving.gateway import upstream
from fmops.deployment.serving.gateway.desk import Limits
from fmops.deployment.serving.routes import Routes, Target

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def champion():
    with FakeEngine("release-old") as engine:
        yield engine


@pytest.fixture(scope="module")
def challenger():
    with FakeEngine("release-new") as engine:
        yield engine


@pytest.fixture
def door(tmp_path, champion):
    with gateway(tmp_path, champion) as box:
        yield box


def test_openais_client_works_unchanged_and_learns_which_release_answered(door):
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=door.secret, max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(**HELLO)
        assert raw.headers["x-fmops-release"] == "release-old"
        assert raw.parse().choices[0].message.content == "release-old xxx"
        chunks = list(client.chat.completions.create(**HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "release-old xxx"
        text = client.completions.create(model="tiny", prompt="hello")
        assert text.choices[0].text == "release-old xxx"
        assert client.models.list().data[0].id == client.models.retrieve("tiny").id == "tiny"


def test_token_counts_of_a_stream_are_shown_to_who_asked_only(door):
    plain = door.client.post(CHAT, json={**HELLO, "stream": True}).text
    asked = door.client.post(CHAT, json={**HELLO, "stream": True, "stream_options": {"include_usage": True}}).text
    assert "usage" not in plain
    assert '"completion_tokens":4' in asked
    assert plain.endswith("data: [DONE]\n\n")
    assert asked.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_leaves_a_trace(door, stream):
    answer = door.client.post(CHAT, json={**HELLO, "stream": stream, "user": "anna@firm.de"})
    [trace] = door.traces(1)
    assert trace.id in answer.text
    assert (trace.tenant, trace.arm, trace.release, trace.status) == ("team-a", "champion", "release-old", 200)
    assert (trace.prompt, trace.response, trace.finish_reason) == ("hello", "release-old xxx", "stop")
    assert (trace.prompt_tokens, trace.completion_tokens, trace.mean_log_probability) == (7, 4, -0.5)
    assert (trace.signals["empty"], trace.signals["truncated"]) == (0, 0)
    assert (0 < trace.first_token_s <= trace.duration_s) if stream else trace.first_token_s is None
    assert trace.user
    assert "anna" not in trace.user


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 3}),
        ("/v1/completions", {"model": HELLO["model"], "prompt": "hello", "logprobs": 2}),
    ],
)
def test_log_probabilities_are_asked_of_the_engine(door, champion, route, body):
    assert door.client.post(route, json=body).status_code == 200
    asked = {name: value for name, value in body.items() if "logprobs" in name}
    assert asked.items() <= champion.seen[-1].items()


@pytest.mark.parametrize(("words", "invalid"), [(['{"a":', " 1}"], 0), (["Sure:", ' {"a": 1}'], 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_json_that_was_asked_for_is_judged(door, champion, words, invalid, stream, monkeypatch):
    monkeypatch.setattr(champion, "words", words)
    body = asking("Answer with a JSON object.") | {"stream": stream}
    assert door.client.post(CHAT, json=body).status_code == 200
    [trace] = door.traces(1)
    assert trace.signals["invalid_json"] == invalid


SECRETS = (
    "mail anna@firm.de, card 4111 1111 1111 1111, AKIAIOSFODNN7EXAMPLE, eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh12"
)


def test_nothing_personal_and_no_key_reaches_the_disk(door, tmp_path):
    answer = door.client.post(CHAT, json=asking(f"{SECRETS}, my key {door.secret}")).json()
    door.traces(1)
    remark = {"id": answer["id"], "thumb": "down", "comment": SECRETS, "correction": SECRETS, "user": "anna@firm.de"}
    assert door.client.post("/v1/feedback", json=remark).status_code == 200
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode()
    found = [word for word in ("anna@firm", "4111", "AKIAIOSF", "eyJhbG", door.secret[-43:]) if word in written]
    assert not found
    assert "<email>" in written
    modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.rglob("*.jsonl")}
    assert modes
    assert set(modes.values()) == {0}, "traces are for their owner only"


def test_a_secret_across_the_cut_is_not_kept_by_half(door):
    door.client.post(CHAT, json=asking("x" * 3_985 + " anna.lang@firm-with-a-long-name.de"))
    [trace] = door.traces(1)
    assert "anna" not in trace.prompt


UNKNOWN = [
    "/metrics",
    "/docs",
    "/openapi.json",
    "/admin",
    "/v1/embeddings",
    "/",
    "/v1/chat/completions/../x",
    "/v1/files",
]


@pytest.mark.parametrize("path", UNKNOWN)
def test_what_is_not_on_the_list_does_not_exist(door, path):
    assert door.client.get(path).status_code == 404
    assert httpx.get(f"{door.url}{path}").status_code == 404


def test_metrics_are_read_on_a_port_of_their_own(door):
    door.client.post(CHAT, json=HELLO)
    door.traces(1)
    text = httpx.get(f"{door.admin}/metrics").text
    assert (
        'gen_ai_server_request_duration_seconds_count{arm="champion",gen_ai_operation_name="chat",outcome="stop",'
        'release="release-old"} 1.0' in text
    )
    assert 'fmops_tokens_total{arm="champion",gen_ai_token_type="output",release="release-old"} 4.0' in text
    assert httpx.get(f"{door.admin}/v1/models").status_code == 404


def bad_keys(door):
    return {
        "none": None,
        "empty": "",
        "no scheme": door.secret,
        "basic": f"Basic {door.secret}",
        "unknown": "Bearer sk-fmops-0123456789ab-" + "x" * 43,
        "half": f"Bearer {door.secret[:-1]}",
        "longer": f"Bearer {door.secret}x",
        "none at all": "Bearer none",
        "only the id": f"Bearer {door.secret[:22]}" + "A" * 43,
    }


@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/v1/feedback", "/v1/models", "/v1/models/tiny"])
def test_without_a_valid_key_nothing_is_answered(door, route, champion):
    before = len(champion.seen)
    method = "GET" if "models" in route else "POST"
    answers = {}
    for name, header in bad_keys(door).items():
        headers = {} if header is None else {"Authorization": header}
        answer = httpx.request(method, f"{door.url}{route}", headers=headers, json=None if method == "GET" else HELLO)
        assert (name, answer.status_code, answer.json()["error"]["code"]) == (name, 401, "invalid_api_key")
        answers[name] = answer.text
    assert len(set(answers.values())) == 1, "the answer must not tell a wrong key from a missing one"
    assert httpx.post(f"{door.url}{CHAT}?api_key={door.secret}", json=HELLO).status_code == 401
    assert len(champion.seen) == before


def test_a_revoked_and_an_expired_key_stop_working_at_once(door):
    key, secret = door.keys.add("team-b")
    headers = {"Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{door.url}/v1/models", headers=headers).status_code == 200
    door.keys.revoke(key.id)
    assert httpx.get(f"{door.url}/v1/models", headers=headers).status_code == 401
    _, old = door.keys.add("team-b", days=-1)
    assert httpx.get(f"{door.url}/v1/models", headers={"Authorization": f"Bearer {old}"}).status_code == 401


@pytest.mark.parametrize(
    ("change", "status", "code"),
    {
        "n": ({"n": 1000}, 400, "unsupported_parameter"),
        "logit bias": ({"logit_bias": {str(i): 100 for i in range(10_000)}}, 400, "unsupported_parameter"),
        "a grammar": ({"guided_grammar": "root ::= " + "(" * 9999}, 400, "unknown_parameter"),
        "a regular expression": ({"guided_regex": "(a+)+$"}, 400, "unknown_parameter"),
        "huge max_tokens": ({"max_tokens": 10**9}, 400, "context_length_exceeded"),
        "another model": ({"model": "gpt-4"}, 404, "model_not_found"),
        "no messages": ({"messages": []}, 400, "invalid_value"),
        "a long integer": ({"seed": 10**400}, 400, "invalid_value"),
        "somebody's cache": ({"cache_salt": ""}, 400, "invalid_value"),
    }.values(),
)
def test_what_would_cost_too_much_is_refused_before_an_engine_sees_it(door, champion, change, status, code):
    before = len(champion.seen)
    answer = door.client.post(CHAT, json={**HELLO, **change})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert len(champion.seen) == before


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 50_000, b"{", b"NaN", b"\xff", b"1" * 5000], ids=lambda body: repr(body[:4])
)
def test_a_body_that_is_a_bomb_is_a_400(door, body):
    answer = door.client.post(CHAT, content=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_beyond_four_megabytes_is_refused_while_it_is_read(door):
    assert door.client.post(CHAT, content=b"x" * (5 * 2**20)).json()["error"]["code"] == "body_too_large"


def test_an_endless_head_is_cut_off(door):
    with socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2])), timeout=20) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50 * 2**20:
                line.sendall(b"x-more: " + b"y" * 2**16 + b"\r\n")
                sent += 2**16
            assert line.recv(4096).startswith(b"HTTP/1.1 400")
        assert sent < 50 * 2**20
    assert door.client.get("/health").status_code == 200


def test_a_tenants_tokens_run_out_and_say_when_they_are_back(tmp_path, champion):
    with gateway(tmp_path, champion, limits=Limits(tokens_per_minute=100)) as door:
        answers = [door.client.post(CHAT, json={**HELLO, "max_tokens": 80}) for _ in range(9)]
        assert answers[0].status_code == 200
        # Each cost 7 + 4 tokens in the end, and 82 had to be there at the start.
        assert [answer.status_code for answer in answers[:3]] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
        assert "82" in answers[2].json()["error"]["message"]
        _, other = door.keys.add("team-b")
        assert door.client.post(CHAT, json=HELLO, headers={"Authorization": f"Bearer {other}"}).status_code == 200
        _, rich = door.keys.add("team-c", tokens_per_minute=10_000)
        more = {**HELLO, "max_tokens": 800}
        assert door.client.post(CHAT, json=more, headers={"Authorization": f"Bearer {rich}"}).status_code == 200
        never = door.client.post(CHAT, json=more)
        assert (never.status_code, never.json()["error"]["code"]) == (400, "budget_too_small")


def test_ten_thousand_keys_cost_a_request_nothing(tmp_path):
    from time import process_time

    from fmops.deployment.serving.gateway.keys import KeyRing

    def cost(ring, secret):
        ring.check(f"Bearer {secret}")
        start = process_time()
        for _ in range(2_000):
            ring.check(f"Bearer {secret}")
        return process_time() - start

    few, many = KeyRing(tmp_path / "few.json"), KeyRing(tmp_path / "many.json")
    key, secret = few.add("a")
    others = [key.model_copy(update={"id": f"{i:012x}"}).model_dump() for i in range(10_000)]
    (tmp_path / "many.json").write_text(json.dumps([key.model_dump(), *others]))
    assert cost(many, secret) < 5 * cost(few, secret)


def test_one_tenant_cannot_take_every_place(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine, limits=Limits(in_flight_of_tenant=2)) as door:
        streams = [
            door.client.send(door.client.build_request("POST", CHAT, json=asking("[wait]", stream=True)), stream=True)
            for _ in range(2)
        ]
        refused = door.client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        _, other = door.keys.add("team-b")
        assert door.client.post(CHAT, json=HELLO, headers={"Authorization": f"Bearer {other}"}).status_code == 200
        engine.release_all()
        assert all("[DONE]" in stream.read().decode() for stream in streams)
        until(lambda: door.desk.in_flight == 0)


def test_a_tenant_sees_nothing_of_anothers(door):
    answer = door.client.post(CHAT, json=HELLO).json()
    door.traces(1)
    _, other = door.keys.add("team-b")
    remark = {"id": answer["id"], "thumb": "up"}
    stranger = door.client.post("/v1/feedback", json=remark, headers={"Authorization": f"Bearer {other}"})
    nobody = door.client.post("/v1/feedback", json={**remark, "id": "chatcmpl-nothing"})
    assert (stranger.status_code, nobody.status_code) == (404, 404)
    assert stranger.text.replace(answer["id"], "") == nobody.text.replace("chatcmpl-nothing", "")
    assert door.client.post("/v1/feedback", json=remark).json()["accepted"]


def test_feedback_is_kept_after_a_restart_of_the_gateway(tmp_path, champion):
    with gateway(tmp_path, champion) as door:
        answer = door.client.post(CHAT, json=HELLO).json()
        door.traces(1)
        secret = door.secret
    (tmp_path / "routes.json").unlink()
    with gateway(tmp_path, champion) as door:
        remark = {"id": answer["id"], "thumb": "down", "correction": "Better."}
        response = door.client.post("/v1/feedback", json=remark, headers={"Authorization": f"Bearer {secret}"})
        assert response.status_code == 200
        [row] = door.desk.feedback.read()[0]
    assert (row.thumb, row.correction, row.tenant) == ("down", "Better.", "team-a")


def test_caches_of_engines_are_apart_by_tenant_and_fields_about_the_caller_stay_here(door, champion):
    start = len(champion.seen)
    _, other = door.keys.add("team-b")
    for secret in (door.secret, door.secret, other):
        headers = {"Authorization": f"Bearer {secret}"}
        door.client.post(CHAT, json={**HELLO, "user": "anna", "cache_salt": "mine"}, headers=headers)
    first, second, third = (body["cache_salt"] for body in champion.seen[start:])
    assert first == second != third
    assert "mine" not in (first, third)
    assert all("user" not in body for body in champion.seen[start:])
    assert all(headers["authorization"] == "bearer engine-secret" for headers in champion.headers[start:])


def test_chance_sends_a_share_to_the_canary_and_each_answer_says_so(tmp_path, champion, challenger):
    with gateway(tmp_path, champion, challenger, canary_share=0.5) as door:
        answers = [door.client.post(CHAT, json={**HELLO, "stream": number % 2 == 0}) for number in range(60)]
        traces = {trace.id: trace for trace in door.traces(60)}
    arms = [trace.arm for trace in traces.values()]
    assert 10 <= arms.count("canary") <= 50
    for answer in answers:
        release = answer.headers["x-fmops-release"]
        other = {"release-old": "release-new", "release-new": "release-old"}[release]
        assert release in answer.text
        assert other not in answer.text
        [trace] = [trace for id, trace in traces.items() if f'"{id}"' in answer.text]
        assert (trace.release, trace.arm) == (release, "canary" if release == "release-new" else "champion")


def test_a_mirrored_request_is_answered_by_the_champion_and_waits_for_nobody(tmp_path, champion):
    with FakeEngine("release-new") as slow, gateway(tmp_path, champion, slow, shadow_share=1.0) as door:
        answer = door.client.post(CHAT, json=HELLO)
        assert answer.headers["x-fmops-release"] == "release-old"
        until(lambda: slow.seen)
        seen, mirrored = sorted(door.traces(2), key=lambda trace: trace.arm)
        assert (seen.arm, mirrored.arm, mirrored.release) == ("champion", "shadow", "release-new")
        assert mirrored.shadow_of == seen.id
        assert mirrored.response == "release-new xxx"
        # Its own answer is nobody's: there is no feedback on it.
        assert door.client.post("/v1/feedback", json={"id": mirrored.id, "thumb": "up"}).status_code == 404


def test_a_challenger_that_hangs_delays_no_client(tmp_path):
    with (
        FakeEngine("release-old") as old,
        FakeEngine("release-new") as new,
        gateway(tmp_path, old, new, shadow_share=1.0, limits=Limits(shadows=3)) as door,
    ):
        old.release_all()
        answers = [door.client.post(CHAT, json=asking("[wait]")) for _ in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        until(lambda: len(new.seen) == 3)
        assert len(door.desk.mirrors) == 3
        new.release_all()
        door.traces(9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engines_work(tmp_path, stream):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        asked = door.client.build_request("POST", CHAT, json=asking("[wait]", stream=stream), timeout=0.5)
        if stream:
            answer = door.client.send(asked, stream=True)
            assert engine.waiting.acquire(timeout=20)
            answer.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                door.client.send(asked)
        until(lambda: engine.left == 1)
        [trace] = door.traces(1)
        assert (trace.status, trace.finish_reason) == (499, "cancelled")
        until(lambda: door.desk.in_flight == 0)


@pytest.mark.parametrize(("mark", "words"), [("[break]", "broke off"), ("[cut]", "ended its answer early")])
def test_a_broken_stream_ends_with_an_error_event(door, mark, words):
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=door.secret, max_retries=0) as client:
        stream = client.chat.completions.create(**asking(mark, stream=True))
        with pytest.raises(openai.APIError, match=words):
            list(stream)
    [trace] = door.traces(1)
    assert (trace.finish_reason, trace.status) == ("error", 200)
    assert words in trace.error
    assert trace.response.startswith("release-old ")


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_falls_silent_is_given_up(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(upstream, "QUIET_S", 0.3)
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        answer = door.client.post(CHAT, json=asking("[wait]", stream=stream))
        assert "the engine was silent for too long" in answer.text
        assert answer.status_code == (200 if stream else 502)
        traces = door.traces(1 if stream else 2)
        # It is told to stop.
        until(lambda: engine.left == len(traces))
    assert {trace.error for trace in traces} == {"the engine was silent for too long"}


def test_a_client_that_reads_slowly_is_no_silent_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "QUIET_S", 0.3)
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        engine.words = ["x" * 20_000] * 1000
        with door.client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            pieces = answer.iter_raw()
            text = next(pieces)
            threading.Event().wait(1.0)
            text += b"".join(pieces)
        assert text.endswith(b"data: [DONE]\n\n")
        assert text.count(b"x" * 20_000) == 1000
        [trace] = door.traces(1)
        assert (trace.status, trace.error, trace.completion_tokens) == (200, None, 1000)


def test_a_canary_that_breaks_is_replaced_by_the_champion_once(tmp_path, champion):
    dead = FakeEngine("release-new")
    dead._socket.close()
    with gateway(tmp_path, champion, dead, canary_share=1.0) as door:
        for stream in (False, True):
            answer = door.client.post(CHAT, json={**HELLO, "stream": stream})
            assert (answer.status_code, answer.headers["x-fmops-release"]) == (200, "release-old")
        traces = door.traces(4)
    failed, served = traces[0], traces[1]
    assert (failed.arm, failed.status, failed.release) == ("canary", 503, "release-new")
    assert (served.arm, served.status, served.retry_of) == ("champion", 200, failed.id)
    assert "127.0.0.1" not in failed.error


def test_a_whole_answer_that_broke_is_asked_for_once_more_a_stream_is_not(door, champion):
    before = len(champion.seen)
    answer = door.client.post(CHAT, json=asking("[break]"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
    assert len(champion.seen) == before + 2
    door.client.post(CHAT, json=asking("[break]", stream=True))
    assert len(champion.seen) == before + 3


def test_a_full_engine_says_when_to_come_back(door):
    for mark, status in (("[429]", 429), ("[503]", 503)):
        answer = door.client.post(CHAT, json=asking(mark))
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "3")
        assert answer.json()["error"]["message"] == f"scripted {status}"


def test_a_full_engine_is_waited_for_within_bounds(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        engine.slots = 1
        assert door.client.post(CHAT, json=HELLO).status_code == 200
        with ThreadPoolExecutor(6) as clients:
            asked = [
                clients.submit(door.client.post, CHAT, json=asking("[wait]", stream=number % 2 == 0))
                for number in range(6)
            ]
            until(lambda: door.desk.engines.waiting == 4)
            assert "fmops_gateway_requests_waiting 4.0" in httpx.get(f"{door.admin}/metrics").text
            engine.release_all()
            assert [answer.result().status_code for answer in asked] == [200] * 6
        assert engine.most_inside == 2
        assert {trace.status for trace in door.traces(7)} == {200}


def test_an_engine_that_stays_full_is_waited_for_no_longer_than_allowed(tmp_path):
    with (
        FakeEngine("release-old") as engine,
        gateway(tmp_path, engine, limits=Limits(wait_s=0.2)) as door,
        ThreadPoolExecutor(2) as clients,
    ):
        engine.slots = 1
        assert door.client.post(CHAT, json=HELLO).status_code == 200
        inside = [clients.submit(door.client.post, CHAT, json=asking("[wait]")) for _ in range(2)]
        until(lambda: engine.inside == 2)
        refused = door.client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        assert 'fmops_requests_refused_total{reason="overloaded"} 1.0' in httpx.get(f"{door.admin}/metrics").text
        engine.release_all()
        assert [answer.result().status_code for answer in inside] == [200, 200]
        # Nothing of it is the engine's fault: no failure, no evidence of harm, and the line is empty again.
        [turned_away] = [trace for trace in door.traces(4) if trace.status == 429]
        assert (turned_away.finish_reason, signals_of(turned_away)) == (None, {})
        assert door.desk.engines.waiting == 0
        assert door.client.post(CHAT, json=HELLO).status_code == 200


def test_a_burst_at_an_engine_nobody_knows_yet_is_answered_whole(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door, ThreadPoolExecutor(12) as clients:
        engine.slots = 1
        asked = [clients.submit(door.client.post, CHAT, json=asking("[wait]")) for _ in range(12)]
        # Five are inside, the others were told that it is full.
        until(lambda: engine.inside == 5 and door.desk.engines.waiting == 7)
        engine.release_all()
        assert [answer.result().status_code for answer in asked] == [200] * 12


def test_a_mirror_takes_what_is_free_and_never_stands_in_line(tmp_path):
    with (
        FakeEngine("release-old") as old,
        FakeEngine("release-new") as new,
        gateway(tmp_path, old, new, shadow_share=1.0) as door,
    ):
        old.release_all()
        new.slots = 1
        assert door.client.post(CHAT, json=HELLO).status_code == 200
        door.traces(2)
        for _ in range(4):
            assert door.client.post(CHAT, json=asking("[wait]")).status_code == 200
        # Five answers, the first mirror, and two that found no place; two more are under way.
        mirrored = [trace for trace in door.traces(8) if trace.arm == "shadow"]
        assert [trace.status for trace in mirrored] == [200, 429, 429]
        new.release_all()
        door.traces(10)


def test_an_engine_that_is_another_release_answers_nobody(door):
    answer = door.client.post(CHAT, json=asking("[imposter]"))
    assert answer.status_code == 502
    assert "answers as somebody-else" in answer.json()["error"]["message"]


def test_the_circuit_opens_and_closes_again(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        now = [0.0]
        door.desk.engines._clock = lambda: now[0]
        for _ in range(3):
            assert door.client.post(CHAT, json=asking("[500]", stream=True)).status_code == 502
        before = len(engine.seen)
        refused = door.client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "left alone" in refused.json()["error"]["message"]
        assert door.client.get("/health").json() == {"status": "engine failing"}
        assert len(engine.seen) == before
        now[0] = 1.1
        assert door.client.post(CHAT, json=HELLO).status_code == 200
        assert door.client.get("/health").json() == {"status": "ok"}


def test_an_answer_that_takes_too_long_is_cut_and_says_so(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine, limits=Limits(request_s=0.5)) as door:
        whole = door.client.post(CHAT, json=asking("[wait]"))
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "cut")
        stream = door.client.post(CHAT, json=asking("[wait]", stream=True)).text
        assert "the time limit was over" in stream
        assert "[DONE]" not in stream


def test_while_draining_the_old_finish_and_the_new_are_turned_away(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        asked = door.client.build_request("POST", CHAT, json=asking("[wait]", stream=True))
        stream = door.client.send(asked, stream=True)
        draining = asyncio.run_coroutine_threadsafe(door.desk.drain(grace_s=20), door.loop)
        until(lambda: door.desk.draining)
        assert door.client.get("/health").status_code == 503
        refused = door.client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        engine.release_all()
        assert stream.read().decode().endswith("data: [DONE]\n\n")
        draining.result(timeout=20)


def test_an_answer_that_outlasts_the_grace_ends_with_an_error(tmp_path):
    with FakeEngine("release-old") as engine, gateway(tmp_path, engine) as door:
        asked = door.client.build_request("POST", CHAT, json=asking("[wait]", stream=True))
        stream = door.client.send(asked, stream=True)
        assert engine.waiting.acquire(timeout=20)
        asyncio.run_coroutine_threadsafe(door.desk.drain(grace_s=0), door.loop).result(timeout=20)
        text = stream.read().decode()
    assert "the server shut down" in text
    assert "[DONE]" not in text


def test_before_the_first_release_the_gateway_is_up_and_says_so(tmp_path):
    with gateway(tmp_path) as door:
        assert door.client.get("/health").json() == {"status": "no champion"}
        answer = door.client.post(CHAT, json=HELLO)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "nothing is released yet")


def test_a_change_of_routes_holds_from_the_next_request_on(tmp_path, champion, challenger):
    with gateway(tmp_path, champion) as door:
        assert door.client.post(CHAT, json=HELLO).headers["x-fmops-release"] == "release-old"
        new = Target(release=challenger.release, url=challenger.url)
        door.routes.compare_and_swap(Routes(champion=new), expected=1)
        assert door.client.post(CHAT, json=HELLO).headers["x-fmops-release"] == "release-new"


def test_a_disk_that_fails_costs_the_trace_not_the_answer(door, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmops.traces.os.write", full)
    assert door.client.post(CHAT, json=HELLO).status_code == 200
    until(lambda: "fmops_traces_lost_total 1.0" in httpx.get(f"{door.admin}/metrics").text)


def test_trailers_without_an_end_are_cut_off_too(door):
    with socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2])), timeout=20) as line:
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
        )
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50 * 2**20:
                line.sendall(b"x-more: " + b"y" * 2**16 + b"\r\n")
                sent += 2**16
        assert sent < 50 * 2**20
    assert door.client.get("/health").status_code == 200


def test_a_long_prompt_is_no_long_head(door, champion):
    before = len(champion.seen)
    assert door.client.post(CHAT, json=asking("word " * 40_000, max_tokens=8)).status_code == 200
    assert len(champion.seen) == before + 1
