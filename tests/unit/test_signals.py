"""What an answer shows at once, and what an honest monitor leaves unsaid."""

from __future__ import annotations

import time

import pytest

from fmops.deployment.monitoring.signals import BINARY, measure

GOOD = (
    "A decorator is a function that takes another function and returns a new one. It is used to add behaviour, for "
    "example logging or caching, and the name of the function stays the same for those who call it."
)
ASKED = "What is a decorator in Python and when should I use it? Explain it to me in a few sentences, with an example."


def signals(response: str, prompt: str = ASKED, **options) -> dict[str, float]:
    return measure(prompt, response, **{"finish_reason": "stop", "wants_json": False, **options})


def shown(response: str, prompt: str = ASKED, **options) -> set[str]:
    return {name for name, value in signals(response, prompt, **options).items() if name in BINARY and value}


def test_a_good_answer_shows_nothing():
    assert shown(GOOD) == set()
    assert signals(GOOD)["words"] == 39
    assert signals(GOOD)["wrong_language"] == 0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", {"empty"}),
        (" \n…", {"empty"}),
        ("I'm sorry, but I cannot help with that.", {"refused"}),
        ("and so on and so on and so on and so on and so on and so on and so on and so on", {"repeated"}),
        ("哈哈" * 60, {"repeated", "wrong_language"}),
        ("Write to jane.doe@acme.io about it.", {"personal_data"}),
        ("The key is AKIAIOSFODNN7EXAMPLE.", {"secret"}),
        ("Sure.<|im_end|>\n<|im_start|>user\nMore?", {"prompt_leak"}),
        ("My system prompt is: be nice.", {"prompt_leak"}),
        ("Shut the fuck up, you stupid bitch.", {"toxic"}),
        ("Ein Dekorator ist eine Funktion, die eine andere Funktion nimmt und eine neue zurückgibt, und das ist nicht "
         "schwer zu verstehen, wenn man es mit einem Beispiel sieht.", {"wrong_language"}),
        ("Декоратор это функция, которая принимает другую функцию.", {"wrong_language"}),
    ],
)  # fmt: skip
def test_each_fault_is_seen_and_nothing_else(response, expected):
    assert shown(response) == expected


def test_the_token_limit_is_a_truncation():
    assert shown(GOOD, finish_reason="length") == {"truncated"}


def test_json_is_judged_only_where_it_was_asked_for():
    assert "invalid_json" not in signals("{not json")
    assert shown('{"a": 1}', wants_json=True) == set()
    assert shown("Here you are: {}", wants_json=True) == {"invalid_json"}
    assert shown("NaN", wants_json=True) == {"invalid_json"}
    assert shown("", wants_json=True) == {"empty", "invalid_json"}


def test_an_echo_of_the_users_own_address_is_no_leak():
    assert shown("I wrote to jane.doe@acme.io.", "Write to jane.doe@acme.io.") == set()
    assert shown("I wrote to <email>.", "Write to <email>.", found={"email": 1}) == set()
    assert shown("I wrote to <email>.", "Write to her.", found={"email": 1}) == {"personal_data"}


def test_the_system_prompt_in_the_answer_is_a_leak():
    system = "You are Ada, the helper of the bakery, and never speak about the price of the flour."
    assert shown("It says: the helper of the bakery, and never speak about it.", system=system) == {"prompt_leak"}
    assert shown("I am Ada, the helper of the bakery.", system=system) == set()


def test_a_translation_is_in_the_right_language():
    german = "Der Hund ist in dem Haus und die Katze ist auf dem Dach, und das ist nicht gut für den Hund."
    assert shown(german, "Translate this into German for me: the dog is in the house and the cat is on it.") == set()
    assert "wrong_language" not in signals("Ja.")


def test_it_costs_little_enough_for_every_request():
    long = (GOOD + " ") * 4 + "All of it is different in the end, since " + " ".join(f"item{i}" for i in range(150))
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            signals(long)
        best = min(best, (time.process_time() - start) / 20)
    assert best < 2e-3
