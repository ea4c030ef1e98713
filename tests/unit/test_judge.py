"""An LLM judge: both orders, ties, a judge that follows the order, replies without a choice, people's labels."""

from __future__ import annotations

import json

import pytest
from lm_eval.api.model import LM

from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.adapters.lm_eval_server import served_locally
from fmops.adapters.openai_endpoint import OpenAIEndpoint
from fmops.artifacts import EvalReport
from fmops.errors import FmopsError
from fmops.evaluation.journal import Journal
from fmops.evaluation.judge import Pair, ask_judge, collect, read_labels, read_reply, to_label, weigh
from fmops.evaluation.protocol import Protocol, pin, prompts_digest, write_json, write_lines
from fmops.evaluation.suites import load_suite
from fmops.integrity import read_lines
from fmops.lifecycle import Judge
from fmops.orchestration.compare import judge_answers, told_preference
from fmops.orchestration.project import Project


def pairs(count: int, *, equal: int = 0) -> list[Pair]:
    """The challenger's answers are the longer ones, but for the last `equal` pairs."""
    return [
        Pair("t", f"t-{n}", str(n), f"request {n}", f"short {n}",
             f"short {n}" if n >= count - equal else f"much longer {n}")
        for n in range(count)
    ]  # fmt: skip


def answers(question: str) -> tuple[str, str]:
    first, second = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
    return first, second.split("\n\nReply")[0]


def likes_long(question: str) -> str:
    first, second = answers(question)
    return "A" if len(first) > len(second) else "B"


JUDGES = {
    "likes long answers": (likes_long, (20, 0, 4), 0, 0),
    "likes short answers": (lambda question: "B" if likes_long(question) == "A" else "A", (0, 20, 4), 0, 0),
    "always the first": (lambda _: "A", (0, 0, 24), 20, 0),
    "always the second": (lambda _: "**B**", (0, 0, 24), 0, 0),
    "says tie": (lambda _: "TIE.", (0, 0, 24), 0, 0),
    "rambles": (lambda _: "A good answer would mention both.", (0, 0, 24), 0, 40),
}


@pytest.mark.parametrize("name", JUDGES)
def test_a_preference_counts_when_both_orders_say_it(name):
    ask, (won, lost, tied), favours_first, unreadable = JUDGES[name]
    asked = pairs(24, equal=4)
    found = weigh(asked, ask_judge(asked, ask, journal=Journal(), name="j"), {})
    assert (found.won, found.lost, found.tied, found.equal) == (won, lost, tied, 4)
    assert (found.favours_first, found.unreadable) == (favours_first, unreadable)
    assert found.value == pytest.approx((won + tied / 2) / 24)
    assert found.lower <= found.value <= found.upper
    assert ("no judge of these answers" in "\n".join(told_preference(found))) == (name == "rambles")
    if "always" in name:
        # 20 of 20 one way: 2 · 2⁻²⁰.
        assert found.order_p == pytest.approx(2 * 0.5**20)


@pytest.mark.parametrize(
    ("text", "said"),
    [("A", "A"), (" b.", "B"), ("**B**", "B"), ("Answer A", "A"), ("TIE", "TIE"), ("A is better because", "A"),
     ("Tie!", "TIE"), ("", "?"), ("A good answer", "?"), ("Both", "?"), ("The first", "?"), ("I'd say B", "?")],
)  # fmt: skip
def test_a_reply_is_a_choice_or_none(text, said):
    assert read_reply(text) == said


def test_the_same_pairs_cost_nothing_the_next_time(tmp_path):
    asked = pairs(6)
    first = ask_judge(asked, likes_long, journal=Journal(tmp_path / "judge.jsonl"), name="j")
    kept = Journal(tmp_path / "judge.jsonl")
    again = ask_judge(asked, lambda _: pytest.fail("asked again"), journal=kept, name="j")
    assert first == again
    other = ask_judge(asked, lambda _: "TIE", journal=kept, name="another judge")
    assert {each.score for each in other.values()} == {0.5}


def test_people_correct_a_judge_that_is_wrong(tmp_path):
    asked = pairs(120)
    rows = to_label(asked)
    assert "challenger" not in json.dumps(rows), "people see no names"
    # People like the short answer, the champion's, wherever it stands.
    for row in rows[:40]:
        row["preferred"] = "first" if row["first"].startswith("short") else "second"
    write_lines(tmp_path / "labels.jsonl", rows)
    labels = read_labels(tmp_path / "labels.jsonl", asked)
    assert len(labels) == 40
    assert set(labels.values()) == {0.0}
    found = weigh(asked, ask_judge(asked, likes_long, journal=Journal(), name="j"), labels)
    assert found.value == 1.0
    assert found.people is not None
    assert found.people.value == pytest.approx(0.0)
    told = "\n".join(told_preference(found))
    assert "people: 0.000" in told
    assert "from 40 labels and the judge's 80 others" in told
    assert "the judge alone proves nothing" in "\n".join(told_preference(weigh(asked, {}, {})))


def test_what_people_have_filled_is_not_written_over(tmp_path, tiny_model):
    (tmp_path / "lifecycle.yaml").write_text(f"base: {tiny_model}\nname: judged\n")
    project = Project.open(tmp_path / "lifecycle.yaml")
    asked = pairs(12)
    path = project.store.root / "comparisons" / "a--b.to-label.jsonl"
    with served_locally(Scripted(likes_long)) as url:
        judge = Judge(endpoint=url, labels=str(path.relative_to(tmp_path)))
        first = judge_answers(project, judge.model_copy(update={"labels": None}), asked, "a--b")
        rows = [{**row, "preferred": "tie"} for row in read_lines(path)]
        write_lines(path, rows[:10])
        again = judge_answers(project, judge, asked, "a--b")
    assert first.people is None
    assert again.people is not None
    assert again.people.labelled == 10
    assert read_lines(path) == rows[:10]


def test_both_orders_are_shown_to_people():
    rows = to_label(pairs(40))
    assert 5 < sum(row["first"].startswith("short") for row in rows) < 35


def test_too_few_labels_say_how_many_more(tmp_path):
    rows = to_label(pairs(30))
    write_lines(tmp_path / "labels.jsonl", [{**row, "preferred": "tie"} for row in rows[:9]] + rows[9:])
    with pytest.raises(FmopsError, match=r"9 labels of these answers, and 10 are the least: .*`preferred` in 1 more"):
        read_labels(tmp_path / "labels.jsonl", pairs(30))


def test_where_people_labelled_all_they_stand_alone():
    asked = pairs(12)
    found = weigh(asked, ask_judge(asked, likes_long, journal=Journal(), name="j"), {pair.key: 0.0 for pair in asked})
    assert found.people is not None
    assert (found.people.value, found.people.labelled, found.people.unlabelled) == (0.0, 12, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: {**row, "preferred": "A"}, r"unknown choice in labels\.jsonl: 'A'.*Known: first, second, tie"),
        (lambda row: {**row, "preferred": "tie", "key": "0" * 16}, r"its 3 labels are of other answers than these"),
    ],
)
def test_labels_that_cannot_be_believed_are_refused(tmp_path, change, told):
    asked = pairs(3)
    write_lines(tmp_path / "labels.jsonl", [change(row) for row in to_label(asked)])
    with pytest.raises(FmopsError, match=told):
        read_labels(tmp_path / "labels.jsonl", asked)


def test_missing_labels_say_where_they_come_from(tmp_path):
    with pytest.raises(FmopsError, match=r"no labels at .*fill `preferred` in the file that `fmops compare` wrote"):
        read_labels(tmp_path / "labels.jsonl", [])


def test_nothing_in_words_is_nothing_to_judge():
    with pytest.raises(FmopsError, match="no request was answered in words by both"):
        weigh([], {}, {})


def report(folder, responses: list[str]) -> EvalReport:
    folder.mkdir()
    task = pin(load_suite("harm", root=folder), "harmbench", items=len(responses))
    rows = [
        {"family": "harm", "suite": "harm", "task": "harmbench", "sample": f"h-{n}", "cluster": str(n), "score": 0.0,
         "metric": "refusal", "prompt_sha256": str(n), "response": response}
        for n, response in enumerate(responses)
    ]  # fmt: skip
    protocol = Protocol(tasks=(task,), engine={}, template_sha256=None, prompts_sha256=prompts_digest(rows), seed=0)
    write_lines(folder / "samples.jsonl", rows)
    write_json(folder / "protocol.json", protocol.model_dump(mode="json"))
    return EvalReport(path=folder, metrics=(), fingerprint=protocol.fingerprint)


class Scripted(LM):
    """A judge behind a real socket, with a reply for each question."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_history[-1]["content"]

    def generate_until(self, requests, disable_tqdm=False):
        return [self.say(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize("real", [False, True], ids=["scripted", "tiny model"])
def test_a_judge_at_an_endpoint_compares_two_reports(tmp_path, tiny_model, real):
    champion, challenger = report(tmp_path / "a", ["no"] * 8), report(tmp_path / "b", ["no, and here is why"] * 8)
    items = tmp_path / "items"
    items.mkdir()
    write_lines(items / "harmbench.jsonl", [{"id": f"h-{n}", "cluster": "c", "prompt": f"do {n}"} for n in range(8)])
    found = collect(champion, challenger, items, seed=0)
    assert [pair.prompt for pair in found] == [f"do {n}" for n in range(8)]
    lm = SharedPrefixLM(tiny_model, threads=1) if real else Scripted(likes_long)
    with served_locally(lm) as url:
        endpoint = OpenAIEndpoint(url)

        def ask(question: str) -> str:
            return endpoint.chat([{"role": "user", "content": question}], max_tokens=8)

        judged = weigh(found, ask_judge(found, ask, journal=Journal(), name=endpoint.model), {})
    assert judged.n == 8
    # A model of random weights says nothing of use, and is not believed.
    assert (judged.won, judged.unreadable) == ((0, 16) if real else (8, 0))
