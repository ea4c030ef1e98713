"""Short versions of `python -m benchmarks.sequential`: what is promised about false actions, on simulated traffic."""

from __future__ import annotations

from benchmarks.sequential import POLICY, bounds, canary, drift_run, gradual, rates, seasonal, unchanged
from fmops.deployment.evalues import minimum_detectable


def kinds(state) -> set[str]:
    return {alarm.kind for alarm in state.alarms}


def test_an_equal_challenger_is_hardly_ever_rolled_back():
    """S09: α = 0.05; P(Binomial(30, 0.05) > 5) = 0.003."""
    found = canary(30, {})
    assert found["rolled_back"]["hits"] <= 5
    assert found["promoted"]["hits"] >= 20


def test_a_harm_at_the_margin_is_hardly_ever_promoted():
    """The empty-answer margin is 0.02; P(Binomial(12, 0.05) > 3) = 0.002."""
    found = canary(12, {"empty": 0.02})
    assert found["promoted"]["hits"] <= 3
    assert found["rolled_back"]["hits"] >= 6


def test_the_stated_minimum_detectable_harm_is_found():
    harm = minimum_detectable(0.04, a=1000, b=200, alpha=POLICY.alpha * 0.8, signals=30)
    found = canary(8, {"refused": harm})
    assert found["rolled_back"]["hits"] >= 6
    assert found["promoted"]["hits"] == 0


def test_thirty_quiet_days_raise_no_alarm():
    """E05: P(alarm) ≤ 0.12 a kind at 400 answers a day; the seed is fixed."""
    assert kinds(drift_run(1, unchanged, 10_000)) == set()


def test_benign_seasons_are_no_harm():
    """E06: a day and night of other topics and lengths may be noticed, but must not lead to a new training round."""
    assert "harm" not in kinds(drift_run(2, seasonal, 4000))


def test_gradual_and_sudden_harm_are_found():
    """E06."""
    assert "harm" in kinds(drift_run(3, gradual, 5000))
    assert "harm" in kinds(drift_run(4, rates(wrong_language=0.2), 500))


def test_the_intervals_are_clopper_and_pearson_s():
    assert bounds(0, 40)[1] < 0.089 < bounds(0, 39)[1] + 0.002
    low, high = bounds(10, 200)
    assert (round(low, 4), round(high, 4)) == (0.0242, 0.0900)
