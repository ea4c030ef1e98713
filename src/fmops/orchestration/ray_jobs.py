"""A stage as a KubeRay RayJob: the manifests.

Enters: a planned step, its share of the cluster, what all jobs of a run share. Leaves: a RayJob, its spec's ConfigMap.
Refuses: stages whose data lie on this machine alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from fmops.errors import FmopsError
from fmops.orchestration.deploy import Platform
from fmops.orchestration.execute import MICRO_BATCH_PARTS, PID_FILE
from fmops.orchestration.graph import Graph
from fmops.orchestration.plan import Step
from fmops.orchestration.shares import RESOURCES, Share

NAMESPACE = "fmops-train"
QUEUE = "stages"
ACCOUNT = "stages"
VERSION = "ray.io/v1"
RAY = "2.60.0"
SPEC_FOLDER = "/srv"
WORKSPACE = "/scratch/fmops"
SHARED_CLAIM, SHARED_FOLDER = "lustre", "stages"
"""Of infra/platform/queues, where the cluster has a file system that nodes share."""
REMOTE = ("s3://", "hf://", "pypi://", "http://", "https://")
SUBMITTER = "ray-job-submitter"
"""The container that hands the stage to Ray and prints what it prints."""
STAGE_PID = "/scratch/stage.pid"
GRACE_S = 110
"""Of a pod that must go: spot gives two minutes; a stage writes a resume state within seconds of SIGTERM."""
LEAVE = f"pid=$(cat {STAGE_PID}) && kill -TERM $pid && while kill -0 $pid 2>/dev/null; do sleep 1; done"
"""Before the pod's processes are told to go: Ray would kill the stage at once, so the stage hears it first."""
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What all jobs of a run share."""

    lifecycle: str
    spec: str
    """The spec's text."""
    store: str
    platform: Platform
    priority: str = "run"
    """A class of Kueue's, by the name that infra/platform/queues gives it."""


def require_reachable(graph: Graph, name: str) -> None:
    """Raise for a source that only this machine has."""
    for parameter, uris in graph.nodes[name].sources.items():
        local = [uri for uri in uris if not uri.startswith(REMOTE)]
        if local:
            raise FmopsError(
                f"{name} reads {local[0]!r} ({parameter}), which lies on this machine: the cluster cannot reach it. "
                "Copy it to a bucket and name it as s3://…, or bake it into the image below /srv and use "
                "`--baked-in`."
            )


def spec_name(text: str) -> str:
    """Of the ConfigMap of a spec, by its content: jobs of other specs keep theirs."""
    return f"spec-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def spec_map(text: str) -> Manifest:
    """The spec as a ConfigMap."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": spec_name(text), "namespace": NAMESPACE},
        "immutable": True,
        "data": {"lifecycle.yaml": text},
    }


def job_name(node: str, fingerprint: str | None, attempt: int) -> str:
    """Equal for equal work, so that a launcher that was killed finds its job again."""
    return f"{node}-{(fingerprint or 'unplanned')[:12]}-{attempt}"


def ray_job(step: Step, *, share: Share, run: Run, attempt: int = 0) -> Manifest:
    """One stage on a cluster of its own, in the queue; the head computes, and so do the workers of a gang.

    A node that is lost takes its pod with it, and KubeRay makes it again. With the head, the job is submitted again and
    the stage goes on from the newest resume state in the bucket; with a worker, Ray Train starts the ranks again. Not
    SidecarMode: the container that KubeRay then adds to the head has no security context, and the namespace's Pod
    Security level would refuse the pod.
    """
    node, fingerprint = step.node, step.fingerprint
    command = ["fmops", "stage", node.name, "--spec", f"{SPEC_FOLDER}/lifecycle.yaml", "--workspace", WORKSPACE]
    command += ["--store", run.store] + (["--fingerprint", fingerprint] if fingerprint else [])
    labels = {
        "kueue.x-k8s.io/queue-name": QUEUE,
        "kueue.x-k8s.io/priority-class": run.priority,
        "fmops/lifecycle": run.lifecycle,
        "fmops/stage": node.name,
        "fmops/fingerprint": (fingerprint or "unplanned")[:40],
    }
    image = run.platform.image("stages")
    return {
        "apiVersion": VERSION,
        "kind": "RayJob",
        "metadata": {
            "name": job_name(node.name, fingerprint, attempt), "namespace": NAMESPACE, "labels": labels,
        },
        "spec": {
            "entrypoint": " ".join(command),
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {"spec": _submitter(image)},
            "submitterConfig": {"backoffLimit": RESTARTS},
            "backoffLimit": RESTARTS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "suspend": True,
            "rayClusterSpec": _cluster(
                share, pod=_pod(share, spec=spec_name(run.spec), image=image, attempt=attempt),
            ),
        },
    }  # fmt: skip


def _cluster(share: Share, *, pod: Manifest) -> Manifest:
    """A head, and a worker for each further node: equal pods, but that the stage runs in the head."""
    start = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    if share.resource == RESOURCES["gpu"]:
        start["num-gpus"] = str(share.count)
    head = {"serviceType": "ClusterIP", "rayStartParams": start, "template": {"spec": pod}}
    cluster = {"rayVersion": RAY, "authOptions": {"mode": "token"}, "headGroupSpec": head}
    if share.nodes == 1:
        return cluster
    start["num-cpus"] = str(share.cpu)
    (container,) = pod["containers"]
    plain = {key: value for key, value in container.items() if key != "lifecycle"}
    workers = {
        "groupName": "ranks", "replicas": share.nodes - 1, "minReplicas": share.nodes - 1,
        "maxReplicas": share.nodes - 1, "rayStartParams": dict(start),
        "template": {"spec": pod | {"containers": [plain]}},
    }  # fmt: skip
    return cluster | {"workerGroupSpecs": [workers]}


RESTARTS = 3
"""Of a stage whose node was lost; what failed for a reason the launcher takes away before it is tried again."""
OBJECT_STORE_BYTES = 200_000_000
"""Ray would take 30 % of the memory; a stage keeps nothing there."""
SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
POD_SECURITY = {"fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}


def _submitter(image: str) -> Manifest:
    """The pod that submits: on a processor node, so that it never holds an accelerator's node."""
    container = {
        "name": SUBMITTER,
        "image": image,
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": SECURITY,
        "env": [{"name": "HOME", "value": "/tmp"}],
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "nodeSelector": {"fmops/pool": "cpu"},
    }


def _pod(share: Share, *, spec: str, image: str, attempt: int) -> Manifest:
    stated = {"HOME": "/scratch", PID_FILE: STAGE_PID, "RAY_USAGE_STATS_ENABLED": "0", **share.environment}
    if attempt:
        stated[MICRO_BATCH_PARTS] = str(2**attempt)
    container: Manifest = {
        "name": "stage",
        "image": image,
        "resources": share.resources,
        "securityContext": SECURITY,
        "env": [{"name": name, "value": value} for name, value in sorted(stated.items())],
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", LEAVE]}}},
        "volumeMounts": [
            {"name": "spec", "mountPath": f"{SPEC_FOLDER}/lifecycle.yaml", "subPath": "lifecycle.yaml"},
            {"name": "work", "mountPath": "/scratch"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod: Manifest = {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": [
            {"name": "spec", "configMap": {"name": spec}},
            {"name": "work", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, share.memory_gib // 4)}Gi"}},
        ],
        "nodeSelector": {"fmops/pool": share.pool},
    }
    if share.nodes > 1:
        # All ranks read what the stage fetched, and the states that the first of them writes.
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": SHARED_CLAIM}})
        mount = {"name": "shared", "mountPath": WORKSPACE, "subPath": SHARED_FOLDER}
        container["volumeMounts"].append(mount)
    if share.resource:
        pod["tolerations"] = [{"key": share.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if share.instance:
        pod["nodeSelector"]["node.kubernetes.io/instance-type"] = share.instance
    return pod
