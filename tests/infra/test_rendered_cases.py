"""What the cases for a cluster show fits the schemas, keeps our rules, and is what would be made today."""

from __future__ import annotations

import functools
import subprocess

import pytest
import yaml
from manifests import ROOT, cluster_values, crd_folder, helm, manifests, policy_findings, schema_findings
from test_admission_policies import refusals
from test_costs_and_scan import COSTS, idle_usd_an_hour
from test_terraform import checked, environment, terraform  # noqa: F401 - fixtures

pytestmark = pytest.mark.xdist_group("infra-manifests")

FOLDER = ROOT / "deployment"
NODES = {
    "vllm-kserve": {"g6.xlarge": 2},
    "vllm-inferentia": {"inf2.xlarge": 2},
    "ray-serve": {"g6.xlarge": 1, "m7i.xlarge": 1},
    "inference-graph": {"m7i.large": 1},
}
PROFILES = {"vllm-kserve": "gpu", "vllm-inferentia": "neuron", "ray-serve": "gpu"}
NEURON = ROOT / "pretraining/neuron"
RENDERED = [
    *sorted(FOLDER.glob("*/rendered/*.yaml")),
    FOLDER / "inference-graph/graph.yaml",
    NEURON / "rendered/jobs.yaml",
]


@functools.cache
def read(path):
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def service(case):
    return next(each for each in read(FOLDER / case / "rendered/service.yaml") if each["kind"].endswith("Service"))


def holder(case):
    return next(each for each in read(FOLDER / case / "rendered/service.yaml") if each["kind"] == "Deployment")


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_case_shows_fits_its_schemas_and_keeps_the_rules(path):
    for manifest in read(path):
        assert schema_findings(manifest, crd_folder()) == []
        assert policy_findings(manifest) == []


@pytest.mark.parametrize("case", NODES)
def test_a_case_says_what_it_costs_an_hour(case):
    text = (FOLDER / case / "README.md").read_text(encoding="utf-8")
    added = {node: count * COSTS["prices"][node] for node, count in NODES[case].items()}
    for node, usd in added.items():
        assert any(node in line and f"| {usd:.2f} |" in line for line in text.splitlines()), f"{node}: {usd:.2f}"
    assert f"| **together** | **{idle_usd_an_hour() + sum(added.values()):.2f}** |" in text
    assert "never run on hardware" in text


@pytest.mark.parametrize("case", PROFILES)
def test_the_platform_of_a_case_knows_what_the_real_one_knows(case):
    cluster = yaml.safe_load((FOLDER / case / "platform/cluster.yaml").read_text())["cluster"]
    assert cluster == cluster_values(PROFILES[case]) | {"reservations": cluster["reservations"]}


def test_pretraining_on_trainium_asks_for_devices_and_the_other_stages_for_processors():
    cluster = yaml.safe_load((NEURON / "platform/cluster.yaml").read_text())["cluster"]
    assert cluster == cluster_values("neuron") | {"reservations": []}
    spec, *jobs = read(NEURON / "rendered/jobs.yaml")
    assert spec["data"]["lifecycle.yaml"] == (NEURON / "lifecycle.yaml").read_text(encoding="utf-8")
    pods = {
        job["metadata"]["labels"]["fmops/stage"]: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        for job in jobs
    }
    asked = {
        name: pod["containers"][0]["resources"]["limits"].get("aws.amazon.com/neuron") for name, pod in pods.items()
    }
    assert asked == {"base": None, "corpus": None, "pretrain": "16", "release": None}
    assert pods["pretrain"]["nodeSelector"]["node.kubernetes.io/instance-type"] == "trn1.32xlarge"
    text = (NEURON / "README.md").read_text(encoding="utf-8")
    price = COSTS["prices"]["trn1.32xlarge"]
    assert f"| {price:.2f} |" in text
    assert f"| **together** | **{idle_usd_an_hour() + price:.2f}** |" in text
    assert "never run on hardware" in text


@pytest.mark.parametrize("case", ["vllm-kserve", "vllm-inferentia"])
def test_a_case_runs_on_a_runtime_of_the_platform(case):
    runtimes = {m["metadata"]["name"]: m for m in manifests(PROFILES[case]) if m["kind"] == "ClusterServingRuntime"}
    predictor = service(case)["spec"]["predictor"]
    runtime = runtimes[predictor["model"]["runtime"]]["spec"]
    held = holder(case)["spec"]["template"]["spec"]
    assert held["nodeSelector"] == runtime["nodeSelector"]
    assert held["containers"][0]["resources"] == predictor["model"]["resources"]
    pod = {"kind": "Pod", "metadata": {"name": "x"}, "spec": held}
    assert refusals("images-by-digest", pod) == refusals("requests-and-limits", pod) == []


def test_the_nodes_of_the_reservation_are_what_the_chart_makes_today():
    values = FOLDER / "vllm-kserve/platform/cluster.yaml"
    command = [helm(), "template", "nodes", str(ROOT / "infra/platform/nodes"), "--values", str(values)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = read(FOLDER / "vllm-kserve/rendered/nodes.yaml")
    assert shown == [each for each in yaml.safe_load_all(made) if each], f"{' '.join(command)} > rendered/nodes.yaml"


def test_a_replica_takes_reserved_nodes_first_and_is_held_a_place_there():
    nodes = {
        (each["kind"], each["metadata"]["name"]): each for each in read(FOLDER / "vllm-kserve/rendered/nodes.yaml")
    }
    held = holder("vllm-kserve")["spec"]
    pool = nodes["NodePool", held["template"]["spec"]["nodeSelector"]["fmops/pool"]]["spec"]["template"]["spec"]
    [capacity] = [each["values"] for each in pool["requirements"] if each["key"] == "karpenter.sh/capacity-type"]
    assert capacity[0] == "reserved"
    reserved = nodes["EC2NodeClass", pool["nodeClassRef"]["name"]]["spec"]["capacityReservationSelectorTerms"]
    assert reserved == [{"id": "cr-0123456789abcdef0"}]
    # One replica and one placeholder: as many as are reserved.
    assert service("vllm-kserve")["spec"]["predictor"]["minReplicas"] + held["replicas"] == 2


@pytest.mark.xdist_group("infra-terraform")
def test_terraform_reserves_what_the_case_asks_for(environment, checked):  # noqa: F811
    (checked / "cluster/tests/case.tftest.hcl").write_text(
        'mock_provider "aws" {\n  mock_data "aws_partition" {\n    defaults = { partition = "aws" }\n  }\n}\n'
        'mock_provider "aws" {\n  alias = "billing"\n}\n'
        'run "case" {\n  command = plan\n  assert {\n'
        '    condition = aws_ec2_capacity_reservation.this["assistant"].instance_count == 2\n'
        '    error_message = "Two nodes are reserved."\n  }\n}\n'
    )
    ordinary = checked / "cluster/profiles/gpu.tfvars"
    said = terraform(
        checked / "cluster", environment, "test", "-filter=tests/case.tftest.hcl", f"-var-file={ordinary}",
        f"-var-file={FOLDER / 'vllm-kserve/cluster.tfvars'}",
    )  # fmt: skip
    (checked / "cluster/tests/case.tftest.hcl").unlink()
    assert "1 passed, 0 failed" in said
