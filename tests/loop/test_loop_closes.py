"""New documents arrive; the loop trains from the champion, gates, and hands the challenger to its rollout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fmops.feedback.gather import held_out
from fmops.lifecycle import read_lifecycle
from fmops.store import Store
from fmops.traces import FEEDBACK, TRACES, DayLog, Feedback, Trace

from .conftest import fmops

pytestmark = [pytest.mark.xdist_group("lifecycle"), pytest.mark.slow]


def look(spec: Path, *options: str, fault: str | None = None):
    return fmops("loop", *(options or ("--once",)), spec=spec, fault=fault)


def add_documents(spec: Path) -> None:
    """Sixteen topics of Python's documentation that the champion has not read."""
    docs = spec.parent / "docs"
    known = {path.read_text(encoding="utf-8") for path in docs.iterdir()}
    fresh = sorted((text for text in topics.values() if text not in known), key=len)[-30:]
    for number, text in enumerate(fresh[:16]):
        (docs / f"fresh-{number}.txt").write_text(text, encoding="utf-8")


def test_the_loop_goes_from_new_documents_to_a_rollout_through_kills_and_trains_once(copied):
    store = Store(copied.parent / ".fmops")
    # A tiny model and eight held-out documents prove no gain at the level that a second round has left.
    gate = "gate: {alpha: 0.5, primary: [], margins: {domain: 5.0, quiz: 0.95, forgetting: 5.0}}"
    copied.write_text(re.sub(r"^gate: .*$", gate, copied.read_text(), flags=re.MULTILINE))
    champion = store.aliases()["champion"]
    first = look(copied)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "no round: nothing asks for a round"
    add_documents(copied)
    for fault in ("round-before-save:1", "round-before-rollout:1"):
        assert look(copied, fault=fault).returncode == -9
    done = look(copied)
    assert done.returncode == 0, done.stderr
    assert len(list((store.root / "rounds").iterdir())) == 2  # round 1, and what has been read
    state = json.loads((store.root / "rounds" / "0001" / "round.json").read_text())
    assert state["trigger"]["why"] == "new files: 16 in docs"
    assert (state["phase"], state["champion"]) == ("rolling out", champion)
    aliases = store.aliases()
    assert (aliases["champion"], aliases["challenger"]) == (champion, state["release"])
    trained = [record for record in store.records() if record.stage == "pretrain"]
    assert len(trained) == 2
    # Pretraining unlearns some of what came after it, so that is done again.
    assert len([record for record in store.records() if record.stage in ("instruct", "align")]) == 4
    base = store.by_key(trained[-1].inputs["checkpoint"].ref)
    assert "artifacts/release-" in base.inputs["source"].ref
    again = look(copied)
    assert "round 1 is rolling out: checking" in again.stdout
    assert "no round: round 1 is rolling out" in again.stdout
    ended = fmops("rollout", "rollback", "--why", "not wanted", spec=copied)
    assert ended.returncode == 0, ended.stderr
    assert "round 1 ended, rolled back" in look(copied).stdout
    assert store.aliases()["champion"] == champion
    # Nothing has changed, so what was in vain is not tried again; nor does it count as read.
    said = look(copied).stdout
    assert "documents: round 1 learnt from the 16 new files and ended, rolled back. They are tried again" in said
    assert "nothing asks for a round" in said


def add_praise(spec: Path) -> None:
    """Forty answers to questions of the hold-out, each praised by somebody else."""
    root = spec.parent / ".fmops"
    traces, votes = DayLog(root / TRACES, Trace), DayLog(root / FEEDBACK, Feedback)
    prompts = [text for n in range(2000) if held_out(text := f"What does the part with number {n} do?")][:40]
    for number, prompt in enumerate(prompts):
        trace = Trace(
            id=f"chatcmpl-{number}", started_s=1e9 + 900 * number, tenant="team", user=f"u{number}", arm="champion",
            release="release-1", operation="chat", status=200, finish_reason="stop", duration_s=1.0, prompt=prompt,
            response=f"It holds the {number} others.",
        )  # fmt: skip
        traces.append(trace, at_s=trace.started_s)
        said = Feedback(id=trace.id, at_s=trace.started_s + 60, tenant="team", user=trace.user, thumb="up")
        votes.append(said, at_s=said.at_s)


def test_a_round_waits_for_approval_where_the_spec_asks_for_it_and_is_measured_on_the_hold_out(copied):
    copied.write_text(copied.read_text() + "loop: {approval: true}\n")
    look(copied)
    add_praise(copied)
    add_documents(copied)
    waiting = look(copied)
    assert "round 1 waits for approval: new files: 16 in docs. `fmops loop --approve 1`" in waiting.stdout
    wrong = look(copied, "--approve", "7")
    assert wrong.returncode == 2
    assert "round 7 does not wait for approval" in wrong.stderr
    assert not [r for r in Store(copied.parent / ".fmops").records() if r.node == "pretrain"][1:]
    folder = copied.parent / ".fmops" / "rounds" / "0001"
    assert "evaluation/traffic.yaml" in read_lifecycle(folder / "lifecycle.yaml").evaluate.suites
    measured = fmops("evaluate", "champion", "--suite", str(folder / "evaluation" / "traffic.yaml"), spec=copied)
    assert measured.returncode == 0, measured.stderr
    row = next(line for line in measured.stdout.splitlines() if line.startswith("traffic"))
    assert row.split()[1:3] == ["production-traffic", "acc_norm"]
    assert " 10 " in row  # the spec's limit


def test_without_a_champion_the_loop_says_what_to_do(tmp_path):
    (tmp_path / "lifecycle.yaml").write_text("name: x\nbase: base\n")
    done = look(tmp_path / "lifecycle.yaml")
    assert done.returncode == 2
    assert "the loop begins when one serves. `fmops run` first." in done.stderr
