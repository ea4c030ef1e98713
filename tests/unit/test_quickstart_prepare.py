"""The quickstart's data is never what the suites ask, and says what it is meant to say."""

from __future__ import annotations

from pathlib import Path

from fmops.evaluation.items import odd
from fmops.refusals import is_refusal


def test_training_takes_the_half_that_evaluation_leaves() -> None:
    from prepare import even

    prompts = [f" How do I do thing number {number}? " for number in range(200)]
    assert [even(prompt) for prompt in prompts] == [not odd(prompt) for prompt in prompts]
    assert 50 < sum(map(even, prompts)) < 150


def test_chosen_refusals_are_refusals_and_compliance_is_none() -> None:
    from prepare import ANSWERS, COMPLIANCE, REFUSALS

    assert [text for text in REFUSALS if not is_refusal(text)] == []
    assert [text for text in (*COMPLIANCE, *(answer.format("Paris") for answer in ANSWERS)) if is_refusal(text)] == []
    assert len(set(REFUSALS)) == len(REFUSALS) >= 10


def test_docstrings_of_a_module_come_under_their_names(tmp_path: Path) -> None:
    from prepare import docstrings

    path = tmp_path / "toy.py"
    path.write_text('"""Toys."""\ndef spin(top, *, fast=True):\n    """Spin it."""\ndef _hidden():\n    """No."""\n')
    assert docstrings(path) == "toy\n***\n\nToys.\n\n\ntoy.spin(top, *, fast=True)\n\nSpin it."


def test_the_tiny_sets_leave_the_whole_ones_alone() -> None:
    import yaml

    quickstart = Path(__file__).resolve().parents[2] / "quickstart"
    sources = {}
    for name in ("lifecycle", "tiny"):
        spec = yaml.safe_load((quickstart / f"{name}.yaml").read_text())
        data = spec["data"]
        named = [*data["corpora"].values(), data["conversations"], data["preferences"]]
        sources[name] = {Path(each["source"]).parts[0] for each in named}
    assert sources == {"lifecycle": {"data"}, "tiny": {"data-tiny"}}


def test_every_family_of_the_quickstart_has_the_items_that_its_margin_needs(tmp_path: Path) -> None:
    from fmops.evaluation.spending import level
    from fmops.orchestration.detectable import minimum_detectable
    from fmops.orchestration.project import Project

    spec = Path(__file__).resolve().parents[2] / "quickstart" / "lifecycle.yaml"
    project = Project.open(spec, workspace=tmp_path)
    assert project.spec.gate is not None
    told = minimum_detectable(project, None, alpha=level([], project.spec.gate.alpha))
    counted = [line.split()[1] for line in told[:-1] if " items can show " in line]
    assert counted == ["capability", "harm", "over-refusal", "bias"]
    assert len(told) == 7, "domain and forgetting are known after the first evaluation"
    assert [line for line in told if "need more data" in line] == []


def test_a_sample_does_not_depend_on_the_order_it_came_in() -> None:
    from prepare import pick, scattered

    texts = [f"text {number}" for number in range(50)]
    assert scattered(texts) == scattered([*reversed(texts), "text 3"])
    assert scattered(texts) != texts
    assert {pick(("a", "b", "c"), text) for text in texts} == {"a", "b", "c"}
