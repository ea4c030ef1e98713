"""Tasks that another framework asks: garak's and Inspect's own files, and what is refused before or after a run."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from lm_eval.api.model import LM

from fmops.adapters import garak, inspect
from fmops.adapters.lm_eval_server import served_locally
from fmops.adapters.openai_endpoint import OpenAIEndpoint
from fmops.artifacts import Benchmarks, Checkpoint
from fmops.errors import FmopsError
from fmops.evaluation.evaluate import evaluate
from fmops.evaluation.outside import Order, OutsideFailed, run_outside
from fmops.evaluation.protocol import pin, write_json
from fmops.evaluation.suites import Suite, SuiteTask
from fmops.frameworks import executable
from fmops.integrity import read_lines
from fmops.jobs import EvaluateJob
from fmops.stage import StageContext

ROOT = Path(__file__).resolve().parents[2]


def entry(framework: str, **given):
    described = SuiteTask.model_validate({"framework": framework, "licence": "MIT", "critical": True, **given})
    suite = Suite(
        suite="attacks", family="red-team", about="", margin=0.05, unit="share", higher_is_better=True,
        tasks={"attacks": described},
    )  # fmt: skip
    return pin(suite, "attacks", items=0)


def order(framework: str, folder: Path, **given) -> Order:
    return Order(entry(framework, **given), "http://127.0.0.1:1/v1", "candidate", folder, 2, 0, None)


def attempt(prompt: str, *, scores: list, answer: str | None = "I will not.", probe: str = "dan.Dan_11_0") -> dict:
    """One line of garak 0.17.1's report, cut to the fields that are read."""
    return {
        "entry_type": "attempt", "status": 2, "probe_classname": probe,
        "prompt": {"turns": [{"role": "user", "content": {"text": prompt, "lang": "en"}}]},
        "outputs": [None if answer is None else {"text": answer, "lang": "en"}],
        "detector_results": {"dan.DAN": scores},
    }  # fmt: skip


START = {"entry_type": "init", "garak_version": "0.17.1"}
END = {"entry_type": "completion"}


def report(*entries: dict) -> str:
    return "".join(json.dumps(each) + "\n" for each in entries)


def test_an_attack_is_resisted_when_no_detector_calls_it_a_success(tmp_path):
    asked = order("garak", tmp_path, probes=["dan.Dan_11_0"])
    begun = {**attempt("a", scores=[]), "status": 1}
    lines = [
        START,
        begun,
        attempt("a", scores=[0.0]),
        attempt("b", scores=[0.9]),
        attempt("c", scores=[0.0], answer=""),
    ]
    answers = garak.read_report(report(*lines, END), asked)
    assert answers.version == "0.17.1"
    # Saying nothing resists nothing.
    assert [each.score for each in answers.asked] == [1.0, 0.0, 0.0]
    assert answers.asked[0].prompt == '[["user", "a"]]'


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([START, attempt("a", scores=[0.0])], r"garak's report ends early"),
        ([START, attempt("a", scores=[None]), END], r"an attack of dan\.Dan_11_0 has no answer or no verdict"),
        ([START, attempt("a", scores=[0.0], answer=None), END], r"has no answer or no verdict"),
        ([START, attempt("a", scores=[0.0], probe="dan.DUDE"), END], r"garak knows no probe dan\.Dan_11_0"),
    ],
)
def test_a_report_with_a_hole_is_no_result(tmp_path, lines, told):
    with pytest.raises(OutsideFailed, match=told):
        garak.read_report(report(*lines), order("garak", tmp_path, probes=["dan.Dan_11_0"]))


def log(*samples: dict, status: str = "success") -> dict:
    """Inspect 0.3's log, cut to the fields that are read."""
    return {"status": status, "eval": {"packages": {"inspect_ai": "0.3.285"}}, "samples": list(samples)}


def sample(value: object, **more) -> dict:
    content = [{"type": "text", "text": "421"}]
    return {
        "id": "bolts", "input": "How many?", "scores": {"includes": {"value": value}},
        "output": {"choices": [{"message": {"content": content}}]}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("value", "score"), [("C", 1.0), ("I", 0.0), ("P", 0.5), (0.25, 0.25), (True, 1.0)])
def test_inspects_scores_become_numbers(tmp_path, value, score):
    asked = inspect.read_log(log(sample(value)), order("inspect", tmp_path, source="task.py")).asked
    assert [(each.name, each.prompt, each.response, each.score) for each in asked] == [
        ("bolts", "How many?", "421", score)
    ]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (log(status="error"), r"Inspect's run ended with error: no reason given"),
        (log(sample("C", error={"message": "the tool broke"})), r"sample bolts: the tool broke"),
        (log(sample("good")), r"the score 'good' is no number from 0 to 1"),
        (log(sample(float("nan"))), r"the score nan is no number"),
        (log(sample("C", scores={"a": {"value": 1}, "b": {"value": 1}})), r"2 scores\. Give the task one scorer"),
    ],
)
def test_a_log_with_a_hole_is_no_result(tmp_path, made, told):
    with pytest.raises(OutsideFailed, match=told):
        inspect.read_log(made, order("inspect", tmp_path, source="task.py"))


def test_a_framework_that_is_not_here_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FMOPS_GARAK", str(tmp_path / "nowhere"))
    with pytest.raises(FmopsError, match=r"garak is not here .*pip install garak==.*export FMOPS_GARAK="):
        executable("garak")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"framework": "garak"}, "`probes` and `framework: garak` go together"),
        ({"framework": "inspect"}, "needs `source`"),
        ({"framework": "garak", "probes": ["dan.DUDE"], "metrics": ["refusal"]}, "garak scores resisted"),
        ({"framework": "pyrit"}, "Input should be 'garak' or 'inspect'"),
    ],
)
def test_a_framework_task_that_cannot_run_is_refused_when_it_is_read(given, told):
    with pytest.raises(ValueError, match=told):
        SuiteTask.model_validate(given)


class Echo(LM):
    """A model that says what a test wants, behind the harness's interface."""

    def __init__(self, say):
        super().__init__()
        self.say, self.options = say, []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps(chat_history)

    def generate_until(self, requests, disable_tqdm=False):
        self.options += [request.args[1] for request in requests]
        return [self.say(json.loads(request.args[0])) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_a_model_is_served_to_frameworks_while_it_is_evaluated():
    lm = Echo(lambda messages: f"{len(messages)}: {messages[-1]['content']}")
    with served_locally(lm) as url:
        endpoint = OpenAIEndpoint(url)
        answer = endpoint.chat([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], max_tokens=5)
        with pytest.raises(FmopsError, match="404: /v1/completions: only /v1/chat/completions is served"):
            endpoint.complete("a", max_tokens=1)
    assert answer == "2: hi"
    assert lm.options == [{"max_gen_toks": 5, "until": []}]


FAKE = """#!{python}
# Attacks as garak does: reads its config, asks the endpoint, leaves a report.
import json, os, sys, urllib.request
config = json.loads(open(sys.argv[sys.argv.index("--config") + 1]).read())
plugins, out = config["plugins"], config["reporting"]
assert not any("SECRET" in name for name in os.environ), "a key of the user's came along"
rows = [{{"entry_type": "init", "garak_version": "0.17.1"}}]
for number in range(config["run"]["soft_probe_prompt_cap"]):
    uri = plugins["generators"]["openai"]["OpenAICompatible"]["uri"]
    turn = {{"role": "user", "content": f"attack {{number}}"}}
    body = json.dumps({{"model": plugins["target_name"], "messages": [turn], "max_tokens": 8}}).encode()
    answer = json.load(urllib.request.urlopen(urllib.request.Request(uri + "/chat/completions", body)))
    text = answer["choices"][0]["message"]["content"]
    rows.append({{"entry_type": "attempt", "status": 2, "probe_classname": "dan.Dan_11_0",
                 "prompt": {{"turns": [{{"role": "user", "content": {{"text": turn["content"]}}}}]}},
                 "outputs": [{{"text": text}}], "detector_results": {{"dan.DAN": [float("yes" in text)]}}}})
rows.append({{"entry_type": "completion"}})
open(out["report_dir"] + "/" + out["report_prefix"] + ".report.jsonl", "w").write("\\n".join(map(json.dumps, rows)))
sys.exit({code})
"""


@pytest.fixture
def fake_garak(tmp_path, monkeypatch):
    """Stands for garak's command where garak is not installed: same arguments, same files, real questions."""

    def make(code: int = 0) -> None:
        import sys

        path = tmp_path / "garak"
        path.write_text(FAKE.format(python=sys.executable, code=code))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("FMOPS_GARAK", str(path))
        monkeypatch.setenv("SECRET_OF_MINE", "sk-1")

    make()
    return make


def test_attacks_become_rows_and_are_not_made_twice(tmp_path, fake_garak):
    lm = Echo(lambda messages: "yes" if "1" in messages[-1]["content"] else "no")
    tasks = [(entry("garak", probes=["dan.Dan_11_0"]), None)]
    work = tmp_path / "work"
    work.mkdir()
    ((task, version, rows),) = run_outside(lm, tasks, work, limit=3, seed=0)
    assert (task.items, version) == (3, "0.17.1")
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.0]
    assert len({row["sample"] for row in rows}) == len({row["prompt_sha256"] for row in rows}) == 3
    again = list(run_outside(Echo(lambda _: pytest.fail("asked again")), tasks, work, limit=3, seed=0))
    assert again == [(task, version, rows)]


def test_a_run_that_fails_shows_its_last_words(tmp_path, fake_garak):
    fake_garak(code=3)
    with pytest.raises(OutsideFailed, match=r"task attacks: garak ended with code 3"):
        list(
            run_outside(
                Echo(lambda _: "no"), [(entry("garak", probes=["dan.Dan_11_0"]), None)], tmp_path, limit=1, seed=0
            )
        )


def test_the_stage_counts_attacks_and_the_protocol_names_the_framework(tmp_path, tiny_model, fake_garak):
    benchmarks, base, out = (tmp_path / name for name in ("benchmarks", "base", "out"))
    for folder in (benchmarks, base, out):
        folder.mkdir()
    (base / "model").symlink_to(tiny_model)
    write_json(benchmarks / "tasks.json", [entry("garak", probes=["dan.Dan_11_0"]).model_dump(mode="json")])
    made = evaluate(
        EvaluateJob(limit=2), checkpoint=Checkpoint(path=base, stage="base", parameters=1, trained_tokens=0),
        benchmarks=Benchmarks(path=benchmarks, items={}), out=out, context=StageContext(stream=io.StringIO()),
    )  # fmt: skip
    protocol = json.loads((out / "protocol.json").read_text())
    assert protocol["engine"]["garak"] == "0.17.1"
    assert [(task["items"], task["critical"]) for task in protocol["tasks"]] == [(2, True)]
    assert [(metric.name, metric.n) for metric in made.metrics] == [("resisted", 2)]
    assert len(read_lines(out / "samples.jsonl")) == 2


AGENT = '''
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool


@tool
def stock():
    async def execute(part: str) -> str:
        """How many pieces are in stock.

        Args:
            part: the part's name.
        """
        return {"bolts": "421"}.get(part, "none")

    return execute


@task
def inventory():
    samples = [Sample(id=part, input=f"How many {part}?", target="421") for part in ("bolts", "nuts")]
    return Task(dataset=samples, solver=[use_tools(stock()), generate()], scorer=includes())
'''


def use_the_tool(messages: list[dict]) -> str:
    """What a model that knows tools would say."""
    last = messages[-1]["content"]
    part = next((name for name in ("bolts", "nuts") if f"How many {name}" in last), None)
    if part is None:
        return f"There are {last}."
    return '<tool_call>{"name": "stock", "arguments": {"part": "%s"}}</tool_call>' % part  # noqa: UP031


@pytest.mark.slow
@pytest.mark.skipif("FMOPS_INSPECT" not in os.environ, reason="FMOPS_INSPECT names no inspect command")
def test_an_agent_uses_its_tool_in_the_real_inspect(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    task = entry("inspect", source="agent.py").model_copy(update={"critical": False})
    ((task, _, rows),) = run_outside(
        Echo(use_the_tool), [(task, tmp_path / "agent.py")], tmp_path, limit=None, seed=0
    )  # fmt: skip
    assert [row["score"] for row in rows] == [1.0, 0.0]
    assert "421" in rows[0]["response"]


@pytest.mark.slow
@pytest.mark.skipif("FMOPS_GARAK" not in os.environ, reason="FMOPS_GARAK names no garak command")
def test_the_real_garak_attacks_and_its_prompts_do_not_depend_on_the_model(tmp_path):
    task = entry("garak", probes=["encoding.InjectROT13", "promptinject.HijackHateHumans"])
    found = []
    for name, say in (("a", lambda _: "I will not do that."), ("b", lambda messages: messages[-1]["content"])):
        (tmp_path / name).mkdir()
        ((_, _, rows),) = run_outside(Echo(say), [(task, None)], tmp_path / name, limit=2, seed=0)
        found.append(rows)
        shutil.rmtree(tmp_path / name)
    assert [row["prompt_sha256"] for row in found[0]] == [row["prompt_sha256"] for row in found[1]]
    assert {row["score"] for row in found[0]} == {1.0}
    # Repeating the attack repeats the string that the injection was after.
    assert 0.0 in {row["score"] for row in found[1]}
