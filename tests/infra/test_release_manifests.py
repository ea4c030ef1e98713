"""What `fmops deploy` renders fits the cluster's schemas, keeps our rules, and waits longer than it drains."""

from __future__ import annotations

import pytest
import yaml
from manifests import DIGEST, PLATFORM, crd_folder, manifests, policy_findings, schema_findings
from test_admission_policies import refusals

from fmops.deployment.manifests import (
    DRAIN_S,
    PRE_STOP_S,
    Backend,
    Scale,
    disruption_budget,
    inference_service,
    placeholders,
    route,
)
from fmops.deployment.ray_serve import RAY, ray_service
from fmops.deployment.replica import replica_for

pytestmark = pytest.mark.xdist_group("infra-manifests")

KEY, NAME = "release-0123456789abcdef", "python-assistant"
URI = "s3://fmops-artifacts/assistant/artifacts/release-0123456789abcdef/fedcba9876543210"
LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "dtype": "bfloat16",
}  # fmt: skip
SCALE = Scale(least=2, most=6, warm=1, tokens_per_second=1500)
IMAGE = f"111122223333.dkr.ecr.us-east-1.amazonaws.com/fmops/any@{DIGEST}"


def replica(device):
    return replica_for(LLAMA_8B, weight_bytes=16_060_000_000, device=device, max_tokens=8192)


def rendered():
    gpu, neuron = replica("gpu"), replica("neuron")
    return {
        "vllm": inference_service(KEY, name=NAME, uri=URI, replica=gpu, scale=SCALE),
        "vllm-neuron": inference_service(KEY, name=NAME, uri=URI, replica=neuron, scale=SCALE),
        "ray": ray_service(KEY, name=NAME, uri=URI, replica=gpu, scale=SCALE, image=IMAGE),
        "budget": disruption_budget(KEY),
        "placeholders": placeholders(NAME, replica=gpu, warm=2, image=IMAGE),
        "route": route(NAME, cluster="fmops", champion=(KEY, Backend(service=f"{KEY}-predictor", port=80))),
    }


@pytest.mark.parametrize("what", rendered())
def test_what_is_deployed_fits_its_schema_and_keeps_the_rules(what):
    manifest = rendered()[what]
    assert schema_findings(manifest, crd_folder()) == []
    assert policy_findings(manifest) == []
    assert manifest["metadata"]["namespace"] == "fmops-serve"


def test_the_cluster_admits_what_is_deployed():
    everything = rendered()
    assert refusals("ray-with-token", everything["ray"]) == []
    for what in ("placeholders", "ray"):
        spec = everything[what]["spec"]
        templates = (
            [spec["template"]] if what == "placeholders"
            else [spec["rayClusterConfig"]["headGroupSpec"]["template"],
                  spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]]
        )  # fmt: skip
        for template in templates:
            pod = {"kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            assert refusals("images-by-digest", pod) == refusals("requests-and-limits", pod) == []


def test_a_tag_in_place_of_a_digest_is_refused():
    pod = placeholders(NAME, replica=replica("gpu"), warm=1, image="pause:3.10")
    assert policy_findings(pod) == [f"Deployment/{NAME}-warm: hold runs pause:3.10, which is no digest"]


@pytest.mark.parametrize(("device", "profile"), [("gpu", "gpu"), ("neuron", "neuron")])
def test_the_runtime_that_is_named_is_on_the_platform_and_lands_on_its_pool(device, profile):
    service = inference_service(KEY, name=NAME, uri=URI, replica=replica(device), scale=SCALE)["spec"]["predictor"]
    runtime = next(
        m for m in manifests(profile)
        if m["kind"] == "ClusterServingRuntime" and m["metadata"]["name"] == service["model"]["runtime"]
    )  # fmt: skip
    [asked] = [name for name in service["model"]["resources"]["limits"] if "/" in name]
    assert asked in runtime["spec"]["containers"][0]["resources"]["limits"]
    assert runtime["spec"]["tolerations"][0]["key"] == asked
    pools = {m["metadata"]["name"] for m in manifests(profile) if m["kind"] == "NodePool"}
    assert runtime["spec"]["nodeSelector"]["fmops/pool"] in pools


@pytest.mark.parametrize(("device", "profile"), [("gpu", "gpu"), ("neuron", "neuron")])
def test_a_pod_has_longer_than_it_waits_and_drains(device, profile):
    service = inference_service(KEY, name=NAME, uri=URI, replica=replica(device), scale=SCALE)["spec"]["predictor"]
    container = next(m for m in manifests(profile) if m["kind"] == "ClusterServingRuntime")["spec"]["containers"][0]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drains = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    assert waits + sum(drains) == PRE_STOP_S + DRAIN_S
    assert service["terminationGracePeriodSeconds"] > PRE_STOP_S + DRAIN_S
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


def test_queue_and_tokens_add_replicas_and_the_platform_has_who_does_it():
    predictor = inference_service(KEY, name=NAME, uri=URI, replica=replica("gpu"), scale=SCALE)["spec"]["predictor"]
    queue, tokens = (each["external"] for each in predictor["autoScaling"]["metrics"])
    assert queue["metric"]["query"] == (
        'sum(vllm:num_requests_waiting{namespace="fmops-serve",pod=~"release-0123456789abcdef-predictor-.*"})'
    )
    assert queue["target"] == {"type": "AverageValue", "averageValue": "4"}
    assert "vllm:generation_tokens_total" in tokens["metric"]["query"]
    assert tokens["target"]["averageValue"] == "1500"
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 6)
    apps = {m["metadata"]["name"] for m in manifests("gpu") if m["kind"] == "Application"}
    assert {"keda", "kube-prometheus-stack"} <= apps


def test_the_model_comes_by_the_digest_of_its_contents_and_answers_name_the_release():
    model = rendered()["vllm"]["spec"]["predictor"]["model"]
    assert model["storageUri"] == f"{URI}/model"
    at = model["args"].index("--served-model-name")
    assert model["args"][at + 1 : at + 3] == [KEY, NAME]


def test_ray_serves_the_same_model_cut_the_same_way():
    service = ray_service(KEY, name=NAME, uri=URI, replica=replica("gpu"), scale=SCALE, image=IMAGE)["spec"]
    [application] = yaml.safe_load(service["serveConfigV2"])["applications"]
    [model] = application["args"]["llm_configs"]
    assert model["model_loading_config"] == {"model_id": KEY, "model_source": {"bucket_uri": f"{URI}/model"}}
    assert model["engine_kwargs"]["tensor_parallel_size"] == replica("gpu").parallel
    listed = yaml.safe_load((PLATFORM / "images.yaml").read_text())["images"]
    assert f":{RAY}-" in listed["ray-llm"]["from"]


def test_a_placeholder_is_the_size_of_a_replica_and_gives_way_to_it():
    pod = placeholders(NAME, replica=replica("gpu"), warm=2, image=IMAGE)["spec"]["template"]["spec"]
    service = inference_service(KEY, name=NAME, uri=URI, replica=replica("gpu"), scale=SCALE)["spec"]["predictor"]
    assert pod["containers"][0]["resources"] == service["model"]["resources"]
    priorities = {m["metadata"]["name"]: m for m in manifests("gpu") if m["kind"] == "PriorityClass"}
    low, high = priorities[pod["priorityClassName"]], priorities[service["priorityClassName"]]
    assert low["value"] < 0 < high["value"]
    assert high["preemptionPolicy"] == "PreemptLowerPriority"
    assert pod["terminationGracePeriodSeconds"] == 0


def test_the_gateway_and_the_api_server_may_reach_what_serves():
    policy = next(
        m for m in manifests("gpu")
        if m["kind"] == "NetworkPolicy" and m["metadata"] == {"name": "allow-in", "namespace": "fmops-serve"}
    )  # fmt: skip
    ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
    assert {8000, 8080} <= ports
