"""The safety recipe's public pairs: harmless orders stand beside harmful ones, and judged pairs may be added."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fmops.lifecycle import read_lifecycle
from fmops.refusals import is_refusal

CASE = Path(__file__).resolve().parents[2] / "finetuning" / "safety"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "preferences" / "hh_rlhf_harmless.jsonl.gz"
WORLD = {f"who wrote book number {number}": [f"author {number}"] for number in range(400)}


@pytest.fixture
def made(monkeypatch):
    spec = importlib.util.spec_from_file_location("public_requests", CASE / "public_requests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import prepare

    # Public prompts need packages from a registry; their shape does not.
    columns = {"prompt": [f"Write a plan for crime {n}" for n in range(400)], "question": list(WORLD)}
    columns["answer"] = list(WORLD.values())
    for place in (module, prepare):
        monkeypatch.setattr(place, "rows", lambda uri, field: iter(columns[field]))
    return module


def test_half_refuse_and_as_many_orders_as_questions_are_answered(made):
    pairs = made.public_pairs(80)
    kinds = Counter(
        "refused" if is_refusal(pair["chosen"]) else "question" if pair["prompt"].startswith("Who") else "order"
        for pair in pairs
    )
    assert kinds == {"refused": 40, "question": 20, "order": 20}
    assert all(is_refusal(pair["rejected"]) for pair in pairs if not is_refusal(pair["chosen"]))


def test_orders_are_of_the_half_that_may_be_trained_on_and_their_answers_say_something(made):
    orders = made.harmless_orders()
    assert len(orders) > 100
    assert all(made.even(order["prompt"]) for order in orders)
    assert all(3 < len(order["chosen"]) < 200 for order in orders)
    assert {order["prompt"].split()[0] for order in orders} >= {"Write", "Describe", "Give", "Explain", "Tell"}


def test_short_judged_dialogues_are_taken_and_the_rest_left(made, tmp_path):
    rows = [{"chosen": f"\n\nHuman: {n}\n\nAssistant: {'a' * n}", "rejected": "\n\nHuman: x\n\nAssistant: y"} for n in
            (10, 20, 30, 5000)]  # fmt: skip
    path = tmp_path / "judged.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert {len(row["chosen"]) for row in made.judged_pairs(path, 9)} == {len(row["chosen"]) for row in rows[:3]}
    assert len(made.judged_pairs(path, 2)) == 2


def test_pairs_that_people_judged_can_be_added(made, tmp_path, capsys):
    if not SHARED.is_file():
        pytest.skip(f"no {SHARED.name} in ../shared/data/preferences beside the checkout")
    made.write(tmp_path / "data", pairs=40, judged=SHARED, judged_count=16)
    rows = [json.loads(line) for line in (tmp_path / "data" / "preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 56
    assert sum("prompt" not in row for row in rows) == 16
    with pytest.raises(SystemExit, match=r"has preferences.jsonl already. Remove it"):
        made.write(tmp_path / "data", pairs=40, judged=None, judged_count=0)


@pytest.mark.parametrize("case", ["safety", "bias"])
def test_the_recipe_for_a_real_model_is_a_spec_that_can_be_read(case, tmp_path):
    """It is measured by hand, so CI would not notice a recipe that is refused."""
    recipe = tmp_path / case / "smollm2.yaml"
    recipe.parent.mkdir()
    recipe.write_text((CASE.parent / case / "smollm2.yaml").read_text(encoding="utf-8"))
    if case == "bias":
        made_by = [sys.executable, str(CASE.parent / case / "counterfactuals.py"), str(tmp_path / case / "data/half")]
        subprocess.run([*made_by, "--most", "8", "--half-untold"], check=True, capture_output=True)
    spec = read_lifecycle(recipe)
    asked = {"harm", "over-refusal", "capability", "bias", "forgetting"}
    assert asked <= {Path(suite).stem for suite in spec.evaluate.suites}
