"""A detector is quiet for as long as it promises, and quick when something has changed."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from fmops.deployment.evalues import Count
from fmops.deployment.monitoring.detectors import (
    Detector,
    Shift,
    kolmogorov_smirnov,
    population_stability,
    risk_has_risen,
)
from fmops.deployment.monitoring.topics import novelty, words_of


def run_length(detector, draw, threshold: float, most: int) -> int:
    """Observations until the alarm, or `most`."""
    for number in range(1, most + 1):
        detector = draw(detector)
        if detector.level >= threshold:
            return number
    return most


def test_the_level_can_be_expected_to_grow_by_at_most_one_an_observation():
    """The whole guarantee: level minus observations has no upward drift at the tolerated rate, nor below it."""
    detector = Detector(null=0.1)
    chance = random.Random(0)
    for _ in range(30):
        detector = detector.add(float(chance.random() < 0.1))
        for rate in (0.1, 0.05):
            expected = rate * detector.add(1.0).level + (1 - rate) * detector.add(0.0).level
            assert expected <= detector.level + 1 + 1e-9
        worse = 0.3 * detector.add(1.0).level + 0.7 * detector.add(0.0).level
        assert worse > 0.1 * detector.add(1.0).level + 0.9 * detector.add(0.0).level


def test_false_alarms_are_as_rare_as_promised():
    lengths = []
    for seed in range(60):
        chance = random.Random(seed)
        lengths.append(run_length(Detector(null=0.1), lambda d, c=chance: d.add(float(c.random() < 0.1)), 200, 1500))
    assert statistics.mean(lengths) >= 200  # cut at 1,500, so the true mean is larger still


def test_a_doubled_rate_is_found_soon():
    delays = []
    for seed in range(20):
        chance = random.Random(seed)
        delays.append(run_length(Detector(null=0.06), lambda d, c=chance: d.add(float(c.random() < 0.15)), 1e4, 3000))
    assert statistics.median(delays) < 400
    assert max(delays) < 3000


def shift_draw(chance: random.Random, centre: float):
    return lambda shift: shift.add(math.floor(chance.gauss(centre, 1) * 4), chance.random())


def test_an_unchanged_distribution_is_left_alone():
    lengths = [run_length(Shift(), shift_draw(random.Random(seed), 0), 200, 1500) for seed in range(40)]
    assert statistics.mean(lengths) >= 200


def test_a_shifted_distribution_is_found():
    delays = []
    for seed in range(10):
        chance = random.Random(seed)
        shift = Shift()
        for _ in range(500):
            shift = shift_draw(chance, 0)(shift)
        assert shift.level < 1e4
        delays.append(run_length(shift, shift_draw(chance, 1.5), 1e4, 500))
    assert statistics.median(delays) < 60


def test_ranks_of_tied_values_are_uniform():
    """One value only: all chance, and no alarm."""
    chance, shift = random.Random(1), Shift()
    for _ in range(800):
        shift = shift.add(0, chance.random())
    assert shift.level < 1e4


def test_slow_harm_is_harm_only_beyond_the_tolerance():
    reference = Count(events=50, n=1000)
    assert not risk_has_risen(reference, Count(events=55, n=1000), tolerance=0.01, alpha=0.05)
    assert risk_has_risen(reference, Count(events=1000, n=10_000), tolerance=0.01, alpha=0.05)
    assert not risk_has_risen(reference, Count(events=1000, n=10_000), tolerance=0.06, alpha=0.05)
    assert not risk_has_risen(Count(), Count(events=10, n=10), tolerance=0.0, alpha=0.05)


def test_pictures_are_effect_sizes():
    same, moved = {0: 50, 1: 50}, {1: 50, 2: 50}
    assert population_stability(same, same) == pytest.approx(0)
    assert population_stability(same, moved) > 1
    assert kolmogorov_smirnov(same, moved) == pytest.approx(0.5)
    assert kolmogorov_smirnov(same, {}) == 0


def test_a_text_on_another_topic_is_far_away():
    usual = ("how do python decorators work", "what does a python generator yield", "explain python classes")
    known = frozenset[int]().union(*map(words_of, usual))
    assert novelty(words_of("explain decorators in python"), known) == 0
    assert novelty(words_of("explain python contextmanagers"), known) == 1 / 3
    assert novelty(words_of("symptoms of influenza during pregnancy"), known) == 1
    assert novelty(frozenset(), known) == 1
