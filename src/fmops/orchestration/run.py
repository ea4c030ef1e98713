"""One run: everything that is not done yet, in order, once.

Enters: a project. Leaves: artifacts, the champion alias, events, a report, MLflow and Dagster rows.
Refuses: a second run in the same workspace, and to release what the gate did not promote.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from fmops.artifacts import Judged
from fmops.errors import FmopsError, GateRejected, NeedMoreData
from fmops.faults import fault_site
from fmops.locks import locked
from fmops.orchestration.detectable import told_before
from fmops.orchestration.events import EventLog, View
from fmops.orchestration.fork_server import ForkServer
from fmops.orchestration.launch import Event, launch_local
from fmops.orchestration.plan import Planner, Step
from fmops.orchestration.project import Project
from fmops.orchestration.run_metrics import RunMetrics
from fmops.orchestration.signatures import sign_release
from fmops.orchestration.summary import summarise
from fmops.sources import remember
from fmops.store import Record, Store, discard_work, utc_now, write_atomically

Alias = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    steps: dict[str, Step]
    folder: Path | None
    """The run's folder; None when nothing was to be done."""
    champion: str | None
    """The release that the alias points at now."""
    report: Path | None = None
    alias: Alias = "champion"

    @property
    def executed(self) -> bool:
        return self.folder is not None


class Launcher(Protocol):
    """Runs one node somewhere, and returns its committed record. It may be killed and started again at any point."""

    def __call__(
        self, project: Project, name: str, *, fingerprint: str, log: Path, on_event: Callable[[Event], None]
    ) -> Record: ...


def run(project: Project, view: View, *, alias: Alias = "champion", launch: Launcher | None = None) -> Outcome:
    """Bring the workspace to what the spec says.

    Args:
        alias: what a promoted release becomes; a `challenger` still has to win its rollout.
        launch: where stages run, as jobs of a cluster, say. Left out: in processes here.

    Raises:
        GateRejected, NeedMoreData: the gate did not promote; its reasons are in the message. Nothing is released.
        FmopsError: a source, a stage or the lock; everything finished is kept.
    """
    store = project.store
    _refuse_another_lifecycle(project)
    with locked(store.root / "lock"):
        planner = project.planner(report=lambda text: view.show("sources", {"event": "note", "text": text}))
        steps = planner.plan(on_damage=partial(_set_aside, store, view))
        for step in steps.values():
            if step.record:
                discard_work(store.folder(step.record.stage, step.record.fingerprint))
        todo = [name for name, step in steps.items() if step.state in ("run", "waiting")]
        if todo:
            with _here() if launch is None else nullcontext(launch) as launcher:
                return _Run(project, planner, steps, view, launcher, alias).go(todo)
        _raise_unless_promoted(steps, None)
        # A kill between the release's commit and the move of the alias is made good here.
        champion = _promote(project, steps, alias, expected=store.aliases().get(alias), why="release was waiting")
        return Outcome(steps=steps, folder=None, champion=champion, alias=alias)


@contextmanager
def _here() -> Iterator[Launcher]:
    """Stages in processes of this machine, which import once what they share where that can be had."""
    if sys.platform != "linux":
        yield launch_local
        return
    with ForkServer() as server:
        yield partial(launch_local, start=server.start)


@dataclass
class _Run:
    """State of one run while it lasts."""

    project: Project
    planner: Planner
    steps: dict[str, Step]
    view: View
    launch: Launcher
    alias: Alias = "champion"
    folder: Path = field(init=False)
    log: EventLog = field(init=False)
    metrics: RunMetrics = field(init=False)
    told: bool = False
    """Whether it was said what the gate can show."""

    def go(self, todo: list[str]) -> Outcome:
        store = self.project.store
        self.folder = store.runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 0xFFFF:04x}"
        self.log = EventLog(self.folder, self.view)
        self.metrics = RunMetrics(store.root, stages=self.steps)
        champion = store.aliases().get(self.alias)
        started = {
            "spec": self.project.spec_path.name,
            "name": self.project.spec.name,
            "text": self.project.spec_path.read_text(encoding="utf-8"),
            "command": shlex.join(["fmops", *sys.argv[1:]]),
            "started": utc_now(),
            "champion": champion,
        }
        write_atomically(self.folder / "run.json", json.dumps(started, indent=1) + "\n")
        self.log.add("run", "run-started", todo=todo)
        for name, step in self.steps.items():
            self.log.add(name, "planned", state=step.state, reason=step.reason, fingerprint=step.fingerprint)
        error: BaseException | None = None
        try:
            self._materialise(todo)
            _raise_unless_promoted(self.steps, self.folder)
            champion = _promote(self.project, self.steps, self.alias, expected=champion, why=f"run {self.folder.name}")
        except BaseException as caught:
            error = caught
            raise
        finally:
            ending = (str(error) or type(error).__name__) if error else None
            self.log.add("run", "run-finished", error=ending, champion=champion)
            self.log.close()
            stopped = isinstance(error, KeyboardInterrupt)
            # Who stops a run waits for it: `fmops ui` fills the tracker from the records later.
            report = self._record_run(tracked=not stopped)
            if not stopped:
                self._look_again()
        return Outcome(self.steps, self.folder, champion, report, self.alias)

    def _materialise(self, todo: list[str]) -> None:
        from fmops.adapters.dagster import run_in_process

        run_in_process(
            self.project.graph, self.execute, dagster_home=self.project.store.root / "dagster", selection=todo
        )

    def execute(self, name: str) -> Record:
        """Run one node, or find that its content is there already; called in the graph's order."""
        self._tell_before()
        on_damage = partial(_set_aside, self.project.store, self.view)
        step = self.planner.step(self.project.graph.nodes[name], self.steps, on_damage=on_damage)
        if step.record:
            self.log.add(name, "cached", fingerprint=step.record.fingerprint)
            self.steps[name] = step
            return step.record
        if step.fingerprint is None:
            raise FmopsError(f"{name} cannot run: {step.reason}.")
        self.log.add(name, "started", fingerprint=step.fingerprint)
        try:
            record = self.launch(
                self.project,
                name,
                fingerprint=step.fingerprint,
                log=self.folder / f"{name}.log",
                on_event=lambda event: self._forward(name, event),
            )
        except FmopsError as error:
            self.log.add(name, "failed", error=str(error))
            self.metrics.count(name, {"event": "failed"})
            raise
        fault_site(f"run-after-{name}")
        self.log.add(name, "finished", fingerprint=record.fingerprint, cost=record.cost, summary=summarise(record))
        if record.kind == "release" and record.key in self.project.store.aliases().values():
            # Damaged, and made again under its name: its record is another one than was signed.
            sign_release(self.project.store, record)
        self.steps[name] = Step(
            node=step.node, state="cached", reason="made now", fingerprint=record.fingerprint, inputs=step.inputs,
            record=record,
        )  # fmt: skip
        return record

    def _tell_before(self) -> None:
        """Once, as soon as the items are pinned and before anything is measured: what the gate can show with them."""
        pinned, gate = self.steps.get("benchmarks"), self.steps.get("gate")
        if self.told or not (pinned and pinned.record) or not gate or gate.record:
            return
        self.told = True
        for line in told_before(self.project, self.planner, self.steps):
            self.log.add("gate", "note", text=line.strip().removeprefix("gate: "))

    def _forward(self, name: str, event: Mapping[str, Any]) -> None:
        fault_site("run-event")
        self.metrics.count(name, event)
        self.log.add(name, event["event"], **{key: value for key, value in event.items() if key != "event"})

    def _look_again(self) -> None:
        """Weights that were linked from one artifact into the next look touched: read them here, not at the next run.

        What is damaged is for the next run to find; this one is done.
        """
        for step in self.steps.values():
            if step.record:
                self.project.store.intact(step.record)
        remember(self.planner.sources.values())

    def _record_run(self, *, tracked: bool) -> Path:
        """The report and the tracker's rows; made from records and events, so they can be made again."""
        from fmops.orchestration.report import write_report

        report = write_report(self.project.store, self.folder)
        if tracked:
            from fmops.adapters.mlflow import log_run

            log_run(self.project.store, self.folder)
        return report


def _raise_unless_promoted(steps: Mapping[str, Step], folder: Path | None) -> None:
    gate = steps.get("gate")
    if gate is None or gate.record is None or gate.record.artifact["verdict"] == "promote":
        return
    verdict = gate.record.artifact["verdict"]
    reasons = "".join(f"\n  - {reason}" for reason in gate.record.artifact["reasons"])
    where = f"\nReport: {folder / 'report.html'}" if folder else ""
    text = f"the gate says {verdict}; nothing is released.{reasons}"
    if verdict == "need more data":
        raise NeedMoreData(f"{text}\n{_next_try(gate.record.artifact)}{where}")
    raise GateRejected(f"{text}{where}")


def _next_try(decision: Mapping[str, Any]) -> str:
    """What another try costs, for who would ask again until it passes."""
    from fmops.evaluation.spending import level

    rounds = tuple(map(Judged.model_validate, decision["rounds"]))
    alpha = decision["alpha"]
    return (
        f"Another try (other weights, items or margins) is round {len(rounds) + 1}, tested at level "
        f"{level(rounds, alpha):.4f} of α {alpha:g}; this one had {rounds[-1].level:.4f}. A smaller level needs more "
        "items for the same margin, so do not just run again: raise evaluate.limit, or train for a larger gain, until "
        "`fmops plan` says that the items can show the margins at that level."
    )


def _promote(
    project: Project, steps: Mapping[str, Step], alias: Alias, *, expected: str | None, why: str
) -> str | None:
    """Point the alias at the release, unless it does; the champion before it becomes `previous`."""
    release = steps["release"].record
    if release is None:
        return expected
    if release.key in (expected, project.store.aliases().get("champion")):
        return release.key
    fault_site("run-before-promote")
    sign_release(project.store, release)
    before = {"previous": expected} if expected and alias == "champion" else {}
    project.store.move_aliases({alias: release.key, **before}, expected={alias: expected}, why=why)
    from fmops.adapters.mlflow import mirror_release

    mirror_release(project.store, release)
    return release.key


def _refuse_another_lifecycle(project: Project) -> None:
    """A workspace has one champion, so it serves one lifecycle."""
    store = project.store
    champion = store.aliases().get("champion")
    known = next((record for record in store.records() if record.key == champion), None)
    if known and known.artifact["name"] != project.spec.name:
        raise FmopsError(
            f"the champion in {store.root} is of the lifecycle {known.artifact['name']!r}, this spec is "
            f"{project.spec.name!r}. Give it a workspace of its own: `--workspace .fmops-{project.spec.name}`."
        )


def _set_aside(store: Store, view: View, record: Record, fault: str) -> None:
    target = store.quarantine(record)
    text = f"{record.key} is damaged ({fault}); it lies in {target} and is made again"
    view.show(record.node, {"event": "note", "text": text})
