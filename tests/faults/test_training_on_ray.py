"""Ray Train runs the ranks on two nodes; a killed worker takes them along, and the result stays."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra `ray` is not installed", allow_module_level=True)

from ranks_run import CASES, a_context, many_together, together
from ray_cluster import two_nodes
from training_run import digests

from fmops.adapters.resume import MANIFEST
from fmops.errors import FmopsError, Terminated

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with two_nodes():
        yield


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_leaves_no_trace_in_the_result(tiny_model: Path, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "model").symlink_to(tiny_model)
    many_together([("pretrain", "ddp", tmp_path / "torchrun")], tmp_path / "inputs")
    # Once: the workers that are started again have fewer steps to go.
    monkeypatch.setenv("FMOPS_FAULT", "step:5:SIGKILL:1")
    context = a_context("ddp", launcher="ray")
    together("pretrain", tmp_path / "inputs", tmp_path / "ray", context)
    said = [event["text"] for event in map(json.loads, context.stream.getvalue().splitlines()) if "text" in event]
    assert said == ["going on from checkpoint 4"]
    assert digests(tmp_path / "ray") == digests(tmp_path / "torchrun")


class TellsToLeave(io.StringIO):
    """Reports; the first progress that is reported brings SIGTERM to this process."""

    told = False

    def write(self, text: str) -> int:
        if '"progress"' in text and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


@pytest.mark.usefixtures("cluster")
def test_told_to_leave_it_writes_a_resume_state_and_ends_with_143(tiny_model: Path, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "model").symlink_to(tiny_model)
    long = CASES["pretrain"].model_copy(update={"tokens": 400_000, "checkpoints": 1})
    monkeypatch.setitem(CASES, "pretrain", long)
    context = a_context("ddp", launcher="ray")
    context.stream = TellsToLeave()
    with pytest.raises(Terminated, match=r"told to leave \(SIGTERM\) after step \d+ of") as error:
        together("pretrain", tmp_path / "inputs", tmp_path / "ray", context)
    assert error.value.exit_code == 128 + signal.SIGTERM
    step = re.findall(r"after step (\d+)", str(error.value))[0]
    assert (tmp_path / "ray" / ".work" / f"checkpoint-{step}" / MANIFEST).is_file()


def test_without_a_cluster_it_says_where_it_looked(tiny_model: Path, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "model").symlink_to(tiny_model)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(FmopsError, match=r"no Ray cluster at RAY_ADDRESS '127.0.0.1:1'"):
        together("pretrain", tmp_path / "inputs", tmp_path / "out", a_context(launcher="ray"))
