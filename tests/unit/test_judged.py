"""A judge helps as far as it agrees with people, and misleads nobody when it does not."""

from __future__ import annotations

import random
import statistics

import pytest

from fmops.errors import FmopsError
from fmops.evaluation.judged import FEWEST_LABELS, powered_mean, preference


def draw(rng: random.Random, *, n: int, many: int, agreement: float, generosity: float):
    """Human scores with mean 0.3, and a judge that is right with `agreement` and else says 1 with `generosity`."""

    def one() -> tuple[float, float]:
        truth = float(rng.random() < 0.3)
        return truth, truth if rng.random() < agreement else float(rng.random() < generosity)

    labelled = [one() for _ in range(n)]
    return [own for own, _ in labelled], [judge for _, judge in labelled], [one()[1] for _ in range(many)]


@pytest.mark.parametrize(("agreement", "generosity"), [(0.9, 0.9), (0.0, 0.9), (0.5, 0.1)])
def test_the_interval_holds_however_wrong_the_judge_is(agreement, generosity):
    rng, trials = random.Random(1), 400
    found = [
        powered_mean(*draw(rng, n=100, many=1000, agreement=agreement, generosity=generosity)) for _ in range(trials)
    ]
    covered = sum(each.lower <= 0.3 <= each.upper for each in found)
    # 95 % promised; three standard errors of 400 trials.
    assert covered / trials > 0.917
    assert abs(statistics.fmean(each.value for each in found) - 0.3) < 0.01
    naive = statistics.fmean(draw(rng, n=2, many=4000, agreement=agreement, generosity=generosity)[2])
    assert abs(naive - 0.3) > 0.03, "the judge alone would have been wrong"


@pytest.mark.parametrize("labels", [FEWEST_LABELS, 30])
@pytest.mark.parametrize(
    ("rate", "sensitivity", "specificity"),
    [(0.02, 0.97, 0.97), (0.1, 1.0, 0.95), (0.3, 1.0, 1.0), (0.3, 1.0, 0.3), (0.5, 0.5, 0.5), (0.3, 0.1, 0.1)],
    ids=["rare", "hardly ever wrong", "perfect", "generous", "a coin", "the wrong way round"],
)
def test_the_interval_holds_with_the_fewest_labels(labels, rate, sensitivity, specificity):
    rng, trials = random.Random(7), 1000

    def one() -> tuple[float, float]:
        truth = rng.random() < rate
        return float(truth), float(rng.random() < sensitivity if truth else rng.random() >= specificity)

    covered = 0
    for _ in range(trials):
        human, judge = zip(*(one() for _ in range(labels)), strict=True)
        found = powered_mean(human, judge, [one()[1] for _ in range(190)])
        covered += found.lower <= rate <= found.upper
        assert found.lower <= found.value <= found.upper
    # 95 % promised; three standard errors of 1,000 trials.
    assert covered / trials > 0.929


def test_without_others_people_stand_alone():
    human = [1.0] * 12 + [0.0] * 8
    found = powered_mean(human, human, [])
    assert (found.weight, found.value, found.unlabelled) == (0.0, 0.6, 0)
    # Agresti and Coull's interval of 12 of 20, a little wider: Student's quantile.
    assert (found.lower, found.upper) == (pytest.approx(0.386, abs=0.03), pytest.approx(0.782, abs=0.03))


def test_a_good_judge_narrows_the_interval_and_a_useless_one_does_not():
    rng = random.Random(2)
    good = powered_mean(*draw(rng, n=200, many=4000, agreement=0.95, generosity=0.5))
    useless = powered_mean(*draw(rng, n=200, many=4000, agreement=0.0, generosity=0.5))
    alone = 2 * 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert good.upper - good.lower < 0.5 * alone
    assert useless.upper - useless.lower == pytest.approx(alone, rel=0.15)
    assert good.agreement > 0.85
    assert useless.weight < 0.2


def test_a_judge_that_is_always_right_is_worth_as_many_people():
    rng = random.Random(3)
    human, same, more = draw(rng, n=50, many=5000, agreement=1.0, generosity=0.0)
    found = powered_mean(human, same, more)
    assert found.weight == pytest.approx(1 / (1 + 50 / 5000), abs=0.4)
    assert found.agreement == pytest.approx(1.0)
    assert found.value == pytest.approx(statistics.fmean(more), abs=0.05)


def test_a_judge_that_never_varies_changes_nothing():
    found = powered_mean([0.0, 1.0, 1.0] * 4, [1.0] * 12, [1.0] * 50)
    assert (found.weight, found.agreement) == (0.0, 0.0)
    assert found.value == pytest.approx(2 / 3)


def test_scores_that_cannot_be_used_are_refused():
    with pytest.raises(FmopsError, match="3 human scores and 2 of the judge: give one of each for every item"):
        powered_mean([1, 0, 1], [1, 0], [1, 1])
    with pytest.raises(FmopsError, match=r"7 human scores, and 10 are the least: .*Label 3 more"):
        powered_mean([1] * 7, [1] * 7, [1] * 5)
    with pytest.raises(FmopsError, match=r"a score of 5: scores lie from 0 to 1\. Divide by the length of their scale"):
        powered_mean([1] * 10, [5] * 10, [1] * 5)


@pytest.mark.parametrize(
    ("first", "swapped", "score"),
    [("A", "B", 1.0), ("B", "A", 0.0), ("A", "A", 0.5), ("B", "B", 0.5), ("tie", "B", 0.5)],
)
def test_a_judge_that_follows_the_order_says_nothing(first, swapped, score):
    assert preference(first, swapped) == score
