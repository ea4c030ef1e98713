"""The bias recipe's pairs: exchange the groups, and the data is the same; what is asked is never trained on."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from fmops.evaluation.suites import load_suite

CASE = Path(__file__).resolve().parents[2] / "finetuning" / "bias"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("counterfactuals", CASE / "counterfactuals.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def test_every_pair_has_a_twin_with_the_groups_exchanged(made):
    pairs = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in made.pairs()}

    def of(scene, a: str, b: str) -> set[tuple[str, ...]]:
        prompts = {made.ask(scene, a, b, who=who) for who in (None, a, b)}
        return {pair for pair in pairs if pair[0] in prompts}

    for scene in (scene for scene in made.SCENES if scene.trained):
        for a, b in made.couples():
            assert len(of(scene, a, b)) == 3
            assert {tuple(exchanged(text, a, b) for text in pair) for pair in of(scene, a, b)} == of(scene, b, a)


def exchanged(text: str, a: str, b: str) -> str:
    """The text with the two people exchanged, each with the capital letter of the other's place."""

    def other(found: re.Match[str]) -> str:
        name = b if found[0].lower() == a.lower() else a
        return name[0].upper() + name[1:] if found[0][0].isupper() else name

    return re.sub(rf"\b({a}|{b})\b", other, text, flags=re.IGNORECASE)


def test_neither_a_group_nor_not_knowing_pays_by_itself(made):
    pairs = list(made.pairs())
    unknown = sum(pair["chosen"] in made.UNKNOWN for pair in pairs)
    assert unknown == sum(pair["rejected"] in made.UNKNOWN for pair in pairs)
    for people in made.GROUPS.values():
        for person in people:
            answer = f"{made.capitalised(person)}."
            chosen = sum(pair["chosen"] == answer for pair in pairs)
            assert chosen == sum(pair["rejected"] == answer for pair in pairs) > 0


def test_with_half_untold_as_many_pairs_prefer_not_knowing_as_a_name_and_still_no_group_pays(made, tmp_path):
    pairs = list(made.pairs(half_untold=True))
    assert sum(pair["chosen"] in made.UNKNOWN for pair in pairs) == len(pairs) / 2
    for people in made.GROUPS.values():
        answers = [f"{made.capitalised(person)}." for person in people]
        for kind in ("chosen", "rejected"):
            assert len({sum(pair[kind] == answer for pair in pairs) for answer in answers}) == 1, (people, kind)
    made.write(tmp_path / "data", most=300, half_untold=True)
    kept = (tmp_path / "data" / "preferences.jsonl").read_text().splitlines()
    assert len(kept) % 4 == 0
    assert 2 * sum(json.loads(line)["chosen"] in made.UNKNOWN for line in kept) == len(kept)


def test_no_scene_is_both_learnt_and_asked(made):
    asked = {question["question"] for told in (True, False) for question in made.questions(told=told)}
    assert not asked & {pair["prompt"] for pair in made.pairs()}
    assert {scene.trained for scene in made.SCENES} == {True, False}


def test_the_folder_holds_a_suite_that_loads_and_whole_scenes(made, tmp_path, capsys):
    made.write(tmp_path / "data", most=300)
    pairs = [json.loads(line) for line in (tmp_path / "data" / "preferences.jsonl").read_text().splitlines()]
    assert len(pairs) % 3 == 0
    assert 200 < len(pairs) <= 400
    suite = load_suite("data/scenes.yaml", root=tmp_path)
    assert set(suite.tasks) == {"untold", "told"}
    with pytest.raises(SystemExit, match=r"has preferences.jsonl already. Remove it"):
        made.write(tmp_path / "data")
