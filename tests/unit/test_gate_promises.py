"""Short versions of `python -m benchmarks.gate`: the gate's error rates on the scores of a real model.

`golden/paired_scores.json` holds SmolLM2-135M-Instruct after a quickstart against itself before (2026-11-27): 486 items
of six families, each with its difference, after − before, and its cluster.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gate import ALPHA, Rate, enough_items, equal_models, noise_in_a_row, one_of_twenty, wide
from fmops.evaluation.evidence import Evidence, Pairs
from fmops.evaluation.protocol import PinnedTask
from fmops.evaluation.suites import TaskConfig

SCORES = Path(__file__).parents[1] / "golden" / "paired_scores.json"


@pytest.fixture(scope="module")
def real() -> Evidence:
    tasks, families = [], {}
    for name, kept in json.loads(SCORES.read_text()).items():
        differences = [float(value) for value in kept["differences"]]
        families[name] = Pairs(
            name, differences, [str(cluster) for cluster in kept["clusters"]], kept["binary"],
            fragile=kept["fragile"], tolerance=kept["tolerance"], tasks=[name] * len(differences),
        )  # fmt: skip
        tasks.append(PinnedTask(
            task=name, suite=name, family=name, margin=kept["margin"], unit=kept["unit"], higher_is_better=True,
            metrics=("acc",), chat=False, corpus=None, characters=None, items=len(differences), licence="",
            config=TaskConfig(output_type="multiple_choice", doc_to_choice="choices", doc_to_target="label"),
        ))  # fmt: skip
    return Evidence((), tuple(tasks), families)


def at_least(rate: Rate) -> float:
    """What the rate is at least, by Clopper and Pearson at 97.5 %."""
    return rate.bounds[0]


def test_an_equal_model_is_promoted_as_better_no_more_often_than_alpha(real):
    """E01, n = 500; seen: promoted 6, called regressed 0."""
    promoted, regressed, _ = equal_models(real, 500, margins=wide(real.tasks), seed=1)
    assert promoted.n == 500
    assert at_least(promoted) <= ALPHA
    assert regressed.hits <= 2


def test_with_the_planned_items_an_equal_model_passes_as_often_as_the_plan_says(real):
    """E01, n = 500; seen: 42 are not passed."""
    [blocked] = enough_items(real, 500, margins=wide(real.tasks), seed=5)
    assert at_least(blocked) <= 0.2


def test_one_of_twenty_real_benchmarks_that_is_worse_is_found(real):
    """E02, n = 60; seen: an equal model passes 60 times, one at the margin 2, one at twice the margin never."""
    equal, at_the_margin, beyond = one_of_twenty(real, 60, items=400, margin=0.1, seed=2)
    assert equal.hits >= 55
    assert at_least(at_the_margin) <= ALPHA
    assert beyond.hits == 0


def test_a_hundred_equal_candidates_in_a_row_are_stopped_by_what_they_have_spent(real):
    """E04, 20 streams of 100; seen: one promoted in none of them, and in 17 at α in every round."""
    spent, careless = noise_in_a_row(real, 20, rounds=100, margins=wide(real.tasks), seed=4)
    assert at_least(spent) <= ALPHA / 2
    assert careless.hits > spent.hits
