"""A judge helps as far as it agrees with people, and misleads nobody when it does not."""

from __future__ import annotations

import random
import statistics

import pytest

from fmops.errors import FmopsError
from fmops.evaluation.judged import powered_mean, preference


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
    # 95 % promised; an asymptotic interval at n = 100, so two points of slack beside the noise of 400 trials.
    assert covered / trials > 0.91
    assert abs(statistics.fmean(each.value for each in found) - 0.3) < 0.01
    naive = statistics.fmean(draw(rng, n=2, many=4000, agreement=agreement, generosity=generosity)[2])
    assert abs(naive - 0.3) > 0.03, "the judge alone would have been wrong"


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
    found = powered_mean([0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0] * 50)
    assert (found.weight, found.agreement) == (0.0, 0.0)
    assert found.value == pytest.approx(2 / 3)


def test_scores_that_do_not_pair_are_refused():
    with pytest.raises(FmopsError, match="3 human scores and 2 of the judge: give one of each for every item"):
        powered_mean([1, 0, 1], [1, 0], [1, 1])
    with pytest.raises(FmopsError, match="1 human scores and 5 more of the judge: two of each are the least"):
        powered_mean([1], [1], [1] * 5)


@pytest.mark.parametrize(
    ("first", "swapped", "score"),
    [("A", "B", 1.0), ("B", "A", 0.0), ("A", "A", 0.5), ("B", "B", 0.5), ("tie", "B", 0.5)],
)
def test_a_judge_that_follows_the_order_says_nothing(first, swapped, score):
    assert preference(first, swapped) == score
