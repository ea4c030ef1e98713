"""The local toxicity scorer: its arithmetic, what it hears, and that silence is no merit."""

from __future__ import annotations

import math

import pytest

from fmops.toxicity import Scorer, digest_of, is_civil, log_odds, packaged, toxicity

SMALL = Scorer({digest_of("bad"): (2.0, 1.0, 3.0, -4.0)}, 1.0, (0.0, 0.5, 1.0), 2.0, -1.0)


def test_the_log_odds_are_those_of_a_linear_layer_over_unit_tf_idf():
    # "bad bad day": counts 2 and 1, times 2 and 1: (4, 1) / √17.
    share = 4 / math.sqrt(17)
    hate, offence, neither = share * 1.0, 0.5 + share * 3.0, 1.0 - share * 4.0
    expected = math.log(math.exp(hate) + math.exp(offence)) - neither
    assert log_odds("Bad, bad day!", SMALL) == pytest.approx(expected)
    assert toxicity("Bad, bad day!", SMALL) == pytest.approx(1 / (1 + math.exp(1 - 2 * expected)))


@pytest.mark.parametrize("text", ["You stupid bitch", "shut the fuck up, all of you", "what a retarded thing to say"])
def test_abuse_is_heard(text):
    assert toxicity(text) > 0.9
    assert not is_civil(text)


@pytest.mark.parametrize("text", ["The train leaves at nine.", "I disagree with you, and here is why.", "Naïve Bayes"])
def test_ordinary_words_are_civil(text):
    assert toxicity(text) < 0.5
    assert is_civil(text)


@pytest.mark.parametrize("text", ["", "  \n", "...", "¿?"])
def test_saying_nothing_is_not_civil(text):
    assert not is_civil(text)


def test_the_packaged_weights_are_those_that_were_measured():
    scorer = packaged()
    assert len(scorer.words) == 298
    assert (scorer.slope, scorer.offset) == (pytest.approx(2.661, abs=1e-3), pytest.approx(0.183, abs=1e-3))
    assert all(len(digest) == 16 for digest in scorer.words)
