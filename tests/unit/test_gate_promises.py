"""Short versions of `python -m benchmarks.gate`: the gate's error rates on the scores of a real model.

`golden/paired_scores.json` holds SmolLM2-135M-Instruct after a quickstart against itself before (2026-11-27): 486 items
of six families, each with its difference, after − before, and its cluster.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gate import (
    ALPHA,
    Rate,
    enough_items,
    equal_models,
    guards_of_equal,
    noise_in_a_row,
    one_of_pooled,
    one_of_twenty,
    wide,
)
from fmops.artifacts import Judged
from fmops.evaluation.evidence import Evidence, Pairs
from fmops.evaluation.protocol import PinnedTask
from fmops.evaluation.spending import level
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


def at_most(rate: Rate) -> float:
    """What the rate is at most, by Clopper and Pearson at 97.5 %."""
    return rate.bounds[1]


def test_an_equal_model_is_promoted_as_better_no_more_often_than_alpha(real):
    """E01, n = 500; seen: promoted 6, called regressed 0."""
    promoted, regressed, _ = equal_models(real, 500, margins=wide(real.tasks), seed=1)
    assert promoted.n == 500
    assert at_most(promoted) <= ALPHA
    assert regressed.hits <= 2


def test_with_the_planned_items_an_equal_model_passes_as_often_as_the_plan_says(real):
    """E01, n = 500; seen: 42 are not passed."""
    [blocked] = enough_items(real, 500, margins=wide(real.tasks), seed=5)
    assert at_most(blocked) <= 0.2


def test_one_of_twenty_real_benchmarks_that_is_worse_is_found(real):
    """E02, n = 100; seen: an equal model passes 100 times, one at twice the margin never."""
    equal, _, beyond = one_of_twenty(real, 100, items=120, margin=0.2, seed=2)
    assert at_least(equal) >= 0.95
    assert at_most(beyond) <= ALPHA


def test_one_of_twenty_at_the_margin_passes_at_most_alpha_and_a_gate_at_twice_that_is_seen(real):
    """E02, n = 400; seen: 20, and 48 at 2α."""
    of_promised, of_twice = (
        one_of_twenty(real, 400, items=60, margin=0.3, seed=2, alpha=alpha, factors=(1,))[0]
        for alpha in (ALPHA, 2 * ALPHA)
    )
    assert at_least(of_promised) <= ALPHA < at_least(of_twice)


def test_one_of_twenty_benchmarks_pooled_into_four_families_is_found(real):
    """E02 as the packaged suites are, n = 50; seen: 0 rejected at the guard, 45 past it; all families hold."""
    equal, passed, _, at_the_guard, _, _, found, missed, families = one_of_pooled(
        real, 50, items=400, margin=0.1, seed=6
    )
    assert equal.hits == 0
    assert at_least(passed) >= 0.9
    assert at_least(at_the_guard) <= ALPHA
    assert at_least(found) >= 0.7
    assert at_most(missed) <= 0.3
    assert at_least(families) >= 0.9, "without guards the pools would hide it"


def test_guards_reject_an_equal_model_no_more_often_than_alpha_and_uncorrected_ones_are_seen():
    """E01, n = 500; seen: 0, where every benchmark has just lost its guard 17, and 136 without Bonferroni."""
    equal, at_the_guards = guards_of_equal(500, seed=8, limits=(40,))
    _, uncorrected = guards_of_equal(500, seed=8, limits=(40,), alpha=5 * ALPHA)
    assert at_most(equal) <= ALPHA
    assert at_least(at_the_guards) <= ALPHA < at_least(uncorrected)


def stream(alpha: float) -> float:
    """P(one of a hundred equal candidates is promoted), their p-values uniform and independent: exact."""
    none, tested = 1.0, []
    for _ in range(100):
        now = level(tested, alpha)
        none *= 1 - now
        tested.append(Judged(candidate="noise", level=now, p_value=1.0, promoted=False))
    return 1 - none


def test_how_often_a_hundred_equal_candidates_fool_the_gate_is_known_exactly():
    """E04: 0.0236 of at most 0.025, where a gate that spends twice its α would have 0.0467."""
    assert stream(ALPHA) == pytest.approx(0.0236, abs=5e-5)
    assert stream(ALPHA) <= ALPHA / 2 < stream(2 * ALPHA)


def test_a_hundred_equal_candidates_in_a_row_are_stopped_by_what_they_have_spent(real):
    """E04 on real scores, 20 streams of 100; what may be promised is the exact test's to say."""
    spent, careless = noise_in_a_row(real, 20, rounds=100, margins=wide(real.tasks), seed=4)
    assert spent.hits <= 1
    assert careless.hits > 10
