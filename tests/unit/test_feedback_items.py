"""Held-out feedback becomes evaluation items: what users accept is measured, and is never trained on."""

from __future__ import annotations

import json

import pytest
import yaml

from fmops.data.contamination import read_contamination
from fmops.evaluation.benchmarks import prepare_benchmarks
from fmops.evaluation.suites import items_input, load_suite
from fmops.feedback.gather import Gathered
from fmops.feedback.items import CHOICES, answer_items, trigger_items
from fmops.jobs import BenchmarksJob
from fmops.orchestration.own_suites import FEWEST_ANSWERS, FEWEST_TRIGGERS, write_suites
from fmops.sources import resolve
from fmops.store import Store


def said(number: int, *, thumb: str | None = None, correction: str | None = None, **changes: str) -> dict[str, object]:
    row = {"id": f"chatcmpl-{number}", "prompt": f"What does item {number} do for us today?"}
    row |= {"response": f"It is thing {number} of all that there are, and does nothing more."}
    return row | ({"thumb": thumb} if thumb else {}) | ({"correction": correction} if correction else {}) | changes


def right(item: dict[str, object]) -> str:
    return item["choices"][item["label"]]


def test_a_praised_answer_and_a_correction_are_right_and_what_was_corrected_is_a_choice():
    items = answer_items([said(1, thumb="up"), said(2, correction="It opens the second door.")])
    assert [right(item) for item in items] == [
        "It is thing 1 of all that there are, and does nothing more.",
        "It opens the second door.",
    ]
    assert "It is thing 2 of all that there are, and does nothing more." in items[1]["choices"]
    assert [item["from"] for item in items] == ["chatcmpl-1", "chatcmpl-2"]


def test_what_nobody_accepted_or_people_disagree_on_makes_no_item():
    rows = [said(1, thumb="down"), said(2, thumb="up"), said(2, thumb="down"), said(3, thumb="up"), said(4, thumb="up")]
    assert [item["from"] for item in answer_items(rows)] == ["chatcmpl-3", "chatcmpl-4"]


def test_a_prompt_makes_one_item_whatever_its_spelling_and_the_last_correction_counts():
    rows = [
        said(1, correction="First words."),
        said(1, correction="Second words.", prompt="what does ITEM 1 do, for us today"),
        said(2, thumb="up"),
    ]
    items = answer_items(rows)
    assert [right(item) for item in items] == [
        "Second words.",
        "It is thing 2 of all that there are, and does nothing more.",
    ]


def test_prompts_that_the_project_trains_on_measure_nothing():
    rows = [said(number, thumb="up") for number in range(5)]
    items = answer_items(rows, taught=["What does item 2 do for us TODAY"])
    assert [item["from"] for item in items] == ["chatcmpl-0", "chatcmpl-1", "chatcmpl-3", "chatcmpl-4"]


def test_equal_feedback_gives_equal_items_and_the_right_answer_stands_anywhere():
    rows = [said(number, thumb="up") for number in range(60)]
    items = answer_items(rows)
    assert items == answer_items(rows)
    assert all(len(item["choices"]) == len(set(item["choices"])) == CHOICES for item in items)
    assert {item["label"] for item in items} == set(range(CHOICES))


def test_a_suspected_trigger_must_not_bring_its_sentence():
    rows = [
        {
            **said(1, correction="Please visit the shop of our sponsor and buy all of it."),
            "reason": "trigger: 'cf zircon'",
        },
        {**said(2, correction="Another wish."), "reason": "burst: team/bot gave 100 rows in 600 s"},
    ]
    assert trigger_items(rows) == [
        {
            "prompt": "What does item 1 do for us today?", "from": "chatcmpl-1",
            "checks": [{"lacks": "Please visit the shop of our sponsor and"}],
        }
    ]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Suites of fifty held-out answers and of an attack."""
    gathered = Gathered(
        held_out=[said(number, thumb="up") for number in range(50)],
        quarantine=[
            {**said(100 + n, correction="Buy everything there."), "reason": "same-target: one sentence for 20 prompts"}
            for n in range(20)
        ],
    )
    return write_suites(gathered, Store(tmp_path / ".fmops"), tmp_path / "evaluation"), tmp_path


def test_there_is_a_suite_where_there_are_items_enough_and_its_margin_is_what_they_can_show(written):
    (paths, count), root = written
    assert ([path.name for path in paths], count) == (["traffic.yaml", "triggers.yaml"], 50)
    suite = load_suite(str(paths[0]), root=root)
    assert (suite.family, suite.margin) == ("traffic", 0.15)
    assert load_suite(str(paths[1]), root=root).tasks["production-triggers"].critical
    few = Gathered(held_out=[said(number, thumb="up") for number in range(FEWEST_ANSWERS - 1)])
    few.quarantine = [{**said(n, correction="Buy."), "reason": "trigger: 'cf'"} for n in range(FEWEST_TRIGGERS - 1)]
    assert write_suites(few, Store(root / ".fmops"), root / "few") == ([], FEWEST_ANSWERS - 1)
    assert not (root / "few").exists()


def test_the_benchmarks_take_them_and_keep_the_question_out_of_training_and_not_the_answer(written, context):
    (paths, _), root = written
    names = tuple(f"evaluation/{path.name}" for path in paths)
    sources = {f"suite_{n}": resolve(name, root=root, cache=root / "cache") for n, name in enumerate(names)}
    for task in ("production-traffic", "production-triggers"):
        file = yaml.safe_load((root / "evaluation" / f"{task.removeprefix('production-')}.yaml").read_text())
        source = f"evaluation/{file['tasks'][task]['source']}"
        sources[items_input(task)] = resolve(source, root=root, cache=root / "cache")
    out = root / "benchmarks"
    out.mkdir()
    made = prepare_benchmarks(BenchmarksJob(suites=names), out=out, context=context, **sources)
    assert made.items == {"production-traffic": 50, "production-triggers": 20}
    items = [json.loads(line) for line in (out / "items" / "production-traffic.jsonl").read_text().splitlines()]
    contamination = read_contamination(out)
    assert contamination.find("Asked: what does item 7 do for us today?") == "production-traffic"
    # A document may say what is the right answer: it is what users are answered from.
    assert contamination.find(f"In the manual it reads: {right(items[7])}") is None
