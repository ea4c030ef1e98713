"""An endpoint that is asked by evaluation: what it may answer, what is refused, and what is tried again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import httpx
import pytest
from lm_eval.api.instance import Instance

from fmops.adapters.lm_eval_endpoint import EndpointLM
from fmops.adapters.openai_endpoint import LONGEST_WAIT_S, TRIES, OpenAIEndpoint
from fmops.errors import FmopsError

URL = "http://model.test/v1"
CHAT = {"choices": [{"message": {"role": "assistant", "content": "Four."}}]}


class Script:
    """A server that answers what the test says, in turn; the last answer stays."""

    def __init__(self, *answers: tuple[int, object] | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers, self.asked, self.waited = list(answers), [], []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        self.asked.append((dict(request.headers), json.loads(request.content)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            return answer(request)
        status, body = answer
        headers = {"Retry-After": "7"} if status == 429 else {}
        text = body if isinstance(body, str) else json.dumps(body)
        return httpx.Response(status, content=text.encode(), headers=headers)

    def endpoint(self, **given) -> OpenAIEndpoint:
        return OpenAIEndpoint(URL, transport=httpx.MockTransport(self), sleep=self.waited.append, **given)


def ask(endpoint: OpenAIEndpoint) -> str:
    return endpoint.chat([{"role": "user", "content": "2 + 2?"}], max_tokens=8)


def test_questions_are_greedy_and_the_key_stays_in_the_environment(monkeypatch):
    monkeypatch.setenv("FMOPS_API_KEY", "sk-secret")
    script = Script((200, CHAT))
    assert ask(script.endpoint()) == "Four."
    headers, body = script.asked[0]
    assert headers["authorization"] == "Bearer sk-secret"
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 8, "temperature": 0,
    }  # fmt: skip


def test_a_busy_server_is_asked_again_when_it_says_so():
    script = Script((429, {"error": {"message": "slow down"}}), (503, "busy"), (200, CHAT))
    assert ask(script.endpoint()) == "Four."
    assert script.waited == [7.0, 2.0]


def test_a_server_that_stays_busy_is_given_up():
    script = Script((503, {"error": {"message": "no engine is ready"}}))
    with pytest.raises(FmopsError, match=r"chat/completions answered 503: no engine is ready"):
        ask(script.endpoint())
    assert len(script.asked) == TRIES
    assert max(script.waited) <= LONGEST_WAIT_S


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((400, {"error": {"message": "the prompt is longer than 512 tokens"}}), r"400: the prompt is longer than 512"),
        ((401, {"error": {"message": "no such key"}}), r"401: no such key\. Set FMOPS_API_KEY"),
        ((200, "<html>hello</html>"), r"answered no JSON object\. Is it an OpenAI-compatible endpoint\?"),
        ((200, {"choices": []}), r"answered without a choice"),
        ((200, {"object": "list"}), r"answered without 'choices'"),
        ((200, {"choices": [{"text": "Four."}]}), r"answered without 'message'"),
        (refused, r"no answer from http://model\.test/v1/chat/completions: ConnectError\. Start it \(`fmops serve`\)"),
    ],
)
def test_what_is_no_answer_is_named(answer, told):
    with pytest.raises(FmopsError, match=told):
        ask(Script(answer).endpoint())


def test_an_answer_without_text_is_empty():
    assert ask(Script((200, {"choices": [{"message": {"content": None}}]})).endpoint()) == ""


def test_the_model_is_named_where_several_are_served():
    def several(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})

    transport = httpx.MockTransport(several)
    assert OpenAIEndpoint(URL, model="b", transport=transport).model == "b"
    with pytest.raises(FmopsError, match=r"serves a, b: name the one that is meant"):
        OpenAIEndpoint(URL, transport=transport)
    with pytest.raises(FmopsError, match=r"serves no model 'c', but a, b"):
        OpenAIEndpoint(URL, model="c", transport=transport)


def test_a_prompts_log_probabilities_come_without_what_was_generated():
    logprobs = {
        "token_logprobs": [None, -1.0, -2.5, -0.1],
        "top_logprobs": [None, {"x": -1.0, "w": -1.25}, {"y": -0.5, "v": -2.0}, {"z": -0.1, "u": -3.0}],
    }  # fmt: skip
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    endpoint = Script((200, {"choices": [{"text": "abcd", "logprobs": logprobs}], "usage": usage})).endpoint()
    assert endpoint.prompt_logprobs("abc") == [(None, -math.inf), (-1.0, 0.25), (-2.5, -2.0)]
    assert endpoint.count_tokens("abc") == 3
    blind = Script((200, {"choices": [{"text": "abc", "logprobs": None}], "usage": usage}))
    with pytest.raises(FmopsError, match=r"answered without 'token_logprobs'"):
        blind.endpoint().prompt_logprobs("abc")


def sampled(script: Callable[[httpx.Request], httpx.Response]) -> list[str]:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.5}
    lm = EndpointLM(Script(script).endpoint(), seed=3)
    return lm.generate_until([Instance("generate_until", {}, ("a", options), 0)] * 2)


def says(text: Callable[[dict], str]) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, json={"choices": [{"text": text(json.loads(request.content))}]})


def test_sampling_is_asked_with_a_seed_of_its_own_for_each_repeat():
    bodies = []

    def answer(body: dict) -> str:
        bodies.append(body)
        return f"said {body.get('seed')}"

    first, second = sampled(says(answer))
    asked = [body for body in bodies if body["prompt"] == "a"]
    assert [(body["temperature"], body["top_p"]) for body in asked] == [(0.5, 1.0)] * 2
    assert {first, second} == {f"said {body['seed']}" for body in asked}
    assert first != second
    # Before them: the same seed twice, and others.
    assert len(bodies) == 7


def test_an_endpoint_that_does_not_repeat_its_samples_is_refused():
    count = iter(range(99))
    with pytest.raises(FmopsError, match="gives another answer to the same seed: samples could neither be repeated"):
        sampled(says(lambda _: f"said {next(count)}"))
    with pytest.raises(FmopsError, match=r"gives the same answer to every seed.*drop do_sample and temperature"):
        sampled(says(lambda _: "said so"))


def likely(value: Callable[[str], object], *, stated: float | None = None) -> EndpointLM:
    """An endpoint that gives every token of a text, one a word, what `value` says of it."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            card = {"id": "m", **({} if stated is None else {"batch_tolerance": stated})}
            return httpx.Response(200, json={"data": [card]})
        body = json.loads(request.content)
        words = body["prompt"].split()
        logprobs = {
            "token_logprobs": [None, *map(value, words[1:]), -1.0],
            "top_logprobs": [None, *({"x": -0.5} for _ in words)],
        }
        usage = {"prompt_tokens": len(words), "completion_tokens": 1}
        choice = {"text": "", "logprobs": logprobs if body.get("echo") else None}
        return httpx.Response(200, content=json.dumps({"choices": [choice], "usage": usage}).encode())

    return EndpointLM(OpenAIEndpoint(URL, transport=httpx.MockTransport(answer)))


ASKED = Instance("loglikelihood", {"id": "sums-7"}, ("two and two", " is four"), 0, ("sums", 7, 1))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None], ids=str)
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_a_log_probability_that_is_no_number_is_refused_with_its_item(kind, value):
    served = likely(lambda word: value if word == "four" else -1.0)
    assert served.loglikelihood([ASKED, Instance("loglikelihood", {}, ("two", " is"), 0)][1:]) == [(-1.0, False)]
    text = (ASKED.args[0] + ASKED.args[1],) if kind == "loglikelihood_rolling" else ASKED.args
    asked = Instance(kind, ASKED.doc, text, 0, ASKED.metadata)
    with pytest.raises(FmopsError, match=rf"^task sums, item sums-7: {URL} gives .*log-probability {value}"):
        getattr(served, kind)([asked])


@pytest.mark.parametrize(("stated", "tolerance"), [(None, 0.1), (0.0, 2e-4), (0.05, 0.05)])
def test_an_endpoint_is_held_to_what_it_states_of_company_and_a_foreign_one_to_the_coarsest(stated, tolerance):
    calls = iter(range(10**6))
    assert likely(lambda _: -1.0, stated=stated).batch_tolerance == tolerance
    little = likely(lambda _: -1.0 - 1e-9 * next(calls), stated=stated)
    assert little.loglikelihood([ASKED])[0][0] == pytest.approx(-2.0, abs=1e-3)
    much = likely(lambda _: -1.0 - 1e-2 * next(calls), stated=stated)
    with pytest.raises(FmopsError, match=rf"other requests move .* batch tolerance of {tolerance:g}: differ"):
        much.loglikelihood([ASKED])
