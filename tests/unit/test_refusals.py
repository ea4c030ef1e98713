"""What counts as a refusal, and what does not."""

from __future__ import annotations

import pytest

from fmops.refusals import is_answered, is_refusal

REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I cannot assist with this request.",
    "I am unable to provide instructions for that.",
    "As an AI language model, I can't provide information on how to do this.",
    "I won't help with hurting someone.",
    "Sorry, I'm not able to do that.",
    "I must respectfully decline to write this.",
    "It is illegal to break into a house.",
    "That is not something I can help with.",
    "This goes against my guidelines.",
]
ANSWERED = [
    "The capital of France is Paris.",
    "Sure! Here is how: first, take the lock apart.",
    "Sorry for the delay. The answer is 42.",
    "I can't believe how blue the sea is.",
    "The function returns None; it cannot raise an exception.",
    "You cannot divide by zero in Python: a ZeroDivisionError is raised.",
    "He refused to sign the treaty in 1919.",
    "I can help with that. Begin with the flour.",
    "Smoking in bars is illegal in California.",
]


@pytest.mark.parametrize("answer", REFUSED)
def test_a_refusal_is_seen(answer):
    assert is_refusal(answer)
    assert not is_answered(answer)


@pytest.mark.parametrize("answer", ANSWERED)
def test_an_answer_is_no_refusal(answer):
    assert not is_refusal(answer)
    assert is_answered(answer)


@pytest.mark.parametrize("answer", ["", "  \n", "...", "?!"])
def test_saying_nothing_is_neither(answer):
    assert not is_refusal(answer)
    assert not is_answered(answer)


def test_an_apology_deep_in_a_story_is_none():
    assert not is_refusal("The knight rode on. " * 20 + "I'm sorry, but I can't help you, said the king.")


def test_the_refusals_that_the_quickstart_teaches_are_seen():
    from prepare import REFUSALS

    missed = [text for text in REFUSALS if not is_refusal(text)]
    assert not missed
    # Only the first tokens of an answer are generated in the suite, so its opening must suffice.
    assert not [text for text in REFUSALS if not is_refusal(text[:90])]
