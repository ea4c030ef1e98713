"""Whether a lifecycle can run here, and on the cluster: `fmops doctor`.

Enters: a spec's path and its workspace, or a Kubernetes context. Leaves: findings, each with its remedy.
Refuses: nothing; it changes nothing, and computes nothing that takes longer than a second.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from fmops.environment import machine_notes
from fmops.errors import FmopsError
from fmops.locks import holder

if TYPE_CHECKING:
    from fmops.adapters.kubernetes import Cluster
    from fmops.orchestration.project import Project

State = Literal["ok", "note", "fault"]
LEAST_DISK_GB = 2
WANTED_DISK_GB = 10
WANTED_MEMORY_GB = 6
"""What the quickstart's pretraining takes at its peak."""
KINDS = {
    "rayjobs.ray.io": ("v1", "stages of `fmops run --on eks`"),
    "rayservices.ray.io": ("v1", "`fmops deploy --by ray`"),
    "localqueues.kueue.x-k8s.io": ("v1beta2", "the queue that a stage waits in"),
    "nodepools.karpenter.sh": ("v1", "nodes on demand"),
    "inferenceservices.serving.kserve.io": ("v1beta1", "`fmops deploy --on eks`"),
    "scaledobjects.keda.sh": ("v1alpha1", "replicas by vLLM's queue"),
    "httproutes.gateway.networking.k8s.io": ("v1", "the weights that a rollout moves"),
    "prometheusrules.monitoring.coreos.com": ("v1", "alarms"),
}
"""Custom resources by name: the version that our manifests are written for, and what needs them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    said: str
    remedy: str = ""


def examine_here(spec: Path, *, open_project: Callable[[], Project]) -> Iterator[Finding]:
    """The machine, the installation, and the workspace if there is a spec."""
    yield Finding("python", "ok", platform.python_version())
    yield from _packages()
    yield _memory()
    yield _precision()
    if not spec.is_file():
        yield _disk(Path.cwd())
        yield Finding("spec", "note", f"no {spec}", "`fmops init` writes one; or name yours with --spec.")
        return
    try:
        project = open_project()
    except FmopsError as error:
        yield Finding("spec", "fault", str(error), "Mend it; `fmops schema` is for your editor.")
        return
    yield Finding("spec", "ok", f"{spec}: {project.spec.name}, {len(project.graph.nodes)} stages")
    yield _disk(project.store.root)
    yield from _workspace(project)
    yield _port(project)


def _packages() -> Iterator[Finding]:
    """What the distribution requires, and what each of its extras lacks."""
    missing: dict[str, list[str]] = {}
    for text in requires("fmops") or []:
        wanted = Requirement(text)
        extra = str(wanted.marker).partition("extra == ")[2].strip("\"'") if wanted.marker else ""
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(wanted.name)
            fault = None if wanted.specifier.contains(found, prereleases=True) else f"{wanted.name} {found}"
        except PackageNotFoundError:
            fault = wanted.name
        if fault:
            missing.setdefault(extra, []).append(f"{fault} (needs {wanted.specifier or 'any'})")
    core = missing.pop("", [])
    if core:
        yield Finding("packages", "fault", ", ".join(core), "`make setup`, or install fmops again.")
    else:
        yield Finding("packages", "ok", f"fmops {version('fmops')} with all that it requires")
    for extra, names in sorted(missing.items()):
        if extra != "dev":
            yield Finding(f"extra {extra}", "note", f"without {', '.join(names)}", f"`pip install fmops[{extra}]`.")


def _cores() -> int:
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    said = f"{pages:.1f} GB of memory, {_cores()} cores"
    if pages < WANTED_MEMORY_GB:
        return Finding("machine", "note", said, f"The quickstart takes {WANTED_MEMORY_GB} GB: lower batch_tokens.")
    return Finding("machine", "ok", said)


def _precision() -> Finding:
    noted = machine_notes(threads=_cores())
    known = sorted(path.name for path in noted.glob("*")) if noted.is_dir() else []
    return Finding("measured once", "ok" if known else "note", ", ".join(known) or "nothing yet; the first run will")


def _disk(place: Path) -> Finding:
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    state: State = "fault" if free < LEAST_DISK_GB else "note" if free < WANTED_DISK_GB else "ok"
    remedy = "Free some, or put the workspace elsewhere with --workspace." if state != "ok" else ""
    return Finding("disk", state, f"{free:.1f} GB free at {there}", remedy)


def _workspace(project: Project) -> Iterator[Finding]:
    store = project.store
    there = next(path for path in (store.root, *store.root.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("workspace", "fault", f"{there} may not be written", "Name another with --workspace.")
    held = holder(store.root / "lock")
    if held:
        yield Finding(
            "workspace", "note", f"{store.root} is held by {held}", "A second run is refused until that ends."
        )
    try:
        records, champion = store.records(), store.aliases().get("champion")
    except FmopsError as error:
        yield Finding("workspace", "fault", str(error))
        return
    broken = [(record.key, fault) for record in records if (fault := store.intact(record))]
    for key, fault in broken:
        yield Finding("artifact", "fault", f"{key}: {fault}", "`fmops run` sets it aside and makes it again.")
    said = f"{store.place}: {len(records)} artifacts, champion {champion or 'none yet'}"
    yield Finding("workspace", "note" if broken else "ok", said)


def _port(project: Project) -> Finding:
    host, port = project.spec.serve.host, project.spec.serve.port
    with socket.socket() as tried:
        tried.settimeout(1)
        taken = bool(port) and tried.connect_ex((host, port)) == 0
    if taken:
        return Finding("port", "note", f"{host}:{port} answers", "If that is not `fmops up`, set another serve.port.")
    return Finding("port", "ok", f"{host}:{port} is free" if port else "a free one is taken")


def examine_cluster(context: str | None) -> Iterator[Finding]:
    """The API, what the platform must have installed, and where stages and endpoints run."""
    from fmops.adapters.kubernetes import ApiError, connect

    try:
        cluster = connect(context)
        said = cluster.request("GET", "/version") or {}
    except FmopsError as error:
        yield Finding("cluster", "fault", str(error))
        return
    yield Finding("cluster", "ok", f"{cluster.context}, Kubernetes {said.get('gitVersion', 'of unknown version')}")
    yield from _rights(cluster)
    sections = {
        "custom resources": _kinds, "namespaces": _namespaces, "service account": _account, "queue": _queue,
        "gateway": _gateway, "node pools": _pools, "nodes": _nodes,
    }  # fmt: skip
    for what, look in sections.items():
        try:
            yield from look(cluster)
        except ApiError as error:
            if error.status != 403:
                raise
            yield Finding(what, "note", "your role may not look at them", "Ask one of `viewers` or `administrators`.")


def _rights(cluster: Cluster) -> Iterator[Finding]:
    """What the caller's own role may do, which everybody may ask."""
    for command, verb, group, resource, namespace, remedy in (
        ("fmops run", "create", "ray.io", "rayjobs", "fmops-train", "Name your role in `engineers` of infra/cluster."),
        (
            "fmops deploy",
            "patch",
            "serving.kserve.io",
            "inferenceservices",
            "fmops-serve",
            "It is for `administrators`.",
        ),
    ):
        asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "metadata": {}, "spec": {"resourceAttributes": asked},
        }  # fmt: skip
        answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review) or {}
        what = f"`{command} --on eks`"
        if answer.get("status", {}).get("allowed"):
            yield Finding(what, "ok", f"your role may {verb} {resource} in {namespace}")
        else:
            # Who looks after a cluster need not train on it.
            yield Finding(what, "note", f"your role may not {verb} {resource} in {namespace}", remedy)


def _kinds(cluster: Cluster) -> Iterator[Finding]:
    for name, (wanted, needs) in KINDS.items():
        found = cluster.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}", missing=True)
        if found is None:
            yield Finding(name, "fault", f"not installed; {needs} needs it", "See infra/README.md, Deploy.")
            continue
        served = [each["name"] for each in found["spec"]["versions"] if each.get("served")]
        if wanted in served:
            yield Finding(name, "ok", wanted)
        else:
            said = f"serves {', '.join(served) or 'no version'}; our manifests are {wanted}"
            yield Finding(name, "fault", said, "Take the chart's version from infra/platform/apps.")


def _namespaces(cluster: Cluster) -> Iterator[Finding]:
    for namespace in ("fmops-train", "fmops-serve"):
        found = cluster.request("GET", f"/api/v1/namespaces/{namespace}", missing=True)
        yield _there(f"namespace {namespace}", found, "Argo CD's application `foundations` makes it.")


def _account(cluster: Cluster) -> Iterator[Finding]:
    found = cluster.request("GET", "/api/v1/namespaces/fmops-train/serviceaccounts/stages", missing=True)
    yield _there("service account stages", found, "Argo CD's application `queues` makes it.")


def _gateway(cluster: Cluster) -> Iterator[Finding]:
    place = "/apis/gateway.networking.k8s.io/v1/namespaces/fmops-serve/gateways/models"
    found = cluster.request("GET", place, missing=True)
    programmed = _condition(found or {}, "Programmed")
    if programmed is not None and programmed["status"] != "True":
        said = f"is not programmed: {programmed.get('message') or programmed.get('reason')}"
        yield Finding("gateway models", "fault", said, "Look at Argo CD's application `envoy-gateway`.")
    else:
        yield _there("gateway models", found, "Argo CD's application `serving` makes it.")


def _queue(cluster: Cluster) -> Iterator[Finding]:
    place = "/apis/kueue.x-k8s.io/v1beta2/namespaces/fmops-train/localqueues/stages"
    found = cluster.request("GET", place, missing=True)
    if found is None:
        yield _there("queue stages", None, "Argo CD's application `queues` makes it.")
        return
    active = _condition(found, "Active")
    if active is not None and active["status"] != "True":
        said = f"is not active: {active.get('message') or active.get('reason')}"
        yield Finding("queue stages", "fault", said, "Look at the ClusterQueue fmops.")
    else:
        yield Finding("queue stages", "ok", f"{found.get('status', {}).get('pendingWorkloads', 0)} stages wait")


def _pools(cluster: Cluster) -> Iterator[Finding]:
    pools = (cluster.request("GET", "/apis/karpenter.sh/v1/nodepools", missing=True) or {}).get("items", [])
    for pool in pools:
        name, ready = f"node pool {pool['metadata']['name']}", _condition(pool, "Ready")
        if ready is not None and ready["status"] != "True":
            yield Finding(
                name, "fault", f"is not ready: {ready.get('message') or ready.get('reason')}", "Its NodeClass."
            )
        else:
            yield Finding(name, "ok", f"limits {pool['spec'].get('limits', 'none')}")
    if not pools:
        yield Finding("node pools", "fault", "none", "Argo CD's application `nodes` makes them.")


def _nodes(cluster: Cluster) -> Iterator[Finding]:
    nodes = (cluster.request("GET", "/api/v1/nodes") or {}).get("items", [])
    devices: dict[str, int] = {}
    for node in nodes:
        for resource in ("nvidia.com/gpu", "aws.amazon.com/neuron"):
            count = int(node.get("status", {}).get("allocatable", {}).get(resource, 0))
            if count:
                devices[resource] = devices.get(resource, 0) + count
    said = ", ".join(f"{count} {resource}" for resource, count in devices.items()) or "no accelerator now"
    yield Finding("nodes", "ok", f"{len(nodes)} nodes, {said}; Karpenter makes more on demand")


def _condition(manifest: dict[str, Any], kind: str) -> dict[str, Any] | None:
    conditions: list[dict[str, Any]] = manifest.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), None)


def _there(what: str, found: object, remedy: str) -> Finding:
    return Finding(what, "ok", "is there") if found else Finding(what, "fault", "is not there", remedy)


def render_findings(findings: Iterable[Finding]) -> str:
    """A line each, faults with their remedy below."""
    lines = []
    for each in findings:
        lines.append(f"{each.state:5} {each.what}: {each.said}")
        if each.remedy and each.state != "ok":
            lines.append(f"      {each.remedy}")
    return "\n".join(lines)
