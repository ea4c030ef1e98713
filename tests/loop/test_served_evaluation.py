"""What is scored is what is served: an evaluation by an endpoint, on a real server, beside one of the weights."""

from __future__ import annotations

import io
import json

import pytest
from lm_eval.api.instance import Instance

from fmops.adapters.lm_eval_endpoint import EndpointLM
from fmops.adapters.lm_eval_scorer import BATCH_TOLERANCE, SharedPrefixLM
from fmops.adapters.openai_endpoint import OpenAIEndpoint
from fmops.artifacts import Benchmarks, Checkpoint
from fmops.deployment.serving.engine import load_engine
from fmops.errors import FmopsError
from fmops.evaluation.evaluate import evaluate
from fmops.evaluation.evidence import gather
from fmops.evaluation.gate import gate
from fmops.evaluation.journal import Journal
from fmops.evaluation.protocol import Protocol, pin, scorers_digest, write_json, write_lines
from fmops.evaluation.suites import load_suite
from fmops.integrity import read_lines
from fmops.jobs import EvaluateJob, GateJob
from fmops.stage import StageContext
from tests.loop.test_serving import running


@pytest.fixture(scope="module")
def engine(tiny_model):
    loaded = load_engine("transformers", tiny_model, max_tokens=512, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def url(engine):
    with running(engine) as box:
        yield f"{box.url}/v1"


@pytest.fixture
def served(url):
    return EndpointLM(OpenAIEndpoint(url))


@pytest.fixture(scope="module")
def weights(tiny_model):
    return SharedPrefixLM(tiny_model, threads=1)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def test_answers_of_the_endpoint_score_as_those_of_the_weights(served, weights):
    pairs = [("def f(x):", " return x"), ("the class object ", "returns a value"), ("a " * 300 + "class", " value")]
    pairs += [("Der Schlüssel — 日本語 ist", " größer als ß"), ("日本語 🙂", "のテスト 🙂 x")]
    asked = requests("loglikelihood", *pairs)
    for ours, theirs in zip(served.loglikelihood(asked), weights.loglikelihood(asked), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=2e-4)
        assert ours[1] == theirs[1]
        assert ours.lead == pytest.approx(theirs.lead, abs=2e-4)


def test_generations_of_the_endpoint_are_those_of_the_weights(served, weights):
    options = {"max_gen_toks": 12, "until": ["\n\n\n"]}
    texts = [
        lm.generate_until(
            requests("generate_until", ("def f(", options), (lm.apply_chat_template(chat), options))
        )
        for lm in (served, weights)
        for chat in [[{"role": "user", "content": "What is a tuple?"}]]
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_likelihood_of_a_chat_is_refused(served):
    chat = served.apply_chat_template([{"role": "user", "content": "2 + 2?"}])
    with pytest.raises(FmopsError, match="tells no log-likelihoods of a chat"):
        served.loglikelihood(requests("loglikelihood", (chat, " 4")))


def test_options_that_the_server_does_not_have_are_refused(served):
    with pytest.raises(FmopsError, match="generation_kwargs: num_beams is not decoded here"):
        served.generate_until(requests("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(FmopsError, match="top_k is not part of OpenAI's API"):
        served.generate_until(requests("generate_until", ("a", {"do_sample": True, "temperature": 1.0, "top_k": 9})))


def test_samples_of_the_endpoint_come_again_by_their_seed(url):
    options = {"max_gen_toks": 12, "until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    (request,) = requests("generate_until", ("def f(", options))
    first, again, other = [
        EndpointLM(OpenAIEndpoint(url), seed=seed).generate_until([request] * 3) for seed in (1, 1, 2)
    ]
    assert first == again
    assert len(set(first)) == 3
    assert not set(first) & set(other)


def test_finished_requests_are_not_asked_again(served, tmp_path):
    asked = requests("loglikelihood", ("a", " value"), ("a", " class"))
    served.journal = Journal(tmp_path / "task.jsonl")
    first = served.loglikelihood(asked)
    served.endpoint = None
    served.journal = Journal(tmp_path / "task.jsonl")
    assert served.loglikelihood(asked) == first


@pytest.fixture
def measure(tmp_path, tiny_model):
    """Evaluate the tiny model on a likelihood task and a chat task; by its endpoint when one is given."""
    items = tmp_path / "benchmarks" / "items"
    items.mkdir(parents=True)
    asked = {"openbookqa": ("capability", 8), "harmbench": ("harm", 3)}
    pinned = []
    for name, (suite, count) in asked.items():
        key = "prompt" if name == "harmbench" else "question"
        write_lines(
            items / f"{name}.jsonl",
            [{"id": f"{name}-{n}", "cluster": f"{n}", key: f"what is {n}", "choices": ["one", "two"], "label": n % 2}
             for n in range(count)],
        )  # fmt: skip
        pinned.append(pin(load_suite(suite, root=tmp_path), name, items=count).model_dump(mode="json"))
    write_json(items.parent / "tasks.json", pinned)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model").symlink_to(tiny_model)

    def run(out: str, endpoint: str | None, release: str | None = None):
        (tmp_path / out).mkdir()
        return evaluate(
            EvaluateJob(endpoint=endpoint, release=release),
            checkpoint=Checkpoint(path=tmp_path / "base", stage="base", parameters=1, trained_tokens=0),
            benchmarks=Benchmarks(path=items.parent, items={name: count for name, (_, count) in asked.items()}),
            out=tmp_path / out,
            context=StageContext(stream=io.StringIO()),
        )

    return run


def test_two_served_models_may_be_compared_and_a_served_one_with_weights_may_not(measure, url, tmp_path):
    weights, served, again = measure("weights", None), measure("served", url), measure("again", url)
    scores = [
        {(row["sample"], row["metric"]): row["score"] for row in read_lines(tmp_path / name / "samples.jsonl")}
        for name in ("weights", "served")
    ]
    assert scores[0] == scores[1]
    for name in ("weights", "served"):
        assert json.loads((tmp_path / name / "protocol.json").read_text())["engine"]["scorers"] == scorers_digest()
    policy = GateJob(primary=(), margins={"capability": 0.99, "harm": 0.99})

    def decide(champion, challenger):
        return gate(
            policy, champion=champion, challenger=challenger, out=tmp_path, context=StageContext(stream=io.StringIO())
        )

    assert decide(served, again).verdict == "promote"
    mixed = decide(weights, served)
    assert mixed.verdict == "reject"
    assert "the champion was measured with batch prefix-tree/256, the challenger with endpoint" in mixed.reasons[0]


def test_what_the_engine_states_of_company_enters_the_protocol_and_the_gate(
    measure, engine, url, tmp_path, monkeypatch
):
    def fragile(stated: float) -> tuple[float, int]:
        monkeypatch.setattr(engine, "batch_tolerance", stated)
        reports = [measure(f"{name}-{stated}", url) for name in ("before", "after")]
        protocol = Protocol.model_validate_json((reports[1].path / "protocol.json").read_bytes())
        return protocol.batch_tolerance, len(gather(*reports).families["capability"].fragile)

    assert fragile(0.0) == (BATCH_TOLERANCE, 0)
    # Answers of a model of random weights are nearer to each other than ten nats.
    assert fragile(10.0) == (10.0, 8)


def test_a_server_of_another_release_is_not_measured_in_its_place(measure, url):
    with pytest.raises(FmopsError, match=r"serves tiny@0123456789ab, not release-abc\. .*fmops serve --release"):
        measure("other", url, release="release-abc")
    assert measure("this", url, release="tiny@0123456789ab").metrics
