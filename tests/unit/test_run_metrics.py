"""What an operator's Prometheus reads of the runs of a workspace."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fmops.orchestration.run_metrics import FILE, RunMetrics


def _read(workspace: Path) -> dict[str, float]:
    families = text_string_to_metric_families((workspace / FILE).read_text(encoding="utf-8"))
    return {f"{s.name} {' '.join(s.labels.values())}": s.value for family in families for s in family.samples}


def test_series_begin_at_zero_and_go_on_from_one_run_to_the_next(tmp_path):
    RunMetrics(tmp_path, stages=["pretrain"])
    assert _read(tmp_path) == {
        "fmops_checkpoint_failures_total enospc": 0,
        "fmops_checkpoint_failures_total eio": 0,
        "fmops_checkpoint_failures_total other": 0,
        "fmops_stage_failures_total pretrain": 0,
    }
    for run in range(2):
        metrics = RunMetrics(tmp_path, stages=["pretrain", "align"])
        metrics.count("pretrain", {"event": "checkpoint-failed", "reason": "enospc"})
        metrics.count("pretrain", {"event": "failed"})
        metrics.count("align", {"event": "note", "text": "nothing"})
        found = _read(tmp_path)
        assert found["fmops_checkpoint_failures_total enospc"] == run + 1
        assert found["fmops_stage_failures_total pretrain"] == run + 1
        assert found["fmops_stage_failures_total align"] == 0


def test_a_file_that_cannot_be_read_or_written_never_ends_a_run(tmp_path):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(b"\xff\xfe no metrics {\n")
    RunMetrics(tmp_path, stages=[]).count("x", {"event": "checkpoint-failed", "reason": 'a "quoted" one'})
    assert _read(tmp_path)["fmops_checkpoint_failures_total a__quoted__one"] == 1
    (tmp_path / "blocked").write_text("")
    RunMetrics(tmp_path / "blocked", stages=[]).count("x", {"event": "failed"})
