"""The jobs of `fmops run --on eks` fit KubeRay's schema, and the cluster's own policies admit them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest
import yaml
from manifests import DIGEST, PLATFORM, ROOT, crd_folder, policy_findings, schema_findings
from test_admission_policies import refusals

from fmops.errors import FmopsError
from fmops.lifecycle import Lifecycle
from fmops.orchestration.deploy import Platform
from fmops.orchestration.graph import build
from fmops.orchestration.ray_jobs import POOLS, SUBMITTER, ray_job, share_of, spec_map
from fmops.orchestration.sizing import Shape, Work, instances

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


def head_of(manifest):
    return manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize("profile", ["cpu", "gpu", "neuron"])
def test_a_job_fits_its_schema_and_keeps_the_rules(profile, tmp_path):
    manifest = job(profile, tmp_path)
    assert schema_findings(manifest, crd_folder()) == []
    assert policy_findings(manifest) == []


@pytest.mark.parametrize("profile", ["cpu", "gpu", "neuron"])
def test_the_cluster_admits_it(profile, tmp_path):
    manifest = job(profile, tmp_path)
    assert refusals("ray-with-token", manifest) == []
    for spec in (head_of(manifest), manifest["spec"]["submitterPodTemplate"]["spec"]):
        pod = {"kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        assert refusals("images-by-digest", pod) == refusals("requests-and-limits", pod) == []


def test_a_job_without_a_token_would_be_refused(tmp_path):
    manifest = copy.deepcopy(job("cpu", tmp_path))
    del manifest["spec"]["rayClusterSpec"]["authOptions"]
    assert "mode: token" in refusals("ray-with-token", manifest)[0]


def test_what_one_device_does_not_hold_gets_more(tmp_path):
    def asked(manifest):
        pod = head_of(manifest)
        container = pod["containers"][0]
        variables = {each["name"]: each["value"] for each in container["env"]}
        return int(container["resources"]["limits"]["nvidia.com/gpu"]), variables, pod["nodeSelector"]

    few, variables, node = asked(job("gpu", tmp_path))
    assert few == 1
    assert "FMOPS_PROCESSES" not in variables
    # Eight billion weights in 32 bits do not pass through the 32 GiB of a g6e.xlarge.
    assert node == {"fmops/pool": "gpu-inference", "node.kubernetes.io/instance-type": "g6e.2xlarge"}
    many, variables, node = asked(job("gpu", tmp_path, lora=False))
    assert many > few
    assert variables["FMOPS_PROCESSES"] == str(many)
    assert int(variables["FMOPS_THREADS"]) == int(variables["OMP_NUM_THREADS"]) > 1
    assert node["node.kubernetes.io/instance-type"].partition(".")[0] in POOLS["gpu"]


def test_a_stage_that_does_not_train_in_ranks_gets_one_device():
    share = share_of("evaluate", shape=SHAPE, work=Work(1e6, 350, 64 * 350, lora=True), profile="gpu")
    assert (share.count, share.processes) == (1, 1)
    with pytest.raises(FmopsError, match=r"align with 8.0 B parameters fits on one device of none of g6.xlarge, "):
        share_of("align", shape=SHAPE, work=Work(1e6, 2048, 64 * 2048), profile="gpu")


@pytest.mark.parametrize("profile", ["gpu", "neuron"])
def test_each_family_is_started_by_the_pool_that_is_named_and_the_queue_has_devices_for_it(profile):
    pools = yaml.safe_load((PLATFORM / "nodes/values.yaml").read_text())["pools"]
    quotas = yaml.safe_load((PLATFORM / "queues/values.yaml").read_text())["devices"]
    for family, pool in POOLS[profile].items():
        (families,) = [
            rule["values"] for rule in pools[pool]["requirements"] if rule["key"].endswith("instance-family")
        ]
        assert family in families
        most = max(each.devices for name, each in instances().items() if name.partition(".")[0] == family)
        assert most <= quotas[pool]["count"]


def test_the_submitter_waits_on_a_node_without_accelerators(tmp_path):
    manifest = job("gpu", tmp_path)
    submitter = manifest["spec"]["submitterPodTemplate"]["spec"]
    assert submitter["nodeSelector"] == {"fmops/pool": "cpu"}
    assert [each["name"] for each in submitter["containers"]] == [SUBMITTER]


# What KubeRay 1.7 adds to a head in SidecarMode (its GetDefaultSubmitterContainer): no security context.
SIDECAR = {
    "name": "ray-job-submitter",
    "image": f"registry/stages@{DIGEST}",
    "resources": {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
}


def test_a_submitter_beside_the_head_would_break_the_rules_of_the_namespace(tmp_path):
    manifest = copy.deepcopy(job("cpu", tmp_path))
    assert manifest["spec"]["submissionMode"] == "K8sJobMode"
    head_of(manifest)["containers"].append(SIDECAR)
    assert "may gain privileges" in " ".join(policy_findings(manifest))


def test_ray_is_the_version_that_the_image_installs(tmp_path):
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"\nray=={job('cpu', tmp_path)['spec']['rayClusterSpec']['rayVersion']}\n" in pinned


def test_before_its_pod_goes_a_stage_hears_of_it_and_leaves_in_its_own_time(tmp_path):
    """The very command of the manifest, on a process that takes a moment to write its state."""
    head = head_of(job("cpu", tmp_path))
    shell, option, script = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    (pid_file,) = [each["value"] for each in head["containers"][0]["env"] if each["name"] == "FMOPS_PID_FILE"]
    state = tmp_path / "state"
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(state)], env=os.environ | {"FMOPS_PID_FILE": str(tmp_path / "pid")},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with stage.stdout:
        assert stage.stdout.readline() == b"ready\n"
    reaper = threading.Thread(target=stage.wait)
    reaper.start()
    done = subprocess.run([shell, option, script.replace(pid_file, str(tmp_path / "pid"))], timeout=60)
    reaper.join()
    assert done.returncode == 0
    assert state.read_text() == "sealed"


STAGE = """
import os, pathlib, signal, sys, threading
pathlib.Path(os.environ["FMOPS_PID_FILE"]).write_text(str(os.getpid()))
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
print("ready", flush=True)
told.wait()
pathlib.Path(sys.argv[1]).write_text("sealed")
"""
