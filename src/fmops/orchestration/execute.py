"""The stage process: runs one stage here and commits its artifact.

Enters: a project and a node whose inputs are committed. Leaves: the record, written last; reports as JSON lines.
Refuses: damaged inputs, a second writer in the same folder, a fingerprint other than the one asked for.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from fmops.artifacts import Artifact, Source
from fmops.environment import describe_environment
from fmops.errors import (
    DISK_FULL,
    EXIT_FAILED,
    EXIT_MEMORY,
    FmopsError,
    disk_is_full,
    memory_ran_out,
    out_of_memory,
    unknown,
    written_path,
)
from fmops.frameworks import START_RANKS
from fmops.locks import locked
from fmops.orchestration.plan import Step
from fmops.orchestration.project import Project
from fmops.orchestration.ranks import run_in_ranks
from fmops.processes import end_with_parent
from fmops.stage import StageContext
from fmops.store import WORK, Record, content_digest, discard_work, file_entries, utc_now

PARENT = "FMOPS_PARENT_PID"
TRAINING = ("pretrain", "instruct", "align")
MICRO_BATCH_PARTS = "FMOPS_MICRO_BATCH_PARTS"
"""Set by the launcher after the memory ran out."""
PROCESSES = "FMOPS_PROCESSES"
"""Set by the launcher on a cluster, one a device; the spec's number is for this machine."""
LAUNCHER = "FMOPS_LAUNCHER"
"""Set beside it where they are on several nodes; the spec's is for this machine."""
PID_FILE = "FMOPS_PID_FILE"
"""Where the stage process leaves its number, so that whoever stops its pod can tell it first."""


def execute(project: Project, name: str, *, fingerprint: str | None, stream: TextIO) -> Record:
    """Run the stage of node `name` and commit what it makes; a committed artifact is returned as it is.

    Raises:
        FmopsError: no such stage, an input is missing or damaged, or the plan no longer gives `fingerprint`.
    """
    if name not in project.graph.nodes:
        raise unknown("stage", name, project.graph.nodes)
    planner = project.planner()
    step = planner.plan()[name]
    if step.fingerprint is None or step.inputs is None:
        raise FmopsError(f"stage {name!r} cannot run yet: {step.reason}. `fmops run` runs what comes before it.")
    if fingerprint and step.fingerprint != fingerprint:
        raise FmopsError(
            f"stage {name!r} would now make {step.fingerprint[:16]}, not {fingerprint[:16]}: the spec, a source or the "
            "package changed while the run was going on. Start `fmops run` again."
        )
    if step.record:
        return step.record
    out = project.store.folder(step.node.stage.name, step.fingerprint)
    with locked(project.store.root / "locks" / out.name, wait_s=10) as still_mine:
        kept = project.store.made_here(step.node.stage.name, step.fingerprint)
        if kept:
            # Killed, or cut off from the bucket, before it got there.
            return project.store.commit(kept)
        out.mkdir(parents=True, exist_ok=True)
        inputs = {**_artifacts(project, step), **_sources(step, planner.sources)}
        context = StageContext(
            seed=project.spec.seed,
            threads=project.threads,
            processes=int(os.environ.get(PROCESSES, project.spec.runtime.processes)),
            launcher=os.environ.get(LAUNCHER, project.spec.runtime.launcher),
            sharding=project.spec.runtime.sharding,
            precision=project.spec.runtime.precision,
            micro_batch_parts=int(os.environ.get(MICRO_BATCH_PARTS, "1")),
            still_mine=still_mine,
            stream=stream,
        )
        started, cpu = time.monotonic(), _cpu_seconds()
        with _states_kept(project, out, context):
            artifact = _run(step, inputs, out=out, context=context)
        cost = {
            "wall_s": round(time.monotonic() - started, 3),
            "cpu_s": round(_cpu_seconds() - cpu, 3),
            "peak_bytes": _peak_bytes(),
            **{name: float(f"{value:.5g}") for name, value in context.cost.items()},
        }
        still_mine()
        record = _record(project, step, artifact, cost, context.environment)
        record = project.store.commit(record)
        # Only now: a stage killed while it commits still finds its resume state.
        discard_work(out)
    return record


def run_stage_process(spec: Path, name: str, *, workspace: Path | None, fingerprint: str | None) -> int:
    """`fmops stage`: run one stage and report on standard output; returns the exit code.

    Whatever libraries print goes to standard error, so that the reports stay readable by the parent.
    """
    die_with_parent()
    if PID_FILE in os.environ:
        Path(os.environ[PID_FILE]).write_text(str(os.getpid()))
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        record = execute(Project.open(spec, workspace=workspace), name, fingerprint=fingerprint, stream=stream)
    except FmopsError as error:
        return _report_failure(stream, str(error), error.exit_code)
    except Exception as error:
        if memory_ran_out(error):
            return _report_failure(stream, out_of_memory(error), EXIT_MEMORY)
        if not disk_is_full(error):
            raise
        text = DISK_FULL.format(where=written_path(error) or workspace or spec.parent)
        return _report_failure(stream, text, EXIT_FAILED)
    stream.write(json.dumps({"event": "finished", "fingerprint": record.fingerprint, "cost": record.cost}) + "\n")
    stream.flush()
    return 0


def _run(step: Step, inputs: dict[str, Any], *, out: Path, context: StageContext) -> Artifact:
    """Call the stage function, here or in the processes that share it."""
    stage, config = step.node.stage, step.node.config
    alone = getattr(config, "framework", None) in START_RANKS
    if stage.in_ranks and context.processes > 1 and not alone:
        return run_in_ranks(stage.function, config, inputs=inputs, out=out, context=context)
    return stage.load()(config, **inputs, out=out, context=context)


def _states_kept(project: Project, out: Path, context: StageContext) -> AbstractContextManager[None]:
    """With a bucket, training leaves its resume states there: another machine may have to go on."""
    if project.store.shared is None or out.name.partition("-")[0] not in TRAINING:
        return nullcontext()
    from fmops.states import mirrored

    return mirrored(project.store.shared, out.name, out / WORK, report=context.note)


def _artifacts(project: Project, step: Step) -> dict[str, Artifact]:
    """The artifacts that a step's plan names, each read again and compared with its digests."""
    found = {}
    for parameter in step.node.artifacts:
        assert step.inputs is not None
        record = project.store.get(step.inputs[parameter].ref)
        project.store.verify(record)
        found[parameter] = project.store.load(record)
    return found


def _sources(step: Step, sources: Any) -> dict[str, Source]:
    return {parameter: sources[uris] for parameter, uris in step.node.sources.items()}


def _record(project: Project, step: Step, artifact: Artifact, cost: dict[str, float], chosen: dict[str, str]) -> Record:
    assert step.fingerprint is not None
    files = file_entries(artifact.path)
    node = step.node
    return Record(
        node=node.name,
        stage=node.stage.name,
        kind=artifact.kind,
        version=node.stage.version,
        fingerprint=step.fingerprint,
        digest=content_digest(files),
        seed=project.spec.seed,
        config=node.config.model_dump(mode="json"),
        inputs=step.inputs or {},
        files=files,
        artifact=artifact.model_dump(mode="json"),
        environment={**describe_environment(project.spec_path.parent, threads=project.threads), **chosen},
        cost=cost,
        created=utc_now(),
    )


def _peak_bytes() -> float:
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _report_failure(stream: TextIO, text: str, code: int) -> int:
    stream.write(json.dumps({"event": "failed", "error": text, "code": code}) + "\n")
    stream.flush()
    return code


def die_with_parent() -> None:
    """End with the run that started this process: a stage without a parent would write beside the next one.

    The same holds for processes that a library forks here (datatrove starts a few).
    """
    expected = os.environ.get(PARENT)
    if not expected or not sys.platform.startswith("linux"):
        return
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)
    if os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)
