"""The jobs of `fmops run --on eks` fit KubeRay's schema, and the cluster's own policies admit them."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import yaml
from manifests import (
    DIGEST,
    PLATFORM,
    ROOT,
    cluster_values,
    crd_folder,
    policy_findings,
    render,
    schema_findings,
)
from test_admission_policies import refusals

from fmops.errors import FmopsError
from fmops.lifecycle import Lifecycle
from fmops.orchestration.deploy import Platform
from fmops.orchestration.graph import build
from fmops.orchestration.plan import Step
from fmops.orchestration.ray_jobs import SHARED_CLAIM, SHARED_FOLDER, SUBMITTER, WORKSPACE, Run, ray_job
from fmops.orchestration.shares import POOLS, share_of
from fmops.orchestration.sizing import Shape, Work, instances

pytestmark = pytest.mark.xdist_group("infra-manifests")

SHAPE = Shape(
    layers=32, hidden=4096, feed_forward=14336, heads=32, key_heads=8, head_size=128, vocabulary=128256, tied=False
)


LARGE = SHAPE.model_copy(update={"layers": 80, "hidden": 5120, "feed_forward": 27648, "heads": 40})


ENGINES = ("auto", "vllm", "transformers", "openvino")


def platform(profile, *, shared=True):
    registry = "1.dkr.ecr.us-east-1.amazonaws.com/fmops"
    return Platform("fmops", profile, registry, {"stages": DIGEST}, cluster_values(profile)["pools"], shared)


def work(*, lora=False):
    return Work(1e8, 2048, 512 * 2048, lora=lora)


def job(profile, tmp_path, *, lora=True, shape=SHAPE):
    spec = Lifecycle.model_validate(
        {
            "name": "mine",
            "base": "hf://a/b",
            "data": {"corpora": {"d": {"source": "s3://c/d"}}},
            "pretrain": {"tokens": 9},
        }
    )
    step = Step(build(spec, tmp_path).nodes["pretrain"], "run", "", fingerprint="cd" * 32)
    share = share_of("pretrain", shape=shape, work=work(lora=lora), platform=platform(profile))
    return ray_job(
        step, share=share, run=Run("mine", "name: mine\n", "s3://bucket/fmops", platform(profile)), attempt=1
    )


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


def test_a_stage_that_does_not_train_in_ranks_gets_one_device_if_its_code_uses_one():
    gpu = platform("gpu")
    shares = [share_of("release", shape=SHAPE, work=None, framework=engine, platform=gpu) for engine in ENGINES]
    assert [share.count for share in shares] == [1, 1, 0, 0]
    assert share_of("evaluate", shape=SHAPE, work=Work(1e6, 350, 64 * 350, lora=True), platform=gpu).pool == "cpu"
    assert share_of("release", shape=LARGE, work=None, framework="auto", platform=gpu).pool == "cpu"
    with pytest.raises(FmopsError, match=r"release with 40.3 B parameters fits on one device of none of g6.xlarge, "):
        share_of("release", shape=LARGE, work=None, framework="vllm", platform=gpu)
    with pytest.raises(FmopsError, match=r"align with 8.0 B parameters fits on one device of none of g6.xlarge, "):
        share_of("align", shape=SHAPE, work=Work(1e6, 2048, 64 * 2048), platform=gpu)


def gang(tmp_path):
    manifest = job("gpu", tmp_path, lora=False, shape=LARGE)
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return manifest, cluster["headGroupSpec"], workers


def test_what_one_node_does_not_hold_is_a_gang_of_whole_nodes_with_a_fabric(tmp_path):
    """40 B parameters with Adam's state are 640 GB: more than the eight devices of a p5 have room for."""
    _, head, workers = gang(tmp_path)
    pods = [each["template"]["spec"] for each in (head, workers)]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] > 0
    kinds = [pod["nodeSelector"] for pod in pods]
    assert kinds[0] == kinds[1]
    on = instances()[kinds[0]["node.kubernetes.io/instance-type"]]
    for pod in pods:
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == str(on.devices)
        assert limits["vpc.amazonaws.com/efa"] == str(on.efa)
        (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == WORKSPACE]
        assert mount["subPath"] == SHARED_FOLDER
    variables = {each["name"]: each["value"] for each in pods[0]["containers"][0]["env"]}
    assert variables["FMOPS_LAUNCHER"] == "ray"
    processes, threads = int(variables["FMOPS_PROCESSES"]), int(variables["FMOPS_THREADS"])
    assert processes == on.devices * (1 + workers["replicas"])
    # What Ray sets aside for the ranks of a node is there.
    assert on.devices * threads <= int(head["rayStartParams"]["num-cpus"])
    assert workers["rayStartParams"] == head["rayStartParams"]
    # The stage is in the head: a hook in a worker would look for it in vain.
    assert "lifecycle" in pods[0]["containers"][0]
    assert "lifecycle" not in pods[1]["containers"][0]


def test_a_gang_fits_its_schema_keeps_the_rules_and_is_admitted(tmp_path):
    manifest, _, workers = gang(tmp_path)
    assert schema_findings(manifest, crd_folder()) == policy_findings(manifest) == []
    assert refusals("ray-with-token", manifest) == []
    pod = {"kind": "Pod", "metadata": {"name": "x"}, "spec": workers["template"]["spec"]}
    assert refusals("images-by-digest", pod) == refusals("requests-and-limits", pod) == []
    # And the checks look into workers, too.
    workers["template"]["spec"]["containers"][0]["image"] = "stages:latest"
    assert "no digest" in " ".join(policy_findings(manifest))
    workers["replicass"] = 1
    assert "replicass" in " ".join(schema_findings(manifest, crd_folder()))


def test_a_gang_without_a_shared_file_system_or_nodes_for_it_is_refused_with_the_remedy():
    with pytest.raises(FmopsError, match=r"takes 2 × p5\.48xlarge, whose processes share files.*Set `lustre` in"):
        share_of("pretrain", shape=LARGE, work=work(), platform=platform("gpu", shared=False))
    few = dataclasses.replace(platform("gpu"), pools={"gpu-training": 191})
    with pytest.raises(FmopsError, match=r"one node, nor on the nodes of a pool with EFA \(gpu-training: 191 vCPU\)"):
        share_of("pretrain", shape=LARGE, work=work(), platform=few)
    with pytest.raises(FmopsError, match="torchtitan starts its own processes, on one node alone; our own trainers"):
        share_of("pretrain", shape=LARGE, work=work(), framework="torchtitan", platform=platform("gpu"))
    with pytest.raises(FmopsError, match=r"nor on the nodes of a pool with EFA \(it has none\)"):
        share_of("pretrain", shape=LARGE, work=work(), platform=platform("neuron"))


def test_torchtitan_keeps_a_share_of_the_model_in_each_process_where_transformers_keeps_it_whole():
    """Sixteen whole models of 8 B in 32 bits do not go into the 512 GiB of a trn1.32xlarge; their shards do."""
    neuron = platform("neuron")
    shares = {
        framework: share_of("pretrain", shape=SHAPE, work=work(), framework=framework, platform=neuron)
        for framework in ("transformers", "torchtitan")
    }
    assert {name: share.count for name, share in shares.items()} == {"transformers": 8, "torchtitan": 16}


def test_llama_factory_holds_the_model_whole_in_each_process():
    with pytest.raises(FmopsError, match=r"instruct with 8\.0 B parameters fits on one node of none of"):
        share_of("instruct", shape=SHAPE, work=work(), framework="llama-factory", platform=platform("gpu"))
    share = share_of("instruct", shape=SHAPE, work=work(lora=True), framework="llama-factory", platform=platform("gpu"))
    assert share.count >= 1


def test_the_file_system_of_a_gang_is_the_one_that_the_platform_mounts():
    made = [each for each in yaml.safe_load_all(render("queues", "gpu", lustre=True)) if each]
    claims = {each["metadata"]["name"]: each for each in made if each["kind"] == "PersistentVolumeClaim"}
    assert claims[SHARED_CLAIM]["metadata"]["namespace"] == "fmops-train"
    (folder,) = [each for each in made if each["kind"] == "Job"]
    assert folder["spec"]["template"]["spec"]["containers"][0]["command"][-1] == f"/lustre/{SHARED_FOLDER}"
    for manifest in made:
        assert schema_findings(manifest, crd_folder()) == policy_findings(manifest) == []
    kinds = {each["kind"] for each in yaml.safe_load_all(render("queues", "gpu")) if each}
    assert not kinds & {"PersistentVolume", "PersistentVolumeClaim", "Job"}


@pytest.mark.parametrize("profile", ["gpu", "neuron"])
def test_the_queue_admits_as_many_nodes_of_a_pool_as_its_ceiling_lets_run(profile):
    quotas = yaml.safe_load((PLATFORM / "queues/values.yaml").read_text())
    for name, each in instances().items():
        pool = POOLS[profile].get(name.partition(".")[0])
        if pool and "training" in pool:
            nodes = cluster_values(profile)["pools"][pool] // each.vcpu
            assert nodes * each.devices <= quotas["devices"][pool]["count"]
            assert 0.9 * each.host_gib <= quotas["memoryPerCpu"] * each.vcpu


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
