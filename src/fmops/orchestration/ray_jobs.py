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
from fmops.orchestration.execute import PID_FILE, PROCESSES
from fmops.orchestration.graph import Graph, Node
from fmops.orchestration.launch import pinned_threads
from fmops.orchestration.project import THREADS
from fmops.orchestration.sizing import (
    GIB,
    STATE_BYTES,
    Instance,
    Shape,
    Training,
    Work,
    instances,
    training,
    usable_devices,
)
from fmops.stage import STAGES

NAMESPACE = "fmops-train"
QUEUE = "stages"
ACCOUNT = "stages"
VERSION = "ray.io/v1"
RAY = "2.60.0"
SPEC_FOLDER = "/srv"
WORKSPACE = "/scratch/fmops"
REMOTE = ("s3://", "hf://", "pypi://", "http://", "https://")
SUBMITTER = "ray-job-submitter"
"""The container that hands the stage to Ray and prints what it prints."""
STAGE_PID = "/scratch/stage.pid"
GRACE_S = 110
"""Of a pod that must go: spot gives two minutes; a stage writes a resume state within seconds of SIGTERM."""
LEAVE = f"pid=$(cat {STAGE_PID}) && kill -TERM $pid && while kill -0 $pid 2>/dev/null; do sleep 1; done"
"""Before the pod's processes are told to go: Ray would kill the stage at once, so the stage hears it first."""
TRAINS = ("pretrain", "instruct", "align")
COMPUTES = (*TRAINS, "evaluate", "release")
"""Stages that run the model."""
RESOURCES = {"gpu": "nvidia.com/gpu", "neuron": "aws.amazon.com/neuron"}
POOLS = {
    "gpu": {"g6": "gpu-inference", "g6e": "gpu-inference", "p4d": "gpu-training", "p5": "gpu-training"},
    "neuron": {"trn1": "neuron-training"},
}
"""The node pool that starts a family's instances (infra/platform/nodes); Kueue's flavour bears its name."""
LIBRARIES_GIB = 6

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """What the pod of a stage asks for."""

    cpu: int
    memory_gib: int
    pool: str = "cpu"
    resource: str | None = None
    count: int = 0
    instance: str | None = None

    @property
    def processes(self) -> int:
        """One a device."""
        return max(1, self.count)

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """As a container states them; memory and devices are limits, too."""
        fixed = {"memory": f"{self.memory_gib}Gi"}
        if self.resource:
            fixed[self.resource] = str(self.count)
        return {"requests": {"cpu": str(self.cpu), **fixed}, "limits": fixed}

    @property
    def environment(self) -> dict[str, str]:
        """Threads are stated: a pod sees every core of its node, and weights are equal only at an equal number."""
        threads = max(1, self.cpu // self.processes)
        found = pinned_threads(threads) | {THREADS: str(threads)}
        return found | ({PROCESSES: str(self.processes)} if self.processes > 1 else {})


def share_of(stage: str, *, shape: Shape | None, work: Work | None, profile: str) -> Share:
    """A pod for a stage: the cheapest accelerators that hold it where the profile has some, else processors.

    Training in ranks shards the model over all devices of a node; every other stage has one device.

    Args:
        shape: of the model; None before it is known (import).
        work: of a training stage; other stages only read the model.

    Raises:
        FmopsError: no node of the profile holds it.
    """
    size = (shape.parameters if shape else 1_000_000_000) / GIB
    if stage not in COMPUTES:
        # Curation holds a few hundred MB however large the corpus is; import holds the model in 32 bits.
        return Share(cpu=4, memory_gib=ceil(8 + (6 * size if stage == "import" else 0)))
    # Of the stages only training runs on NeuronCores: the scorer and parity's engines have no code for them.
    if profile not in RESOURCES or shape is None or (profile == "neuron" and stage not in TRAINS):
        state = STATE_BYTES if work and not work.lora else 6
        return Share(cpu=8, memory_gib=ceil(LIBRARIES_GIB + state * size))
    asked = work or Work(tokens=1, sequence=1024, batch_tokens=1024, lora=True)
    kinds = [each for name, each in instances().items() if name.partition(".")[0] in POOLS[profile]]
    held = [
        (found, needed)
        for each in kinds
        for devices in (usable_devices(each) if STAGES[stage].in_ranks else [1])
        if (found := training(shape, asked, each, nodes=1, devices=devices)) and _sharded_only(found)
        and (needed := _host_gib(size, ranks=devices, lora=asked.lora)) <= _host_room_gib(each)
    ]  # fmt: skip
    if not held:
        where = "one node" if STAGES[stage].in_ranks else "one device"
        raise FmopsError(
            f"{stage} with {shape.parameters / 1e9:.1f} B parameters fits on {where} of none of "
            f"{', '.join(each.name for each in kinds)}. Train an adapter (`lora`), or shorten its sequences."
        )
    best, needed = min(held, key=lambda pair: pair[0].dollars)
    part = best.layout.devices / best.on.devices
    return Share(
        cpu=max(1, int(part * (best.on.vcpu - 1))), memory_gib=int(max(part * _host_room_gib(best.on), needed)),
        pool=POOLS[profile][best.on.name.partition(".")[0]], resource=RESOURCES[profile],
        count=best.layout.devices, instance=best.on.name,
    )  # fmt: skip


def _sharded_only(found: Training) -> bool:
    """Whether FSDP2 alone lays it out so; tensor and pipeline parallelism are no part of these stages."""
    return found.layout.tensor == found.layout.pipeline == 1


def _host_gib(size: float, *, ranks: int, lora: bool) -> float:
    """Of the host's memory: the model that each rank loads, in 32 bits, and the state that the first one gathers."""
    return LIBRARIES_GIB + 4 * size * ranks + (12 * size if ranks > 1 and not lora else 0)


def _host_room_gib(on: Instance) -> float:
    """Of a node's memory for pods: without what the hypervisor and the kubelet keep, and the DaemonSets' pods."""
    return 0.9 * on.host_gib - 2


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

    A node that is lost takes the pod with it: KubeRay makes it again, the submitter submits again, and the stage goes
    on from the newest resume state in the bucket. Not SidecarMode: the container that KubeRay then adds to the head has
    no security context, and the namespace's Pod Security level would refuse the pod.
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
    image = platform.image("stages")
    stated = share.environment | dict(environment or {})
    start = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    if share.resource == RESOURCES["gpu"]:
        start["num-gpus"] = str(share.count)
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
            "rayClusterSpec": {
                "rayVersion": RAY,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    "rayStartParams": start,
                    "template": {"spec": _head(share, spec=spec["metadata"]["name"], image=image, environment=stated)},
                },
            },
        },
    }  # fmt: skip


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


def _head(share: Share, *, spec: str, image: str, environment: Mapping[str, str]) -> Manifest:
    stated = {"HOME": "/scratch", PID_FILE: STAGE_PID, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    container = {
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
    if share.resource:
        pod["tolerations"] = [{"key": share.resource, "operator": "Exists", "effect": "NoSchedule"}]
    if share.instance:
        pod["nodeSelector"]["node.kubernetes.io/instance-type"] = share.instance
    return pod
