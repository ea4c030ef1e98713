"""The ranks of a training as workers of Ray Train, on whichever nodes of a cluster have room.

Enters: a job as `orchestration.ranks` writes it, on a path that all nodes share. Leaves: its reports, line by line.
Refuses: a cluster it cannot reach; Ray's own checkpoints: a stage finds its newest resume state itself.

Measured: after a SIGKILL Ray Train starts the workers again; without a checkpoint reported to it they begin at step 0.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from fmops.adapters import ranks
from fmops.adapters.training_faults import on_sigterm
from fmops.errors import FmopsError

REPORTS = "reports.jsonl"
POLL_S = 0.2
ANSWER_S = 30.0
"""A cluster that is being made takes its time."""
PASSED_ON = ("FMOPS_FAULT", "HF_HUB_OFFLINE")
"""Variables of this process that workers on other nodes need, too."""


def train_on_ray(
    job: Path, *, workers: int, threads: int, restarts: int, run: Callable[..., None], leave: Path,
    on_report: Callable[[str], None],
) -> None:  # fmt: skip
    """Run a job's ranks on the cluster that RAY_ADDRESS names; return once they ended, however they did.

    Args:
        job: written by `write_job`.
        workers: ranks.
        threads: of each; so many CPUs Ray sets aside for it.
        restarts: times that Ray starts all again after one died.
        run: `orchestration.ranks.run_reporting`, called on each worker with job, rank and a file for its reports.
        leave: made when SIGTERM reaches this process; the ranks look for it after each step.
        on_report: called with each report.

    Raises:
        FmopsError: no cluster answers at RAY_ADDRESS.
    """
    reports = job.with_name(REPORTS)
    for path in (reports, leave):
        path.unlink(missing_ok=True)
    variables = {"OMP_NUM_THREADS": str(threads)} | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # After the connection: Ray's own handler would end this process, and Ray then kills the ranks.
    with _connected(variables), on_sigterm(leave.touch), _followed(reports, on_report):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": str(job), "reports": str(reports), "run": run},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=torch.cuda.is_available(), resources_per_worker={"CPU": threads}
            ),
            run_config=RunConfig(
                storage_path=str(job.parent / "ray"), failure_config=FailureConfig(max_failures=restarts)
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            # Why is in the reports, or no rank lived to say it; Ray's own account goes to the log.
            print(error)


def _work(config: dict[str, Any]) -> None:
    """One worker; what failed for a reason is reported and not raised, or Ray would try it again."""
    with Path(config["reports"]).open("a") as reports:
        try:
            config["run"](Path(config["job"]), rank=ranks.rank(), reports=reports)
        except FmopsError:
            return


@contextmanager
def _connected(variables: dict[str, str]) -> Iterator[None]:
    """A connection to the cluster while the block runs, unless there is one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _require_answer(address)
        ray.init(
            address=address, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level=logging.WARNING
        )
    except (OSError, RuntimeError) as error:
        raise FmopsError(
            f"no Ray cluster at RAY_ADDRESS {address!r}: {str(error).splitlines()[0]}. Start one (`ray start --head`), "
            "or set runtime.launcher to torchrun."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself (2.60) would try for many minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()


@contextmanager
def _followed(path: Path, on_report: Callable[[str], None]) -> Iterator[None]:
    """Each whole line that is written to `path` is reported, the last ones before the block ends."""
    done = threading.Event()

    def follow() -> None:
        place, ended = 0, False
        while not ended:
            ended = done.wait(POLL_S)
            text = path.read_text()[place:] if path.is_file() else ""
            whole, newline, _ = text.rpartition("\n")
            for line in whole.splitlines():
                on_report(line)
            place += len(whole) + len(newline)

    thread = threading.Thread(target=follow, name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
