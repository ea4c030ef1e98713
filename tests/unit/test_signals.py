"""What an answer shows at once, and what an honest monitor leaves unsaid."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fmops.deployment.monitoring.signals import BINARY, asks_for_json, measure
from fmops.evaluation.suites import load_suite

GOOD = (
    "A decorator is a function that takes another function and returns a new one. It is used to add behaviour, for "
    "example logging or caching, and the name of the function stays the same for those who call it."
)
ASKED = "What is a decorator in Python and when should I use it? Explain it to me in a few sentences, with an example."


def signals(response: str, prompt: str = ASKED, **options) -> dict[str, float]:
    return measure(prompt, response, **{"finish_reason": "stop", **options})


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
    asked = "Name a river. Answer with JSON only."
    assert "invalid_json" not in signals("{not json")
    assert signals('{"a": 1}', asked)["invalid_json"] == 0
    assert signals('```json\n{"a": 1}\n```', asked)["invalid_json"] == 0
    assert shown("Here you are: {}", asked) == {"invalid_json"}
    assert shown("Here you are: {}", "Name a river.", system="Reply with a JSON object.") == {"invalid_json"}
    assert shown("NaN", asked) == {"invalid_json"}
    assert shown("", asked) == {"empty", "invalid_json"}
    assert "invalid_json" not in signals('{"a": "and so', asked, cut=True)
    assert signals('{"paid with": <card>}', asked, found={"card": 1})["invalid_json"] == 0


def test_the_suites_orders_of_json_are_heard_and_no_other_item_of_theirs_is_one():
    for suite in ("format", "instruction", "red-team"):
        for task in load_suite(suite, root=Path()).tasks.values():
            for item in task.items or ():
                wanted = any("json" in check for check in item.get("checks", ()))
                assert asks_for_json(item["prompt"]) == wanted, item["prompt"]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Return JSON.", True),
        ("Please reply in valid JSON with the keys name and country code.", True),
        ("You are an extractor. Output only a JSON array of strings.", True),
        ("Can you give me the result as JSON?", True),
        ("What is JSON?", False),
        ("Explain how a list is written in JSON.", False),
        ("How do I return JSON from a web server?", False),
        ("Write a function that returns a JSON object.", False),
        ("Give me an example of a JSON document.", False),
        ("What does json.dumps do?", False),
        ("Tell me the history of JSON.", False),
    ],
)
def test_an_order_of_json_is_told_from_a_question_about_it(text, asked):
    assert asks_for_json(text) is asked


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
