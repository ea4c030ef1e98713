"""A stage as a KubeRay RayJob: what it asks of a node, and the manifests.

Enters: a node of the graph, the model's shape, the platform's facts. Leaves: a RayJob and the ConfigMap of its spec.
Refuses: stages whose data lie on this machine alone, and stages that no node of the profile holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from fmops.errors import FmopsError
from fmops.orchestration.deploy import Platform
from fmops.orchestration.graph import Graph, Node
from fmops.orchestration.sizing import GIB, STATE_BYTES, Shape, Work, instances, training

NAMESPACE = "fmops-train"
QUEUE = "stages"
ACCOUNT = "stages"
VERSION = "ray.io/v1"
RAY = "2.60.0"
SPEC_FOLDER = "/srv"
WORKSPACE = "/scratch/fmops"
REMOTE = ("s3://", "hf://", "pypi://", "http://", "https://")
GRACE_S = 110
"""Of a pod that must go: spot gives two minutes; a stage writes a resume state within seconds of SIGTERM."""
TRAINS = ("pretrain", "instruct", "align")
COMPUTES = (*TRAINS, "evaluate", "release")
"""Stages that run the model."""

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """What one pod asks for."""

    cpu: int
    memory_gib: int
    resource: str | None = None
    count: int = 0
    instance: str | None = None

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """As a container states them; memory and devices are limits, too."""
        fixed = {"memory": f"{self.memory_gib}Gi"}
        if self.resource:
            fixed[self.resource] = str(self.count)
        return {"requests": {"cpu": str(self.cpu), **fixed}, "limits": fixed}


RESOURCES = {"gpu": "nvidia.com/gpu", "neuron": "aws.amazon.com/neuron"}
FAMILIES = {"gpu": ("g6", "g6e", "p4d", "p5"), "neuron": ("trn1",)}


def share_of(stage: str, *, shape: Shape | None, work: Work | None, profile: str) -> Share:
    """A pod for a stage: the cheapest accelerator that holds it where the profile has some, else processors.

    Args:
        shape: of the model; None before it is known (import).
        work: of a training stage; other stages only read the model.

    Raises:
        FmopsError: no node of the profile holds the training state.
    """
    size = (shape.parameters if shape else 1_000_000_000) / GIB
    if stage not in COMPUTES:
        # Curation holds a few hundred MB however large the corpus is; import holds the model in 32 bits.
        return Share(cpu=4, memory_gib=ceil(8 + (6 * size if stage == "import" else 0)))
    if profile not in RESOURCES or shape is None:
        state = STATE_BYTES if work and not work.lora else 6
        return Share(cpu=8, memory_gib=ceil(6 + state * size))
    asked = work or Work(tokens=1, sequence=1024, batch_tokens=1024, lora=True)
    kinds = [each for name, each in instances().items() if name.partition(".")[0] in FAMILIES[profile]]
    sizes = [found for each in kinds if (found := training(shape, asked, each, nodes=1))]
    if not sizes:
        raise FmopsError(
            f"{stage} with {shape.parameters / 1e9:.1f} B parameters fits on one node of none of "
            f"{', '.join(each.name for each in kinds)}. Train an adapter (`lora`), or shorten its sequences."
        )
    best = min(sizes, key=lambda found: found.dollars)
    count = best.layout.devices
    share = count / best.on.devices
    return Share(
        cpu=max(2, int(share * 4 * best.on.devices) - 1), memory_gib=ceil(8 + 6 * size),
        resource=RESOURCES[profile], count=count, instance=best.on.name,
    )  # fmt: skip


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


def spec_map(text: str) -> Manifest:
    """The spec as a ConfigMap, named by its content: jobs of other specs keep theirs."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"spec-{digest}", "namespace": NAMESPACE},
        "immutable": True,
        "data": {"lifecycle.yaml": text},
    }


def job_name(node: str, fingerprint: str | None, attempt: int) -> str:
    """Equal for equal work, so that a launcher that was killed finds its job again."""
    return f"{node}-{(fingerprint or 'unplanned')[:12]}-{attempt}"


def ray_job(
    node: Node, *, fingerprint: str | None, attempt: int, share: Share, spec: Manifest, store: str, platform: Platform,
    lifecycle: str, priority: str = "run", environment: Mapping[str, str] | None = None,
) -> Manifest:  # fmt: skip
    """One stage on a cluster of its own, in the queue; the head is the pod that computes.

    A node that is lost takes the pod with it: KubeRay makes the cluster again (`backoffLimit`), and the stage goes on
    from the newest resume state in the bucket.
    """
    command = ["fmops", "stage", node.name, "--spec", f"{SPEC_FOLDER}/lifecycle.yaml", "--workspace", WORKSPACE]
    command += ["--store", store] + (["--fingerprint", fingerprint] if fingerprint else [])
    labels = {
        "kueue.x-k8s.io/queue-name": QUEUE,
        "kueue.x-k8s.io/priority-class": priority,
        "fmops/lifecycle": lifecycle,
        "fmops/stage": node.name,
        "fmops/fingerprint": (fingerprint or "unplanned")[:40],
    }
    pod = _pod(share, spec=spec["metadata"]["name"], image=platform.image("stages"), environment=environment or {})
    return {
        "apiVersion": VERSION,
        "kind": "RayJob",
        "metadata": {
            "name": job_name(node.name, fingerprint, attempt), "namespace": NAMESPACE, "labels": labels,
        },
        "spec": {
            "entrypoint": " ".join(command),
            # The submitter runs beside the head: one pod fewer to schedule, and its log is the stage's.
            "submissionMode": "SidecarMode",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "suspend": True,
            "rayClusterSpec": {
                "rayVersion": RAY,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    "rayStartParams": {"num-gpus": str(share.count)} if share.resource == RESOURCES["gpu"] else {},
                    "template": pod,
                },
            },
        },
    }  # fmt: skip


SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip


def _pod(share: Share, *, spec: str, image: str, environment: Mapping[str, str]) -> Manifest:
    container = {
        "name": "stage",
        "image": image,
        "resources": share.resources,
        "securityContext": SECURITY,
        "env": [{"name": "HOME", "value": "/scratch"}]
        + [{"name": name, "value": value} for name, value in sorted(environment.items())],
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
        "securityContext": {"fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [
            {"name": "spec", "configMap": {"name": spec}},
            {"name": "work", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, share.memory_gib // 4)}Gi"}},
        ],
    }
    if share.resource:
        pod["tolerations"] = [{"key": share.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if share.instance:
        pod["nodeSelector"] = {"node.kubernetes.io/instance-type": share.instance}
    return {"spec": pod}
