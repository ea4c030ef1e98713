"""Ray Train runs the ranks on two nodes; a killed worker takes them along, and the result stays."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra `ray` is not installed", allow_module_level=True)

from ranks_run import a_context, many_together, together
from ray_cluster import two_nodes
from training_run import digests

from fmops.errors import FmopsError

pytestmark = pytest.mark.xdist_group("ray")


def test_a_worker_that_is_killed_leaves_no_trace_in_the_result(tiny_model: Path, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "model").symlink_to(tiny_model)
    many_together([("pretrain", "ddp", tmp_path / "torchrun")], tmp_path / "inputs")
    # Once: the workers that are started again have fewer steps to go.
    monkeypatch.setenv("FMOPS_FAULT", "step:5:SIGKILL:1")
    context = a_context("ddp", launcher="ray")
    with two_nodes():
        together("pretrain", tmp_path / "inputs", tmp_path / "ray", context)
    said = [event["text"] for event in map(json.loads, context.stream.getvalue().splitlines()) if "text" in event]
    assert said == ["going on from checkpoint 4"]
    assert digests(tmp_path / "ray") == digests(tmp_path / "torchrun")


def test_without_a_cluster_it_says_where_it_looked(tiny_model: Path, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "model").symlink_to(tiny_model)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(FmopsError, match=r"no Ray cluster at RAY_ADDRESS '127.0.0.1:1'"):
        together("pretrain", tmp_path / "inputs", tmp_path / "out", a_context(launcher="ray"))
