"""Launching stages on EKS: `fmops run --on eks`.

Enters: a project whose store is a bucket, a connection to the cluster. Leaves: the committed record of each stage.
Refuses: to call a stage done whose record is not in the bucket; to go on after what would only fail again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fmops.errors import EXIT_MEMORY, FmopsError, StageFailed
from fmops.orchestration.cluster_plan import shape_of, works
from fmops.orchestration.deploy import Platform
from fmops.orchestration.execute import MICRO_BATCH_PARTS
from fmops.orchestration.plan import Planner, Step
from fmops.orchestration.project import Project
from fmops.orchestration.ray_jobs import (
    NAMESPACE,
    TRAINS,
    VERSION,
    Manifest,
    job_name,
    ray_job,
    require_reachable,
    share_of,
    spec_map,
)
from fmops.store import Record

if TYPE_CHECKING:
    from fmops.adapters.kubernetes import Cluster

Event = dict[str, Any]
POLL_S = 5.0
ATTEMPTS = 3
"""Jobs for one stage, each with smaller micro-batches; nodes that are lost are KubeRay's business and do not count."""
SUBMITTER = "ray-job-submitter"
"""The container beside the head that KubeRay adds; it prints what the stage prints."""
ENDED = ("Complete", "Failed", "ValidationFailed")


@dataclass
class EksLauncher:
    """Runs each stage as a RayJob, and follows it; may be killed and started again at any point."""

    cluster: Cluster
    platform: Platform
    baked_in: bool = False
    """Whether local sources lie in the image, below /srv."""
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
        step = planner.plan()[name]
        for attempt in range(ATTEMPTS):
            spec, job = manifests_of(
                project, planner, step, fingerprint=fingerprint, attempt=attempt, platform=self.platform,
                baked_in=self.baked_in,
            )  # fmt: skip
            self.cluster.apply(spec)
            failure = self._follow(self._submit(job, on_event), log=log, on_event=on_event)
            if failure is None:
                record = project.store.find(step.node.stage.name, fingerprint)
                if record is None:
                    raise StageFailed(f"{name}: its job ended well, but {project.store.place} holds no record of it.")
                return record
            starved = failure["code"] == EXIT_MEMORY and step.node.stage.name in TRAINS
            if not starved or attempt == ATTEMPTS - 1:
                error = StageFailed(f"{name}: {failure['error']} Its log: {log}")
                error.exit_code = int(failure["code"])
                raise error
            on_event({"event": "note", "text": "out of memory; again with micro-batches cut, the global batch stays"})
        raise AssertionError("unreachable")

    def _submit(self, job: Manifest, on_event: Callable[[Event], None]) -> str:
        from fmops.adapters.kubernetes import Conflict

        name = str(job["metadata"]["name"])
        try:
            self.cluster.create(job)
            on_event({"event": "note", "text": f"submitted RayJob {name}"})
        except Conflict:
            found = self.cluster.get("RayJob", name, version=VERSION, namespace=NAMESPACE)
            if found and found.get("status", {}).get("jobDeploymentStatus") in ("Failed", "ValidationFailed"):
                self.cluster.delete("RayJob", name, version=VERSION, namespace=NAMESPACE)
                self._gone(name)
                self.cluster.create(job)
                on_event({"event": "note", "text": f"submitted RayJob {name} again, its last one had failed"})
            else:
                on_event({"event": "note", "text": f"RayJob {name} is there already; following it"})
        return name

    def _gone(self, name: str) -> None:
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
                    return {"error": f"somebody deleted its RayJob {name}.", "code": 1}
                status = job.get("status") or {}
                state = str(status.get("jobDeploymentStatus") or ("Suspended" if job["spec"].get("suspend") else "New"))
                if state != last:
                    on_event({"event": "note", "text": f"RayJob {name}: {_told(state)}"})
                    last = state
                for event in self._events(status.get("rayClusterName"), log):
                    if event["event"] == "failed":
                        failure = event
                    elif event["event"] != "finished":
                        on_event(event)
                if state in ENDED:
                    if state == "Complete" and status.get("jobStatus") in (None, "SUCCEEDED"):
                        return None
                    reason = status.get("message") or status.get("reason") or state
                    return failure or {"error": f"RayJob {name} ended as {state}: {reason}.", "code": 1}
                self.sleep(POLL_S)
        except KeyboardInterrupt:
            self.cluster.delete("RayJob", name, version=VERSION, namespace=NAMESPACE)
            raise

    def _events(self, ray_cluster: str | None, log: Path) -> Iterator[Event]:
        """What the head's pod has written since the last look; other lines go to the stage's log."""
        if not ray_cluster:
            return
        labels = f"ray.io/cluster={ray_cluster},ray.io/node-type=head"
        for pod in self.cluster.list("Pod", version="v1", namespace=NAMESPACE, labels=labels):
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
    project: Project, planner: Planner, step: Step, *, fingerprint: str | None, attempt: int, platform: Platform,
    baked_in: bool,
) -> tuple[Manifest, Manifest]:  # fmt: skip
    """The ConfigMap and the RayJob of a node.

    Raises:
        FmopsError: the store is no bucket, a source is local, or no node holds it.
    """
    if project.store.shared is None:
        raise FmopsError(
            f"the cluster cannot reach {project.store.root}. Name a bucket: --store s3://bucket/prefix, or "
            "`runtime: {store: …}`."
        )
    if not baked_in:
        require_reachable(project.graph, step.node.name)
    base = planner.plan()["base"]
    shape = shape_of(planner, base)
    share = share_of(
        step.node.stage.name, shape=shape, work=works(project, planner).get(step.node.name), profile=platform.profile
    )
    spec = spec_map(project.spec_path.read_text(encoding="utf-8"))
    job = ray_job(
        step.node, fingerprint=fingerprint, attempt=attempt, share=share, spec=spec,
        store=project.store.shared.address, platform=platform, lifecycle=project.spec.name,
        environment={MICRO_BATCH_PARTS: str(2**attempt)} if attempt else {},
    )  # fmt: skip
    return spec, job


def render_run(project: Project, *, platform: Platform, baked_in: bool) -> str:
    """Every job that a run would submit, as YAML; what waits for another has no fingerprint yet."""
    planner = project.planner()
    made: list[Manifest] = []
    for step in planner.plan().values():
        if step.state not in ("run", "waiting"):
            continue
        spec, job = manifests_of(
            project, planner, step, fingerprint=step.fingerprint, attempt=0, platform=platform, baked_in=baked_in
        )
        made += [job] if made else [spec, job]
    return yaml.safe_dump_all(made, sort_keys=False, width=120)


__all__ = ["EksLauncher", "job_name", "manifests_of", "render_run"]
