"""A release on Kubernetes: a KServe InferenceService, its budget of disruption, warm nodes, and the gateway's route.

Enters: a release's key, name and address in S3; what a replica needs. Leaves: manifests for the platform of infra/.
Refuses: nothing; `orchestration.deploy` decides what is applied.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fmops.artifacts import Frozen
from fmops.deployment.replica import ACCELERATORS, Device, Replica

Manifest = dict[str, Any]
NAMESPACE = "fmops-serve"
RELEASE = "fmops/release"
LIFECYCLE = "fmops/lifecycle"
PROMETHEUS = "http://kube-prometheus-stack-prometheus.monitoring:9090"
RUNTIMES: dict[Device, str] = {"gpu": "vllm", "neuron": "vllm-neuron"}
POOLS: dict[Device, str] = {"gpu": "gpu-inference", "neuron": "neuron-inference"}
# What the runtimes of infra/platform/serving wait for: first until the gateway sends nothing new, then for answers.
PRE_STOP_S, DRAIN_S = 30, 120
LONGEST_ANSWER = "600s"


class Scale(Frozen):
    """How many replicas, and what adds one."""

    least: int = Field(1, ge=1)
    most: int = Field(4, ge=1)
    waiting: int = Field(4, ge=1, description="Requests that wait in vLLM's queue, a replica: more of them add one.")
    tokens_per_second: int | None = Field(
        None, ge=1, description="Generated tokens that one replica is trusted with. Left out: the queue alone decides."
    )
    warm: int = Field(0, ge=0, description="Nodes kept warm by placeholder pods, which a real replica pushes out.")


class Backend(Frozen):
    """Where a release answers inside the cluster."""

    service: str
    port: int


def inference_service(key: str, *, name: str, uri: str, replica: Replica, scale: Scale) -> Manifest:
    """vLLM under KServe, from the release's folder in S3.

    `uri` names the digest of the contents, so a path can never mean other weights. The first served name is the
    release's key: every answer's `model` says who gave it. KEDA scales by the queue: a GPU at 100 % says nothing.
    """
    metrics = [_metric(f"sum(vllm:num_requests_waiting{_of(key)})", scale.waiting)]
    if scale.tokens_per_second:
        rate = f"sum(rate(vllm:generation_tokens_total{_of(key)}[2m]))"
        metrics.append(_metric(rate, scale.tokens_per_second))
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": key,
            "namespace": NAMESPACE,
            # Clients come through the route of the lifecycle, whose weights the rollout moves.
            "labels": {RELEASE: key, LIFECYCLE: name, "networking.kserve.io/visibility": "cluster-local"},
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "keda",
            },
        },
        "spec": {
            "predictor": {
                "serviceAccountName": "predictor",
                "priorityClassName": "fmops-serving",
                "minReplicas": scale.least,
                "maxReplicas": max(scale.least, scale.most),
                "autoScaling": {
                    "metrics": metrics,
                    # A node with an accelerator comes in minutes: add at once, take away slowly.
                    "behavior": {
                        "scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]},
                        "scaleDown": {
                            "stabilizationWindowSeconds": 600,
                            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}],
                        },
                    },
                },
                # A new pod is ready before an old one goes.
                "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "terminationGracePeriodSeconds": PRE_STOP_S + DRAIN_S + 15,
                "topologySpreadConstraints": [_spread({"serving.kserve.io/inferenceservice": key})],
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "runtime": RUNTIMES[replica.device],
                    "storageUri": f"{uri}/model",
                    "args": [
                        "--served-model-name", key, name,
                        f"--max-model-len={replica.max_tokens}",
                        f"--tensor-parallel-size={replica.parallel}",
                    ],
                    "resources": replica.resources,
                },
            }
        },
    }  # fmt: skip


def disruption_budget(key: str) -> Manifest:
    """One pod at a time may be taken away by an upgrade or a node's consolidation."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": key, "namespace": NAMESPACE, "labels": {RELEASE: key}},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"serving.kserve.io/inferenceservice": key}}},
    }


def placeholders(name: str, *, replica: Replica, warm: int, image: str) -> Manifest:
    """Pods of the lowest priority that hold nodes of a replica's size; zero of them ends it."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    labels = {"app": f"{name}-warm", LIFECYCLE: name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{name}-warm", "namespace": NAMESPACE, "labels": labels},
        "spec": {
            "replicas": warm,
            "selector": {"matchLabels": {"app": f"{name}-warm"}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "priorityClassName": "fmops-placeholder",
                    "terminationGracePeriodSeconds": 0,
                    "automountServiceAccountToken": False,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": 65534,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    **placement(replica.device),
                    "containers": [
                        {
                            "name": "hold", "image": image, "resources": replica.resources, "securityContext": security,
                        }
                    ],
                },
            },
        },
    }  # fmt: skip


def route(name: str, *, cluster: str, champion: tuple[str, Backend]) -> Manifest:
    """The lifecycle's address at the gateway; all of it goes to the champion until a rollout moves weights."""
    key, backend = champion
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {LIFECYCLE: name},
            "annotations": {"fmops/champion": key},
        },
        "spec": {
            "parentRefs": [{"name": "models"}],
            "hostnames": [f"{name}.{cluster}.internal"],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                    "backendRefs": [{"name": backend.service, "port": backend.port, "weight": 1}],
                    "timeouts": {"request": LONGEST_ANSWER},
                }
            ],
        },
    }


def placement(device: Device) -> Manifest:
    """Only on nodes of the pool, whose taint keeps others away."""
    return {
        "nodeSelector": {"fmops/pool": POOLS[device]},
        "tolerations": [{"key": ACCELERATORS[device].resource, "operator": "Exists", "effect": "NoSchedule"}],
    }


def _of(key: str) -> str:
    return f'{{namespace="{NAMESPACE}",pod=~"{key}-predictor-.*"}}'


def _metric(query: str, a_replica: int) -> Manifest:
    return {
        "type": "External",
        "external": {
            "metric": {"backend": "prometheus", "serverAddress": PROMETHEUS, "query": query},
            "target": {"type": "AverageValue", "averageValue": str(a_replica)},
        },
    }


def _spread(labels: dict[str, str]) -> Manifest:
    return {
        "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    }  # fmt: skip
