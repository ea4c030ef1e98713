"""A release on Ray Serve: a KubeRay RayService whose application is Ray's own OpenAI server over vLLM.

Enters: what `manifests` takes, and an image with Ray and vLLM by digest. Leaves: one RayService.
Refuses: a Ray without token authentication (it never renders one).
"""

from __future__ import annotations

from typing import Any

import yaml

from fmops.deployment.manifests import LIFECYCLE, NAMESPACE, RELEASE, Manifest, Scale, placement
from fmops.deployment.replica import Replica

RAY = "2.56.0"
"""Of the image in infra/platform/images.yaml."""
SECURITY = {
    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True, "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
HEAD = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}


def ray_service(key: str, *, name: str, uri: str, replica: Replica, scale: Scale, image: str) -> Manifest:
    """One worker pod a replica; Serve adds replicas by requests under way, Ray's autoscaler the pods for them."""
    worker = {
        "groupName": "replicas",
        "replicas": scale.least,
        "minReplicas": scale.least,
        "maxReplicas": max(scale.least, scale.most),
        "rayStartParams": {},
        "template": _pod(image, name="ray-worker", resources=replica.resources, extra=placement(replica.device)),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": key, "namespace": NAMESPACE, "labels": {RELEASE: key, LIFECYCLE: name}},
        "spec": {
            # Answers may take minutes; a proxy that has not answered for longer is replaced.
            "serviceUnhealthySecondThreshold": 900,
            "deploymentUnhealthySecondThreshold": 900,
            "rayClusterDeletionDelaySeconds": 180,
            "upgradeStrategy": {"type": "NewCluster"},
            "serveConfigV2": yaml.safe_dump(_application(key, uri=uri, replica=replica, scale=scale), sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": RAY,
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {
                    "idleTimeoutSeconds": 600,
                    "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
                    "securityContext": SECURITY,
                },
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    # The head schedules; it computes nothing.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(image, name="ray-head", resources=HEAD, extra={}),
                },
                "workerGroupSpecs": [worker],
            },
        },
    }


def _application(key: str, *, uri: str, replica: Replica, scale: Scale) -> dict[str, Any]:
    model = {
        "model_loading_config": {"model_id": key, "model_source": {"bucket_uri": f"{uri}/model"}},
        "engine_kwargs": {
            "max_model_len": replica.max_tokens,
            "tensor_parallel_size": replica.parallel,
            "trust_remote_code": False,
        },
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": max(scale.least, scale.most),
                # Under way, not waiting: what vLLM computes at once, and what may queue behind it.
                "target_ongoing_requests": 16 + scale.waiting,
            },
            "graceful_shutdown_timeout_s": 120,
            "graceful_shutdown_wait_loop_s": 2,
        },
    }
    return {
        "applications": [
            {
                "name": "models",
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {"llm_configs": [model]},
            }
        ]
    }


def _pod(image: str, *, name: str, resources: Any, extra: Manifest) -> Manifest:
    container = {
        "name": name,
        "image": image,
        "resources": resources,
        "securityContext": SECURITY,
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "VLLM_NO_USAGE_STATS", "value": "1"}],
        # Serve ends its replicas in time; the pod waits for them.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "30"]}}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "spec": {
            "serviceAccountName": "predictor",
            "priorityClassName": "fmops-serving",
            "terminationGracePeriodSeconds": 180,
            **extra,
            "containers": [container],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
        }
    }
