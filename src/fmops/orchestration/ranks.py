"""A stage in several processes that train together, started by torchrun or by Ray Train.

Enters: a stage function, its config, inputs and context. Leaves: its artifact, written by the first rank.
Refuses: to start again what failed for a reason; a job whose processes die more than three times.

The stage process is their parent and holds the lock; each rank calls the very function that one process would call.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel

from fmops.artifacts import Artifact
from fmops.errors import (
    EXIT_FAILED,
    EXIT_MEMORY,
    FmopsError,
    OutOfMemory,
    StageFailed,
    Terminated,
    memory_ran_out,
    out_of_memory,
)
from fmops.orchestration.watchdog import memory_kills
from fmops.processes import end_with_parent
from fmops.stage import StageContext

RESTARTS = 3
"""Times that a job is started again after a process of it died."""
JOB = "ranks.json"
_ENDINGS = {kind.exit_code: kind for kind in (StageFailed, OutOfMemory, Terminated)}


def run_in_ranks(
    function: str, config: BaseModel, *, inputs: Mapping[str, BaseModel], out: Path, context: StageContext
) -> Artifact:
    """Run `module:function` in `context.processes` processes and return the first one's artifact.

    A process that is killed takes the others along: all start again and go on from the newest resume state.

    Raises:
        FmopsError: as the function raises it; StageFailed when processes died more than `RESTARTS` times.
        Terminated: by SIGTERM, whether the processes train already or only start.
    """
    job = write_job(function, config, inputs=inputs, out=out, context=context)
    if context.launcher == "ray":
        return _on_ray(job, context=context)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(context.processes),
        "-m", "fmops.orchestration.ranks", str(job),
    ]  # fmt: skip
    environment = {**os.environ, "FMOPS_PARENT_PID": ""}
    kills = memory_kills()
    for attempt in range(RESTARTS + 1):
        events = _follow(command, environment=environment, context=context)
        made = _artifact_of(events, context=context)
        if made:
            return made
        if memory_kills() > kills:
            raise OutOfMemory(f"one of {context.processes} training processes was killed for want of memory.")
        if attempt < RESTARTS:
            context.note(
                f"one of {context.processes} training processes died; all start again from the newest resume state"
            )
        # What a test asked for has happened.
        environment.pop("FMOPS_FAULT", None)
    raise _died(context)


def _on_ray(job: Path, *, context: StageContext) -> Artifact:
    """The same ranks as workers of Ray Train, which starts them again itself."""
    from fmops.adapters.ray_train import train_on_ray

    events: dict[str, Any] = {}
    train_on_ray(
        job,
        workers=context.processes,
        threads=context.threads,
        restarts=RESTARTS,
        run=run_reporting,
        leave=leave_file(job),
        on_report=lambda line: _take(line, events, context=context),
    )
    made = _artifact_of(events, context=context)
    if made:
        return made
    raise _died(context)


def _died(context: StageContext) -> StageFailed:
    return StageFailed(
        f"one of {context.processes} training processes died, {RESTARTS + 1} times. The log says which; "
        "runtime.processes 1 trains in one."
    )


def _artifact_of(events: dict[str, Any], *, context: StageContext) -> Artifact | None:
    """What the ranks' endings say: the artifact, the error that is raised, or neither."""
    if "failed" in events:
        failure = events["failed"]
        raise _ENDINGS.get(failure["code"], FmopsError)(failure["error"])
    if "finished" not in events:
        return None
    context.cost |= events["finished"]["cost"]
    context.environment |= events["finished"]["environment"]
    artifact: Artifact = restored(events["finished"]["artifact"])
    return artifact


def _take(line: str, endings: dict[str, Any], *, context: StageContext) -> None:
    """Pass a rank's report on, or keep it where it says how the job ended."""
    event = json.loads(line)
    if event["event"] in ("failed", "finished"):
        # The first failure is the cause; that of a rank left alone follows from it.
        endings.setdefault(event["event"], event)
        return
    context.stream.write(line.rstrip("\n") + "\n")
    context.stream.flush()


def _follow(command: list[str], *, environment: dict[str, str], context: StageContext) -> dict[str, Any]:
    """Start torchrun, pass its ranks' reports on, return their endings by kind once it is gone.

    Raises:
        Terminated: SIGTERM reached this process, and no rank had begun to train or lived to say more.
    """
    endings: dict[str, Any] = {}
    told: list[int] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=end_with_parent
    ) as torchrun:

        def leave(*_: object) -> None:
            told.append(1)
            torchrun.terminate()

        before = signal.signal(signal.SIGTERM, leave)
        try:
            assert torchrun.stdout is not None
            for line in torchrun.stdout:
                _take(line, endings, context=context)
        except BaseException:
            torchrun.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if told and not endings:
        raise Terminated("told to leave (SIGTERM). Run again to go on from the newest resume state.")
    return endings


def write_job(
    function: str, config: BaseModel, *, inputs: Mapping[str, BaseModel], out: Path, context: StageContext
) -> Path:
    """What each rank needs to call the stage function, as JSON under `out/.work`."""
    job = {
        "function": function,
        "config": stored(config),
        "inputs": {name: stored(value) for name, value in inputs.items()},
        "out": str(out.resolve()),
        "context": {
            "seed": context.seed,
            "threads": context.threads,
            "processes": context.processes,
            "sharding": context.sharding,
            "precision": context.precision,
            "micro_batch_parts": context.micro_batch_parts,
            "launcher": context.launcher,
        },
    }
    path = out / ".work" / JOB
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(job))
    return path


def leave_file(job: Path) -> Path:
    """It is there once the ranks that Ray started are to leave: no signal reaches them."""
    return job.with_name("leave")


def stored(value: BaseModel) -> dict[str, Any]:
    """A config, artifact or source as JSON, its paths on this machine included."""
    kind = type(value)
    return {"type": f"{kind.__module__}:{kind.__qualname__}", "value": _with_paths(value)}


def _with_paths(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _with_paths(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple | list):
        return [_with_paths(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_paths(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def restored(document: dict[str, Any]) -> Any:
    """What `stored` stored."""
    kind = _named(document["type"])
    return kind.model_validate(document["value"])


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def run_rank(job: Path, *, rank: int, reports: TextIO) -> None:
    """What each process does: call the stage function, report. `reports` is heard by who started the job.

    Ranks but the first say nothing but why they fail. What their stage function writes goes to a folder that ends with
    the resume states, which all of them share.
    """
    told = json.loads(job.read_text())
    out = Path(told["out"])
    with open(os.devnull, "w") as silent:
        context = StageContext(**told["context"], stream=silent if rank else reports)
        if rank == 0 and context.launcher == "ray":
            context.told_to_leave = leave_file(job).exists
        if rank:
            out = out / ".work" / f"rank-{rank}"
            out.mkdir(exist_ok=True)
            if not (out / ".work").is_symlink():
                (out / ".work").symlink_to("..", target_is_directory=True)
        inputs = {name: restored(value) for name, value in told["inputs"].items()}
        artifact = _named(told["function"])(restored(told["config"]), **inputs, out=out, context=context)
    if rank == 0:
        finished = {"artifact": stored(artifact), "cost": context.cost, "environment": context.environment}
        _report(reports, {"event": "finished", **finished})


def run_reporting(job: Path, *, rank: int, reports: TextIO) -> None:
    """`run_rank`, which also reports why it failed; the error goes on."""
    with failure_reported(reports):
        run_rank(job, rank=rank, reports=reports)


@contextmanager
def failure_reported(reports: TextIO) -> Iterator[None]:
    """Say why a rank ends, unless it ends because another one did; the error goes on."""
    try:
        yield
    except FmopsError as error:
        _report(reports, {"event": "failed", "error": str(error), "code": error.exit_code})
        raise
    except Exception as error:
        from fmops.adapters.ranks import lost_another

        if memory_ran_out(error):
            _report(reports, {"event": "failed", "error": out_of_memory(error), "code": EXIT_MEMORY})
        elif not lost_another(error):
            text = f"a training process ended by {type(error).__name__}: {error}. The log has more."
            _report(reports, {"event": "failed", "error": text, "code": EXIT_FAILED})
        raise


def _report(reports: TextIO, event: dict[str, Any]) -> None:
    reports.write(json.dumps(event) + "\n")
    reports.flush()


def main(job: Path) -> None:
    """One rank, as torchrun starts it."""
    from fmops.adapters import ranks

    end_with_parent()
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with failure_reported(reports), ranks.joined():
        run_rank(job, rank=ranks.rank(), reports=reports)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
