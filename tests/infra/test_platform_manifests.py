"""Every manifest of the platform is one that the cluster takes and our rules allow; each check can fail."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess

import pytest
import yaml
from manifests import (
    OWN_CHARTS,
    PLATFORM,
    PROFILES,
    UNCHECKED,
    cluster_values,
    crd_folder,
    helm,
    image_lock,
    manifests,
    policy_findings,
    schema_findings,
)

pytestmark = pytest.mark.xdist_group("infra-manifests")


def find(kind, name=None, profile="gpu"):
    """A copy of one manifest, to break."""
    for manifest in manifests(profile):
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"]):
            return copy.deepcopy(manifest)
    raise AssertionError(f"the platform has no {kind} {name or ''}")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_manifest_fits_its_schema(profile):
    folder = crd_folder()
    assert [finding for manifest in manifests(profile) for finding in schema_findings(manifest, folder)] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_every_manifest_keeps_the_rules(profile):
    assert [finding for manifest in manifests(profile) for finding in policy_findings(manifest)] == []


def test_every_exception_from_the_schemas_is_used():
    used = {f"{m['apiVersion'].partition('/')[0]}/{m['kind']}" for profile in PROFILES for m in manifests(profile)}
    assert used >= UNCHECKED


def damage(manifest, path, value):
    """Set what a dotted path names, or remove it where the value is None."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        manifest = manifest[part]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("NodePool", "spec.limitz", {"cpu": 1}, "limitz"),
        ("NodePool", "spec.template.spec.expireAfter", 504, "504 is not of type 'string'"),
        ("Gateway", "spec.listeners.0.allowedRoutes.namespace", {"from": "Same"}, "namespace"),
        ("NetworkPolicy", "spec.podSelectr", {}, "podSelectr"),
    ],
)
def test_a_manifest_that_the_cluster_would_refuse_is_refused_here(kind, path, value, said):
    manifest = find(kind)
    damage(manifest, path, value)
    assert said in " ".join(schema_findings(manifest, crd_folder()))


def test_a_kind_without_a_schema_is_not_let_through():
    manifest = {"apiVersion": "example.com/v1", "kind": "Novelty", "metadata": {"name": "x"}}
    assert "no schema for example.com/v1 Novelty" in schema_findings(manifest, crd_folder())[0]


CONTAINER = "spec.containers.0"
SECURITY = f"{CONTAINER}.securityContext"
DAMAGES = {
    "IMDSv1": ("EC2NodeClass", "spec.metadataOptions.httpTokens", "optional", "IMDSv2"),
    "two hops": ("EC2NodeClass", "spec.metadataOptions.httpPutResponseHopLimit", 2, "IMDSv2"),
    "plain disk": ("EC2NodeClass", "spec.blockDeviceMappings.0.ebs.encrypted", False, "not encrypted"),
    "moving image": ("EC2NodeClass", "spec.amiSelectorTerms.0.alias", "al2023@latest", "moves by itself"),
    "public node": ("EC2NodeClass", "spec.associatePublicIPAddress", None, "public address"),
    "no limit": ("NodePool", "spec.limits", None, "without a limit"),
    "public gateway": ("Gateway", "spec.infrastructure", None, "public load balancer"),
    "plain listener": ("Gateway", "spec.listeners.0.protocol", "HTTP", "without TLS"),
    "privileged": ("ClusterServingRuntime", f"{SECURITY}.privileged", True, "is privileged"),
    "capability": ("ClusterServingRuntime", f"{SECURITY}.capabilities", {"add": ["SYS_ADMIN"]}, "is privileged"),
    "escalation": ("ClusterServingRuntime", f"{SECURITY}.allowPrivilegeEscalation", None, "may gain privileges"),
    "capabilities": ("ClusterServingRuntime", f"{SECURITY}.capabilities", None, "keeps capabilities"),
    "root": ("ClusterServingRuntime", f"{SECURITY}.runAsNonRoot", None, "may run as root"),
    "seccomp": ("ClusterServingRuntime", f"{SECURITY}.seccompProfile", None, "without a seccomp profile"),
    "no requests": ("ClusterServingRuntime", f"{CONTAINER}.resources.requests", None, "requests"),
    "no limits": ("ClusterServingRuntime", f"{CONTAINER}.resources.limits", None, "limit of memory"),
    "tag": ("ClusterServingRuntime", f"{CONTAINER}.image", "vllm/vllm-openai:v1", "no digest"),
    "host": ("ClusterServingRuntime", "spec.hostNetwork", True, "node's network"),
    "moving chart": ("Application", "spec.source.targetRevision", "1.*", "moves"),
    "moving branch": ("Application", "spec.source.targetRevision", "main", "moves"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_manifest_that_breaks_a_rule_is_found(name):
    kind, path, value, said = DAMAGES[name]
    manifest = find(kind)
    assert policy_findings(manifest) == []
    damage(manifest, path, value)
    assert said in " ".join(policy_findings(manifest))


@pytest.mark.parametrize(
    "manifest",
    [
        {"kind": "Service", "metadata": {"name": "grafana"}, "spec": {"type": "LoadBalancer"}},
        {"kind": "Ingress", "metadata": {"name": "ray"}, "spec": {}},
        {"kind": "RayCluster", "metadata": {"name": "ray"}, "spec": {}},
        {
            "kind": "RayJob",
            "metadata": {"name": "ray"},
            "spec": {"rayClusterSpec": {"authOptions": {"mode": "disabled"}}},
        },
        {"kind": "RayService", "metadata": {"name": "ray"}, "spec": {"rayClusterConfig": {}}},
    ],
    ids=lambda m: m["kind"],
)
def test_what_opens_the_cluster_is_found(manifest):
    assert policy_findings(manifest)


def test_the_waves_hold_what_each_needs():
    waves = {
        m["metadata"]["name"]: int(m["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"])
        for profile in PROFILES
        for m in manifests(profile)
        if m["kind"] == "Application"
    }
    needs = {
        "karpenter": ["foundations"],
        "nodes": ["karpenter"],
        "secrets": ["external-secrets"],
        "nvidia-device-plugin": ["karpenter"],
        "kube-prometheus-stack": ["nodes", "secrets"],
        "kserve": ["cert-manager", "kserve-crd", "envoy-gateway"],
        "queues": ["kueue"],
        "serving": ["kserve", "envoy-gateway", "cert-manager"],
        "monitoring": ["kube-prometheus-stack"],
        "dcgm-exporter": ["kube-prometheus-stack"],
        "mlflow": ["secrets"],
        "dagster": ["secrets", "kuberay"],
    }
    late = [f"{app} before {other}" for app, others in needs.items() for other in others if waves[app] <= waves[other]]
    assert late == []


def test_every_application_lands_in_a_namespace_that_is_made_and_waits_for_its_removal():
    spaces = {m["metadata"]["name"] for m in manifests("gpu") if m["kind"] == "Namespace"} | {"kube-system"}
    for manifest in manifests("gpu"):
        if manifest["kind"] == "Application":
            assert manifest["spec"]["destination"]["namespace"] in spaces
            assert manifest["metadata"]["finalizers"] == ["resources-finalizer.argocd.argoproj.io"]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_project_allows_what_the_applications_bring(profile):
    project = find("AppProject", profile=profile)["spec"]
    allowed = {place["namespace"] for place in project["destinations"]}
    repos = set(project["sourceRepos"])
    for manifest in manifests(profile):
        if manifest["kind"] == "Application":
            assert manifest["spec"]["source"]["repoURL"] in repos
        elif manifest["kind"] != "AppProject":
            assert manifest["metadata"].get("namespace", "argocd") in allowed, manifest["metadata"]


def test_argo_cd_does_not_remove_itself_with_the_platform():
    for manifest in manifests("cpu"):
        if manifest["kind"] == "Namespace":
            kept = "Delete=false" in manifest["metadata"].get("annotations", {}).get(
                "argocd.argoproj.io/sync-options", ""
            )
            assert kept == (manifest["metadata"]["name"] == "argocd")


def test_accelerators_come_with_their_profile_alone():
    apps = {p: {m["metadata"]["name"] for m in manifests(p) if m["kind"] == "Application"} for p in PROFILES}
    assert {"nvidia-device-plugin", "dcgm-exporter"} <= apps["gpu"] - apps["neuron"] - apps["cpu"]
    assert "neuron-device-plugin" in apps["neuron"] - apps["gpu"] - apps["cpu"]
    assert "efa-device-plugin" in apps["gpu"] & apps["neuron"]


def test_training_nodes_stand_together_and_are_never_taken_from_a_gang():
    node_class = find("EC2NodeClass", "training")["spec"]
    assert node_class["placementGroupSelector"] == {"name": "fmops-training"}
    assert {"id": "sg-0b"} in node_class["securityGroupSelectorTerms"]
    pool = find("NodePool", "gpu-training")["spec"]
    assert pool["template"]["spec"]["expireAfter"] == "Never"
    assert {"nodes": "0", "reasons": ["Drifted", "Underutilized"]} in pool["disruption"]["budgets"]


def test_the_queue_covers_each_pool_with_its_devices():
    queue = find("ClusterQueue")["spec"]["resourceGroups"][0]
    assert queue["coveredResources"] == ["cpu", "memory", "nvidia.com/gpu", "vpc.amazonaws.com/efa"]
    quotas = {f["name"]: {r["name"]: r["nominalQuota"] for r in f["resources"]} for f in queue["flavors"]}
    assert quotas["gpu-training"]["nvidia.com/gpu"] == 64
    assert quotas["cpu"]["nvidia.com/gpu"] == 0
    assert {m["metadata"]["name"] for m in manifests("gpu") if m["kind"] == "ResourceFlavor"} == set(quotas)


def test_what_kserve_adds_to_a_predictor_keeps_the_rules_of_its_namespace():
    """Its chart makes image and tag one name (files/common/storagecontainer-patch.yaml), and copies the rest."""
    values = find("Application", "kserve")["spec"]["source"]["helm"]["valuesObject"]["kserve"]["storage"]
    container = {
        "name": "storage-initializer",
        "image": f"{values['image']}:{values['tag']}",
        "resources": values["resources"],
        "securityContext": values["containerSecurityContext"],
    }
    predictor = find("ClusterServingRuntime")
    predictor["spec"]["initContainers"] = [container]
    assert policy_findings(predictor) == []
    container["image"] = "kserve/storage-initializer:v0.20.0"
    assert "no digest" in policy_findings(predictor)[0]


@pytest.mark.parametrize("profile", ["gpu", "neuron"])
def test_what_a_runtime_asks_for_fits_the_smallest_node_of_its_pool(profile):
    """g5.xlarge, g6.xlarge and inf2.xlarge: 4 CPUs, 16 GiB, 58 pods.

    The kubelet of EKS keeps 6 % of the first core, 1 % of the second, 0.5 % of two more, and 255 MiB + 11 MiB a pod,
    and evicts below 100 MiB; Karpenter counts 7.5 % of the memory as the hypervisor's. Daemon sets are given half a
    core and 1 GiB: ours ask for less.
    """
    free_cpu, free_mib = 4 - 0.08 - 0.5, 16 * 1024 * 0.925 - (255 + 11 * 58) - 100 - 1024
    [container] = find("ClusterServingRuntime", profile=profile)["spec"]["containers"]
    asked = container["resources"]["requests"]
    assert int(asked["cpu"]) <= free_cpu
    assert int(asked["memory"].removesuffix("Gi")) * 1024 <= free_mib
    assert container["resources"]["limits"]["memory"] == asked["memory"]


def test_closed_namespaces_reach_no_metadata_service():
    for manifest in manifests("cpu"):
        if manifest["kind"] == "NetworkPolicy" and manifest["metadata"]["name"] == "allow-out":
            ranges = [to["ipBlock"] for rule in manifest["spec"]["egress"] for to in rule["to"] if "ipBlock" in to]
            assert {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]} in ranges


def test_the_alerts_are_those_that_fmops_ships():
    shipped = yaml.safe_load((PLATFORM / "../../src/fmops/deployment/monitoring/prometheus/alerts.yaml").read_text())
    assert find("PrometheusRule", "fmops")["spec"] == shipped


@pytest.mark.parametrize("profile", PROFILES)
def test_prometheus_takes_the_rules(profile, tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("no promtool: `make -C infra promtool` takes it from Debian's package prometheus")
    for manifest in manifests(profile):
        if manifest["kind"] == "PrometheusRule":
            page = tmp_path / f"{manifest['metadata']['name']}.yaml"
            page.write_text(yaml.safe_dump(manifest["spec"]))
            done = subprocess.run(["promtool", "check", "rules", str(page)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_a_platform_without_a_revision_is_refused():
    done = subprocess.run([helm(), "template", "apps", str(PLATFORM / "apps")], capture_output=True, text=True)
    assert "git.repo is empty: name your fork" in done.stderr


@pytest.mark.parametrize("chart", OWN_CHARTS)
def test_helm_lint(chart):
    values = {"cluster": cluster_values("gpu"), "images": image_lock(), "git": {"repo": "https://x", "revision": "v1"}}
    folder = PLATFORM.parent / chart if chart == "validation" else PLATFORM / chart
    command = [helm(), "lint", "--strict", str(folder), "--values", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
