"""What the gate will be able to see is told before it is measured: a line a family, whatever asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmops.orchestration.detectable import minimum_detectable
from fmops.orchestration.project import Project
from fmops.store import Record, write_atomically

SPEC = """\
name: tiny
base: base
data: {{corpora: {{docs: {{source: docs.txt}}}}}}
pretrain: {{tokens: 1000}}
evaluate: {{suites: [{suites}], limit: {limit}}}
gate: {{primary: []}}
"""


def project_of(folder: Path, suites: str, *, limit: int | str = 20) -> Project:
    path = folder / "lifecycle.yaml"
    path.write_text(SPEC.format(suites=suites, limit=limit), encoding="utf-8")
    return Project.open(path)


def record(kind: str, **artifact) -> Record:
    return Record(
        node=kind, stage=kind, kind=kind, version=1, fingerprint="ab" * 32, digest="d", seed=0, config={}, inputs={},
        files={}, artifact=artifact, created="1",
    )  # fmt: skip


def judge(project: Project, **families: float) -> None:
    """A decision that saw these standard errors."""
    rows = [
        {"family": name, "standard_error": error, "n": 16, "clusters": 16, "difference": 0.1}
        for name, error in families.items()
    ]
    made = record("gate", families=rows, rounds=[], alpha=0.05)
    folder = project.store.folder(made.stage, made.fingerprint)
    folder.mkdir(parents=True)
    write_atomically(folder / "record.json", made.model_dump_json())


@pytest.mark.parametrize("outside", ["garak", "capability"])
def test_suites_that_another_framework_asks_are_no_riddle(tmp_path, outside):
    # Of garak's attacks the benchmarks stage keeps no items.
    project = project_of(tmp_path, f"harm, over-refusal, {outside}")
    pinned = record("benchmarks", items={"harmbench": 20, "do-not-answer": 20, "advbench": 20})
    told = "\n".join(minimum_detectable(project, pinned, alpha=0.01))
    assert "gate: harm with 60 items can show a margin of 0." in told
    if outside == "garak":
        assert "gate: what red-team can show is known after its first evaluation" in told


def test_suites_of_one_family_are_one_line_as_the_gate_pools_them(tmp_path):
    told = minimum_detectable(project_of(tmp_path, "bias, bias-hub", limit=40), None, alpha=0.01)
    (line,) = (line for line in told if line.startswith("gate: "))
    alone = minimum_detectable(project_of(tmp_path, "bias", limit=40), None, alpha=0.01)[0]
    assert int(line.split(" with ")[1].split()[0]) > int(alone.split(" with ")[1].split()[0])


def test_bits_per_byte_go_by_the_spread_that_the_last_round_saw(tmp_path):
    project = project_of(tmp_path, "domain, harm")
    first = minimum_detectable(project, None, alpha=0.01)
    assert "gate: what domain can show is known after its first evaluation; asked is 0.02 bits per byte" in first
    judge(project, domain=0.004)
    told = minimum_detectable(project, None, alpha=0.01)
    # (z₀.₉₉ + z₀.₉) · 0.004, the power shared by two families.
    assert told[0] == "gate: domain with the spread of the last 16 items can show a margin of 0.014, asked is 0.02"
    assert told[-1] == "  (80 % power, 10 % of right-or-wrong items answered otherwise than before)"


def test_without_a_limit_the_pinned_items_count(tmp_path):
    project = project_of(tmp_path, "harm", limit="null")
    pinned = record("benchmarks", items={"harmbench": 30, "do-not-answer": 20, "advbench": 10})
    assert "known after its first evaluation" in minimum_detectable(project, None, alpha=0.01)[0]
    assert minimum_detectable(project, pinned, alpha=0.01)[0].startswith("gate: harm with 60 items can show")
