"""What Dagster's web server loads: the spec named by FMOPS_SPEC as assets.

Enters: FMOPS_SPEC; FMOPS_WORKSPACE where the workspace lies elsewhere; on a cluster FMOPS_PLATFORM, a folder that says
which. Leaves: `defs`.
Refuses: to release from the page what the gate did not promote. Without FMOPS_SPEC there is nothing to define.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fmops.errors import FmopsError, GateRejected
from fmops.locks import Busy, locked
from fmops.orchestration.launch import launch_local
from fmops.orchestration.project import Project
from fmops.orchestration.run import Launcher
from fmops.store import Record

SPEC = "FMOPS_SPEC"
WORKSPACE = "FMOPS_WORKSPACE"
PLATFORM = "FMOPS_PLATFORM"


def load(spec: str, workspace: str | None) -> Any:
    """The `dagster.Definitions` of a spec file.

    On a cluster the loop is left out: it watches traces and moves traffic, which lie where `fmops up` runs.
    """
    from fmops.adapters.dagster import definitions

    project = Project.open(Path(spec), workspace=Path(workspace) if workspace else None)
    on_cluster = PLATFORM in os.environ
    return definitions(
        project.graph,
        lambda name: materialise(project, name),
        project.store,
        look=None if on_cluster else lambda: look(project),
        todo=(lambda: todo(project)) if on_cluster else None,
    )


def launcher() -> Launcher:
    """Stages run in processes here, or as jobs of the cluster that this process runs in."""
    if PLATFORM not in os.environ:
        return launch_local
    from fmops.adapters.kubernetes import connect
    from fmops.orchestration.deploy import Platform
    from fmops.orchestration.eks import EksLauncher

    # The image that this is has the spec and what it names by path.
    return EksLauncher(connect(), Platform.read(Path(os.environ[PLATFORM])), baked_in=True)


def todo(project: Project) -> dict[str, str]:
    """What a run would make, in order, and why; empty when all is made."""
    return {
        name: f"{step.reason} ({step.fingerprint[:12]})" if step.fingerprint else step.reason
        for name, step in project.planner().plan().items()
        if step.state in ("run", "waiting")
    }


def look(project: Project) -> list[str]:
    """One look of the loop; another one that runs already does the work."""
    from fmops.orchestration.events import open_view
    from fmops.orchestration.loop import LoopRunner

    with open_view() as view:
        try:
            return LoopRunner(project, view).look()
        except Busy as error:
            return [f"skipped: {error}"]


def materialise(project: Project, name: str) -> Record:
    """Make one node's artifact as `fmops run` would; report, tracker and champion are left to `fmops run`.

    Raises:
        GateRejected: `name` stands behind a gate that did not promote.
        FmopsError: an input is missing, or another run holds the workspace.
    """
    store = project.store
    with locked(store.root / "lock"):
        steps = project.planner().plan()
        step = steps[name]
        gate = steps["gate"].record if "gate" in steps else None
        if gate and gate.artifact["verdict"] != "promote" and name in project.graph.downstream("gate"):
            raise GateRejected(f"the gate says {gate.artifact['verdict']}; {name} is not made. See `fmops show gate`.")
        if step.record:
            return step.record
        if step.fingerprint is None:
            raise FmopsError(f"{name} cannot run: {step.reason}. Materialise that first.")
        log = store.root / "logs" / f"{name}.log"
        return launcher()(project, name, fingerprint=step.fingerprint, log=log, on_event=lambda _: None)


if SPEC in os.environ:
    defs = load(os.environ[SPEC], os.environ.get(WORKSPACE))
