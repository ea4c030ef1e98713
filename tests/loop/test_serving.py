"""The endpoint as its users meet it: OpenAI's own client, over a socket, on a real model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn

from fmops.deployment.serving.app import build_app
from fmops.deployment.serving.engine import EngineError, Token, load_engine
from fmops.deployment.serving.server import address, bind
from fmops.deployment.serving.service import WAITING_PER_SLOT, Service

VERSION = "tiny@0123456789ab"
HELLO = [{"role": "user", "content": "What is a tuple?"}]
CHAT = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 12}


@contextmanager
def running(engine):
    """A server on a free port, in a thread; yields its URL and its service."""
    listener = bind("127.0.0.1", 0)
    box = SimpleNamespace(url=address(listener), service=None, loop=None)
    ready = threading.Event()

    async def main():
        box.service, box.loop = Service(engine, version=VERSION), asyncio.get_running_loop()
        config = uvicorn.Config(build_app(box.service, name="tiny"), log_level="error", lifespan="off")
        box.server = uvicorn.Server(config)
        serving = asyncio.ensure_future(box.server.serve(sockets=[listener]))
        box.loop.call_soon(ready.set)
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield box
    finally:
        box.server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def server(tiny_model):
    engine = load_engine("transformers", tiny_model, max_tokens=512, threads=1)
    with running(engine) as box:
        yield box
    engine.close()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class ScriptedEngine:
    """A double whose tokens come when the test says so."""

    name, slots, alternatives, tolerance = "scripted", 2, 20, 0.0
    context_tokens, end_tokens, has_template = 100, frozenset({0}), True

    def __init__(self):
        self.failure = None
        self.tokenizer = self
        self.emits, self.cancelled = [], []
        self.arrived = threading.Semaphore(0)

    def encode_chat(self, messages):
        return [1, 2, 3]

    def encode(self, text):
        return [1]

    def token_text(self, token):
        return "x", b"x"

    def submit(self, generation, emit):
        index = len(self.emits)
        self.emits.append(emit)
        self.arrived.release()
        return lambda: self.cancelled.append(index)


@pytest.fixture
def scripted():
    engine = ScriptedEngine()
    with running(engine) as box:
        yield SimpleNamespace(engine=engine, **vars(box))


def token(text: str, finish=None) -> Token:
    return Token(id=1, text=text, logprob=-1.0, finish=finish)


def until(condition) -> None:
    """Wait for what another thread is about to do; fail after 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.01)


def test_a_chat_streams_what_it_answers_at_once(client):
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert {chunk.system_fingerprint for chunk in chunks} == {VERSION}


def test_a_completion_streams_what_it_answers_at_once(client):
    asked = {"model": "tiny", "prompt": "def f(", "temperature": 0, "max_tokens": 10, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 10
    streamed = [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == logprobs.token_logprobs


def test_a_completion_takes_token_ids(client, server):
    ids = server.service.engine.tokenizer.encode("def f(")
    by_ids, by_text = (
        client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=8)
        for prompt in (ids, "def f(")
    )
    assert by_ids.choices[0].text == by_text.choices[0].text


def test_log_probabilities_come_with_alternatives_and_bytes(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0]
    content = answer.logprobs.content
    assert len(content) == 12
    assert all(len(item.top_logprobs) == 3 and item.top_logprobs[0].logprob == item.logprob for item in content)
    assert b"".join(bytes(item.bytes) for item in content).decode(errors="replace") == answer.message.content


def test_a_seed_and_a_stop_string_do_what_they_say(client):
    sample = {**CHAT, "temperature": 1.0, "seed": 11}
    first, second = (client.chat.completions.create(**sample).choices[0].message.content for _ in range(2))
    assert first == second
    stopped = client.chat.completions.create(**sample, stop=[first[4:7]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (first[: first.index(first[4:7])], "stop")


def test_every_answer_names_the_release(server, client):
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.headers["x-fmops-release"] == VERSION
    assert raw.parse().system_fingerprint == VERSION
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "release": VERSION}


def test_metrics_count_requests_and_tokens(server, client):
    def value(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    tokens, answers = (
        "vllm:generation_tokens_total",
        "gen_ai_server_time_to_first_token_seconds_count",
    )
    before = value(tokens), value(answers)
    client.chat.completions.create(**CHAT)
    assert (value(tokens), value(answers)) == (before[0] + 12, before[1] + 1)
    assert value("gen_ai_server_request_duration_seconds_count") >= 1
    assert value("vllm:num_requests_running") == 0
    assert value(f'fmops_release_info{{version="{VERSION}"}}') == 1


BAD = {
    "n": ({"n": 2}, 400, "n", "does not support 'n' = 2. Only 1 is possible"),
    "a true n": ({"n": True}, 400, "n", "does not support 'n' = True"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "does not support 'tools'"),
    "a penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "Only 0 is possible"),
    "a JSON schema": ({"response_format": {"type": "json_object"}}, 400, "response_format", "does not support"),
    "a typing error": ({"temprature": 1}, 400, "temprature", "Did you mean 'temperature'?"),
    "a hot temperature": ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    "a text for a number": ({"temperature": "1"}, 400, "temperature", "valid number"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "both limits": ({"max_completion_tokens": 5}, 400, "max_tokens", "not both"),
    "far too many tokens": ({"max_tokens": 10**18}, 400, None, "exceed the context of 512 tokens"),
    "a long prompt": ({"messages": [{"role": "user", "content": "x " * 4000}]}, 400, None, "exceed the context"),
    "no messages": ({"messages": []}, 400, "messages", "at least 1 item"),
    "a message without content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "is required"),
    "an unknown role": ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role", "'user'"),
    "no picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content.0.image_url",
        "is required",
    ),
    "an address": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        400,
        "messages.0.content.0.image_url.url",
        "addresses are not fetched",
    ),
    "another part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        400,
        "messages.0.content.0",
        "'text'",
    ),
    "a picture": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
                }
            ]
        },
        400,
        "messages",
        "this model reads no pictures",
    ),
    "half a surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "half a surrogate"),
    "another model": ({"model": "gpt-4"}, 404, "model", "Known: tiny"),
    "alternatives alone": ({"top_logprobs": 2}, 400, "top_logprobs", "needs 'logprobs'"),
    "five stop strings": ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
    "an empty stop string": ({"stop": ""}, 400, "stop.0", "at least 1 character"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs 'stream'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named(server, case):
    change, status, param, text = BAD[case]
    response = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps({**CHAT, **change}).encode())
    error = response.json()["error"]
    assert response.status_code == status, error
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_a_prompt_is_scored_by_the_server_as_evaluation_scores_it(server, tiny_model):
    from lm_eval.api.instance import Instance

    from fmops.adapters.lm_eval_scorer import SharedPrefixLM

    lm = SharedPrefixLM(tiny_model, threads=1)
    pairs = [("def f(x):", " return x"), ("the class object", " returns a value"), ("a " * 300 + "class", " value")]
    scored = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, answer), (loglikelihood, _) in zip(pairs, scored, strict=True):
        # What lm-evaluation-harness's `local-completions` sends.
        body = {
            "model": "tiny", "prompt": [lm.tok_encode(context + answer)], "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "seed": 1234, "echo": True,
        }  # fmt: skip
        served = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["logprobs"]
        begin = len(lm.tok_encode(context))
        assert sum(served["token_logprobs"][begin:-1]) == pytest.approx(loglikelihood, abs=1e-4)
        assert all(served["top_logprobs"][begin:])


def test_an_echo_begins_with_the_prompt(client):
    asked = {"model": "tiny", "prompt": "def f(", "temperature": 0, "max_tokens": 3, "logprobs": 1}
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == "def f(" + plain.choices[0].text
    assert echoed.usage == plain.usage
    first, *others = echoed.choices[0].logprobs.token_logprobs
    assert first is None
    assert all(value < 0 for value in others)
    assert others[-3:] == plain.choices[0].logprobs.token_logprobs


@pytest.mark.parametrize("change", [{"stream": True, "logprobs": 1}, {}], ids=["streamed", "without logprobs"])
def test_an_echo_that_nobody_could_read_is_refused(server, change):
    body = {"model": "tiny", "prompt": "def f(", "echo": True, **change}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "'echo' needs 'logprobs', and no 'stream'"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"NaN", b"[" * 100_000], ids=lambda body: repr(body[:3]))
def test_what_is_no_json_object_is_a_400(server, body):
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_a_huge_body_is_refused_while_it_is_read(server):
    response = httpx.post(f"{server.url}/v1/completions", content=b"x" * (5 * 2**20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_routes_that_do_not_exist_say_so(server):
    assert httpx.get(f"{server.url}/docs").status_code == 404
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="Known: tiny"):
        client.chat.completions.create(**{**CHAT, "model": "other"})
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.chat.completions.create(**{**CHAT, "max_tokens": 9999})


def test_fields_that_change_nothing_are_welcome(client):
    usual = client.chat.completions.create(**CHAT)
    decorated = client.chat.completions.create(
        **CHAT, n=1, presence_penalty=0.0, frequency_penalty=0, user="me", metadata={"a": "b"}, logit_bias={},
        response_format={"type": "text"}, store=False,
    )  # fmt: skip
    assert decorated.choices[0].message.content == usual.choices[0].message.content


def test_a_failure_in_mid_stream_is_an_error_event_not_a_silent_end(scripted):
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**CHAT, stream=True)
        assert scripted.engine.arrived.acquire(timeout=20)
        scripted.engine.emits[0](token("half an answer"))
        scripted.engine.emits[0](EngineError("the engine stopped: disk on fire"))
        pieces = iter(stream)
        assert [next(pieces).choices[0].delta.content for _ in range(2)] == ["", "half an answer"]
        with pytest.raises(openai.APIError, match="disk on fire"):
            next(pieces)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(scripted, stream):
    with httpx.Client() as client:
        request = client.build_request(
            "POST", f"{scripted.url}/v1/chat/completions", json={**CHAT, "stream": stream}, timeout=1.0
        )
        if stream:
            response = client.send(request, stream=True)
            assert scripted.engine.arrived.acquire(timeout=20)
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    until(lambda: scripted.engine.cancelled == [0])
    until(lambda: not scripted.service._answers)


def test_beyond_the_queue_a_request_is_told_when_to_come_back(scripted):
    limit = scripted.engine.slots * (1 + WAITING_PER_SLOT)
    with httpx.Client(timeout=20) as client:
        streams = [
            client.send(
                client.build_request("POST", f"{scripted.url}/v1/chat/completions", json={**CHAT, "stream": True}),
                stream=True,
            )
            for _ in range(limit)
        ]
        refused = client.post(f"{scripted.url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        metrics = client.get(f"{scripted.url}/metrics").text
        assert f'vllm:num_requests_waiting{{model_name="{VERSION}"}} {limit - scripted.engine.slots}.0' in metrics
        for emit in scripted.engine.emits:
            emit(token("done", finish="stop"))
        assert all("[DONE]" in stream.read().decode() for stream in streams)
        until(lambda: not scripted.service._answers)
        assert client.get(f"{scripted.url}/health").status_code == 200


def test_while_draining_the_old_finish_and_the_new_are_turned_away(scripted):
    with httpx.Client(timeout=20) as client:
        asked = client.build_request("POST", f"{scripted.url}/v1/chat/completions", json={**CHAT, "stream": True})
        stream = client.send(asked, stream=True)
        draining = asyncio.run_coroutine_threadsafe(scripted.service.drain(grace_s=20), scripted.loop)
        until(lambda: scripted.service.draining)
        health = client.get(f"{scripted.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refused = client.post(f"{scripted.url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert not draining.done()
        scripted.engine.emits[0](token("to the end", finish="stop"))
        text = stream.read().decode()
        draining.result(timeout=20)
    assert "to the end" in text
    assert text.endswith("data: [DONE]\n\n")


def test_an_answer_that_outlasts_the_grace_ends_with_an_error(scripted):
    with httpx.Client(timeout=20) as client:
        asked = client.build_request("POST", f"{scripted.url}/v1/chat/completions", json={**CHAT, "stream": True})
        stream = client.send(asked, stream=True)
        asyncio.run_coroutine_threadsafe(scripted.service.drain(grace_s=0), scripted.loop).result(timeout=20)
        text = stream.read().decode()
    assert "shut down after a grace of 0 s" in text
    assert "[DONE]" not in text


def test_a_broken_engine_makes_the_server_unready(scripted):
    scripted.engine.failure = "the engine stopped: out of memory"
    assert httpx.get(f"{scripted.url}/health").json()["status"] == "failed"
    refused = httpx.post(f"{scripted.url}/v1/chat/completions", json=CHAT)
    assert (refused.status_code, "out of memory" in refused.text) == (503, True)
