"""Launching stages on EKS: `fmops run --on eks`.

Enters: a project whose store is a bucket, a connection to the cluster. Leaves: the committed record of each stage.
Refuses: to call a stage done whose record is not in the bucket; to go on after what would only fail again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmops.errors import EXIT_FAILED, EXIT_MEMORY, EXIT_TERMINATED, FmopsError, StageFailed
from fmops.orchestration.cluster_plan import shape_of, works
from fmops.orchestration.deploy import Platform, as_yaml
from fmops.orchestration.execute import TRAINING
from fmops.orchestration.plan import Planner, Step
from fmops.orchestration.project import Project
from fmops.orchestration.ray_jobs import (
    NAMESPACE,
    SUBMITTER,
    VERSION,
    Manifest,
    Run,
    ray_job,
    require_reachable,
    spec_map,
)
from fmops.orchestration.shares import share_of
from fmops.store import Record

if TYPE_CHECKING:
    from fmops.adapters.kubernetes import Cluster

Event = dict[str, Any]
POLL_S = 2.0
"""Shorter than KubeRay's own three seconds: a retry takes the log of what failed away."""
ATTEMPTS = 3
"""Jobs for one stage, each with smaller micro-batches."""
LOST = 3
"""Times that a job is submitted again whose stage never said why it ended: KubeRay had given up on a lost node."""
ENDED = ("Complete", "Failed", "ValidationFailed")


@dataclass
class EksLauncher:
    """Runs each stage as a RayJob, and follows it; may be killed and started again at any point."""

    cluster: Cluster
    platform: Platform
    baked_in: bool = False
    """Whether local sources lie in the image, below /srv."""
    priority: str = "run"
    sleep: Callable[[float], None] = time.sleep
    _seen: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self, project: Project, name: str, *, fingerprint: str, log: Path, on_event: Callable[[Event], None]
    ) -> Record:
        """Run one node; a job of this very work that is there already is followed, not started again.

        Raises:
            StageFailed: the stage's own error, or how its job ended.
        """
        planner = project.planner()
        step = replace(planner.plan()[name], fingerprint=fingerprint)
        if not self.baked_in:
            require_reachable(project.graph, name)
        starved = lost = 0
        while True:
            spec, job = manifests_of(
                project, planner, step, platform=self.platform, priority=self.priority, attempt=starved
            )
            self.cluster.apply(spec)
            failure = self._follow(self._submit(job, on_event), log=log, on_event=on_event)
            if failure is None:
                record = project.store.find(step.node.stage.name, fingerprint)
                if record is None:
                    raise StageFailed(f"{name}: its job ended well, but {project.store.place} holds no record of it.")
                return record
            if failure.get("lost") and lost < LOST:
                lost += 1
                self._take_away(job["metadata"]["name"])
                on_event({"event": "note", "text": f"{failure['error']} It is submitted again."})
            elif failure["code"] == EXIT_MEMORY and step.node.stage.name in TRAINING and starved < ATTEMPTS - 1:
                starved += 1
                on_event(
                    {"event": "note", "text": "out of memory; again with micro-batches cut, the global batch stays"}
                )
            else:
                error = StageFailed(f"{name}: {failure['error']} Its log: {log}")
                error.exit_code = int(failure["code"])
                raise error

    def _submit(self, job: Manifest, on_event: Callable[[Event], None]) -> str:
        from fmops.adapters.kubernetes import Conflict

        name = str(job["metadata"]["name"])
        try:
            self.cluster.create(job)
            on_event({"event": "note", "text": f"submitted RayJob {name} for {_place(job)}"})
        except Conflict:
            found = self.cluster.get("RayJob", name, version=VERSION, namespace=NAMESPACE)
            if found is None or _is_over(found):
                self._take_away(name)
                self.cluster.create(job)
                on_event({"event": "note", "text": f"submitted RayJob {name} again, its last one had failed"})
            else:
                on_event({"event": "note", "text": f"RayJob {name} is there already; following it"})
        return name

    def _take_away(self, name: str) -> None:
        """Delete a job and wait until it is gone; its pods get their grace."""
        self.cluster.delete("RayJob", name, version=VERSION, namespace=NAMESPACE)
        while self.cluster.get("RayJob", name, version=VERSION, namespace=NAMESPACE):
            self.sleep(POLL_S)

    def _follow(self, name: str, *, log: Path, on_event: Callable[[Event], None]) -> Event | None:
        """Pass on what the stage reports until its job ends; returns its failure, or None."""
        failure: Event | None = None
        last = ""
        try:
            while True:
                job = self.cluster.get("RayJob", name, version=VERSION, namespace=NAMESPACE)
                if job is None:
                    return {"error": f"somebody deleted its RayJob {name}.", "code": EXIT_FAILED}
                status = job.get("status") or {}
                state = str(status.get("jobDeploymentStatus") or ("Suspended" if job["spec"].get("suspend") else "New"))
                if state != last:
                    on_event({"event": "note", "text": f"RayJob {name}: {_told(state)}"})
                    last = state
                for event in self._events(name, log):
                    if event["event"] == "failed":
                        failure = event
                    elif event["event"] != "finished":
                        on_event(event)
                if failure and failure["code"] != EXIT_TERMINATED:
                    # KubeRay knows no reasons: it would start again what would only fail again.
                    self._take_away(name)
                    return failure
                if state in ENDED:
                    if state == "Complete" and status.get("jobStatus") in (None, "SUCCEEDED"):
                        return None
                    reason = status.get("reason")
                    text = f"RayJob {name} ended as {state}: {status.get('message') or reason or state}."
                    # «AppFailed» is the stage's own end; every other reason is the loss of a node or of its head.
                    lost = state == "Failed" and (reason != "AppFailed" or failure is not None)
                    return {"error": text, "code": EXIT_FAILED, **(failure or {}), "lost": lost}
                self.sleep(POLL_S)
        except KeyboardInterrupt:
            self.cluster.delete("RayJob", name, version=VERSION, namespace=NAMESPACE)
            raise

    def _events(self, job: str, log: Path) -> Iterator[Event]:
        """What the job's submitters have written since the last look; other lines go to the stage's log."""
        for pod in self.cluster.list(
            "Pod", version="v1", namespace=NAMESPACE, labels=f"batch.kubernetes.io/job-name={job}"
        ):
            name = str(pod["metadata"]["name"])
            lines = self.cluster.lines(name, container=SUBMITTER, namespace=NAMESPACE, since=self._seen.get(name))
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as kept:
                for stamp, line in lines:
                    self._seen[name] = stamp
                    event = _event(line)
                    if event is None:
                        kept.write(line + "\n")
                    else:
                        yield event


def _is_over(job: Manifest) -> bool:
    """Whether a job of an earlier run can only be replaced: it failed, or it is being deleted."""
    state = (job.get("status") or {}).get("jobDeploymentStatus")
    return state in ("Failed", "ValidationFailed") or "deletionTimestamp" in job["metadata"]


def _place(job: Manifest) -> str:
    """The nodes that a job asks for, in words."""
    cluster = job["spec"]["rayClusterSpec"]
    nodes = 1 + sum(group["replicas"] for group in cluster.get("workerGroupSpecs", ()))
    chosen = cluster["headGroupSpec"]["template"]["spec"]["nodeSelector"]
    return f"{nodes} × {chosen.get('node.kubernetes.io/instance-type', 'processors')}"


def _event(line: str) -> Event | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None


def _told(state: str) -> str:
    return {
        "New": "submitted",
        "Suspended": "waits in the queue",
        "Initializing": "its pod starts, on a new node if there is none",
        "Retrying": "its node was lost; starting again from the newest resume state",
    }.get(state, state.lower())


def manifests_of(
    project: Project, planner: Planner, step: Step, *, platform: Platform, priority: str = "run", attempt: int = 0
) -> tuple[Manifest, Manifest]:
    """The ConfigMap and the RayJob of a node.

    Raises:
        FmopsError: the store is no bucket, or no nodes hold it.
    """
    if project.store.shared is None:
        raise FmopsError(
            f"the cluster cannot reach {project.store.root}. Name a bucket: --store s3://bucket/prefix, or "
            "`runtime: {store: …}`."
        )
    node = step.node
    config: Any = node.config
    share = share_of(
        node.stage.name, shape=shape_of(planner, planner.plan()["base"]), work=works(project, planner).get(node.name),
        framework=getattr(config, "engine" if node.stage.name == "release" else "framework", None), platform=platform,
    )  # fmt: skip
    text = project.spec_path.read_text(encoding="utf-8")
    run = Run(project.spec.name, text, project.store.shared.address, platform, priority)
    return spec_map(text), ray_job(step, share=share, run=run, attempt=attempt)


def render_run(project: Project, *, platform: Platform, baked_in: bool, priority: str = "run") -> str:
    """Every job that a run would submit, as YAML; what waits for another has no fingerprint yet."""
    planner = project.planner()
    made: list[Manifest] = []
    for step in planner.plan().values():
        if step.state not in ("run", "waiting"):
            continue
        if not baked_in:
            require_reachable(project.graph, step.node.name)
        spec, job = manifests_of(project, planner, step, platform=platform, priority=priority)
        made += [job] if made else [spec, job]
    return as_yaml(made)
