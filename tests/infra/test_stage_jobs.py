"""The jobs of `fmops run --on eks` fit KubeRay's schema, and the cluster's own policies admit them."""

from __future__ import annotations

import copy

import pytest
from manifests import DIGEST, crd_folder, policy_findings, schema_findings
from test_admission_policies import refusals

from fmops.lifecycle import Lifecycle
from fmops.orchestration.deploy import Platform
from fmops.orchestration.graph import build
from fmops.orchestration.ray_jobs import ray_job, share_of, spec_map
from fmops.orchestration.sizing import Shape, Work

pytestmark = pytest.mark.xdist_group("infra-manifests")

SHAPE = Shape(
    layers=32, hidden=4096, feed_forward=14336, heads=32, key_heads=8, head_size=128, vocabulary=128256, tied=False
)


def job(profile, tmp_path, *, lora=True):
    spec = Lifecycle.model_validate(
        {
            "name": "mine",
            "base": "hf://a/b",
            "data": {"corpora": {"d": {"source": "s3://c/d"}}},
            "pretrain": {"tokens": 9},
        }
    )
    node = build(spec, tmp_path).nodes["pretrain"]
    work = Work(1e8, 2048, 64 * 2048, lora=lora)
    return ray_job(
        node, fingerprint="cd" * 32, attempt=0, share=share_of("pretrain", shape=SHAPE, work=work, profile=profile),
        spec=spec_map("name: mine\n"), store="s3://bucket/fmops", lifecycle="mine",
        platform=Platform("fmops", profile, "1.dkr.ecr.us-east-1.amazonaws.com/fmops", {"stages": DIGEST}),
        environment={"FMOPS_MICRO_BATCH_PARTS": "2"},
    )  # fmt: skip


@pytest.mark.parametrize("profile", ["cpu", "gpu", "neuron"])
def test_a_job_fits_its_schema_and_keeps_the_rules(profile, tmp_path):
    manifest = job(profile, tmp_path)
    assert schema_findings(manifest, crd_folder()) == []
    assert policy_findings(manifest) == []


@pytest.mark.parametrize("profile", ["cpu", "gpu", "neuron"])
def test_the_cluster_admits_it(profile, tmp_path):
    manifest = job(profile, tmp_path)
    assert refusals("ray-with-token", manifest) == []
    template = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    pod = {"kind": "Pod", "metadata": {"name": "head"}, "spec": template["spec"]}
    assert refusals("images-by-digest", pod) == refusals("requests-and-limits", pod) == []


def test_a_job_without_a_token_would_be_refused(tmp_path):
    manifest = copy.deepcopy(job("cpu", tmp_path))
    del manifest["spec"]["rayClusterSpec"]["authOptions"]
    assert "mode: token" in refusals("ray-with-token", manifest)[0]


def test_what_one_device_does_not_hold_gets_more(tmp_path):
    def devices(manifest):
        pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        return int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]), pod["nodeSelector"]

    few, many = devices(job("gpu", tmp_path)), devices(job("gpu", tmp_path, lora=False))
    assert few[0] == 1
    assert many[0] > few[0]
    assert many[1]["node.kubernetes.io/instance-type"].startswith("p")
