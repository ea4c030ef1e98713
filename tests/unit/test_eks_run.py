"""`fmops run --on eks`: stages as jobs, against a Kubernetes API and an S3 over real HTTP.

The fake API runs no controllers: the test plays KubeRay, and runs each job's own entrypoint as the pod would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_kubernetes
import local_s3
import pytest
import yaml

from fmops.adapters.kubernetes import connect
from fmops.cli import cli
from fmops.errors import EXIT_MEMORY, EXIT_TERMINATED, FmopsError, StageFailed
from fmops.orchestration.cluster_plan import render_cluster_plan
from fmops.orchestration.deploy import Platform
from fmops.orchestration.eks import EksLauncher, render_run
from fmops.orchestration.project import Project

DIGEST = "sha256:" + "ab" * 32
STORE = f"s3://{local_s3.BUCKET}/eks"
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
LOST = {"jobDeploymentStatus": "Failed", "reason": "JobStatusCheckTimeoutExceeded", "message": "checks were failing"}


def platform(profile="cpu"):
    return Platform("fmops", profile, "1.dkr.ecr.us-east-1.amazonaws.com/fmops", {"stages": DIGEST})


class KubeRay:
    """Moves a job a state further at each look; `outcome` decides what its pod does."""

    def __init__(self, api, spec: Path, outcome=None):
        self.api, self.spec, self.outcome = api, spec, outcome or self.stage
        self.stamp = 0

    def __call__(self, _seconds: float) -> None:
        for job in [each for each in list(self.api.objects.values()) if each["kind"] == "RayJob"]:
            name, status = job["metadata"]["name"], job.get("status") or {}
            match status.get("jobDeploymentStatus"):
                case None:
                    owner = {"uid": job["metadata"]["uid"]}
                    labels = {"batch.kubernetes.io/job-name": name}
                    about = {"name": f"{name}-x1", "labels": labels, "ownerReferences": [owner]}
                    pod = {"kind": "Pod", "metadata": about}
                    self.api.objects[f"/api/v1/namespaces/fmops-train/pods/{name}-x1"] = pod
                    status = {"jobDeploymentStatus": "Initializing", "rayClusterName": f"{name}-c"}
                case "Initializing":
                    status = status | {"jobDeploymentStatus": "Running"}
                case "Running" | "Retrying":
                    status = status | self.outcome(job)
            self.api.change("RayJob", name, status=status)

    def say(self, job, *lines: str) -> None:
        log = self.api.logs.setdefault((f"{job['metadata']['name']}-x1", "ray-job-submitter"), [])
        for line in lines:
            self.stamp += 1
            log.append((f"2026-11-25T00:00:{self.stamp:02d}.5Z", line))

    def stage(self, job):
        """What the pod does: the entrypoint, with its folders somewhere else."""
        command = job["spec"]["entrypoint"].split()
        assert command[0] == "fmops"
        places = {"/srv/lifecycle.yaml": str(self.spec), "/scratch/fmops": str(self.spec.parent / "pod")}
        command = [sys.executable, "-m", *(places.get(part, part) for part in command)]
        done = subprocess.run(command, capture_output=True, text=True)
        self.say(job, "Submitting job…", *done.stdout.splitlines())
        return {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"} if done.returncode == 0 else FAILED


@pytest.fixture
def api(tmp_path, monkeypatch):
    with fake_kubernetes.serve() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        yield api


@pytest.fixture
def spec(tmp_path, tiny_model, monkeypatch):
    from pydoc_data.topics import topics

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with local_s3.serve() as s3:
        for name, value in (s3.environment | {"FMOPS_STORE": STORE}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "docs").mkdir()
        for name in sorted(topics)[:12]:
            (tmp_path / "docs" / f"{name}.txt").write_text(topics[name])
        path = tmp_path / "lifecycle.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "name": "mine", "base": os.path.relpath(tiny_model, tmp_path),
                    "data": {"corpora": {"docs": {"source": "docs/*.txt"}}}, "pretrain": {"tokens": 1024},
                    "curate": {"block_tokens": 128, "quality": False},
                }
            )
        )  # fmt: skip
        yield path


def launch(spec, name, kuberay, *, events=None, baked_in=True, profile="cpu"):
    project = Project.open(spec)
    launcher = EksLauncher(connect(), platform(profile), baked_in=baked_in, sleep=kuberay)
    step = project.planner().plan()[name]
    return launcher(
        project, name, fingerprint=step.fingerprint, log=spec.parent / f"{name}.log",
        on_event=(events if events is not None else []).append,
    )  # fmt: skip


def jobs(api):
    return [each for each in api.objects.values() if each["kind"] == "RayJob"]


def test_a_stage_runs_as_a_job_and_its_record_comes_back_through_the_bucket(api, spec):
    events = []
    record = launch(spec, "base", KubeRay(api, spec), events=events)
    assert record.kind == "checkpoint"
    assert Project.open(spec).store.find(record.stage, record.fingerprint) == record
    (job,) = jobs(api)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "stages"
    assert api.find("ConfigMap", job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][0][
        "configMap"]["name"])["data"]["lifecycle.yaml"] == spec.read_text()  # fmt: skip
    told = [event.get("text", "") for event in events]
    assert any("states no licence" in text for text in told), told
    assert [text.partition(": ")[2] for text in told if text.startswith("RayJob")][:2] == [
        "waits in the queue", "its pod starts, on a new node if there is none",
    ]  # fmt: skip
    assert "Submitting job" in (spec.parent / "base.log").read_text()
    # What came once does not come again, though the API knows seconds only.
    assert len(told) == len(set(told))


def test_a_launcher_that_was_killed_finds_its_job_again(api, spec):
    first = KubeRay(api, spec)

    def killed(seconds):
        first(seconds)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        launch(spec, "base", killed)
    events = []
    record = launch(spec, "base", first, events=events)
    assert record.kind == "checkpoint"
    assert len(jobs(api)) == 1
    assert any("is there already; following it" in event.get("text", "") for event in events)


def test_a_lost_node_is_kuberays_business_and_is_told(api, spec):
    states = iter([{"jobDeploymentStatus": "Retrying"}])
    kuberay = KubeRay(api, spec)
    kuberay.outcome = lambda job: next(states, None) or kuberay.stage(job)
    events = []
    launch(spec, "base", kuberay, events=events)
    assert any("its node was lost; starting again" in event.get("text", "") for event in events)


def test_a_job_that_kuberay_gave_up_is_submitted_again(api, spec):
    endings = iter([LOST])
    kuberay = KubeRay(api, spec)
    kuberay.outcome = lambda job: next(endings, None) or kuberay.stage(job)
    events = []
    assert launch(spec, "base", kuberay, events=events).kind == "checkpoint"
    told = [event.get("text", "") for event in events]
    assert any(text.endswith("ended as Failed: checks were failing. It is submitted again.") for text in told), told
    kuberay.outcome = lambda job: LOST
    with pytest.raises(StageFailed, match=r"corpus: RayJob corpus-.* ended as Failed: checks were failing"):
        launch(spec, "corpus", kuberay)
    assert [verb for verb, path in api.requests if path.endswith("/rayjobs") and verb == "POST"] == ["POST"] * (2 + 4)


def test_a_stage_that_was_told_to_leave_goes_on_in_another_job(api, spec):
    kuberay = KubeRay(api, spec)
    endings = iter([json.dumps({"event": "failed", "error": "told to leave.", "code": EXIT_TERMINATED})])

    def outcome(job):
        for line in endings:
            kuberay.say(job, line)
            return FAILED
        return kuberay.stage(job)

    kuberay.outcome = outcome
    assert launch(spec, "base", kuberay).kind == "checkpoint"


def test_what_failed_for_a_reason_is_taken_away_before_kuberay_tries_it_again(api, spec):
    kuberay = KubeRay(api, spec)

    def fail(job):
        kuberay.say(job, json.dumps({"event": "failed", "error": "no document is left.", "code": 2}))
        return {"jobDeploymentStatus": "Retrying"}

    kuberay.outcome = fail
    with pytest.raises(StageFailed, match="base: no document is left"):
        launch(spec, "base", kuberay)
    assert jobs(api) == []


def test_the_stages_own_error_and_exit_code_come_back(api, spec):
    kuberay = KubeRay(api, spec)

    def fail(job):
        kuberay.say(job, json.dumps({"event": "failed", "error": "no document is left.", "code": 2}))
        return FAILED

    kuberay.outcome = fail
    with pytest.raises(StageFailed, match="base: no document is left") as caught:
        launch(spec, "base", kuberay)
    assert caught.value.exit_code == 2
    # A second run replaces the job that failed.
    assert launch(spec, "base", KubeRay(api, spec)).kind == "checkpoint"


def test_want_of_memory_starts_another_job_with_smaller_micro_batches(api, spec):
    launch(spec, "base", KubeRay(api, spec))
    launch(spec, "corpus", KubeRay(api, spec))
    kuberay = KubeRay(api, spec)
    environments = []

    def starve(job):
        environments.append(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"])
        kuberay.say(job, json.dumps({"event": "failed", "error": "out of memory.", "code": EXIT_MEMORY}))
        return FAILED

    kuberay.outcome = starve
    with pytest.raises(StageFailed, match="out of memory") as caught:
        launch(spec, "pretrain", kuberay)
    assert caught.value.exit_code == EXIT_MEMORY
    parts = [{each["name"]: each["value"] for each in env}.get("FMOPS_MICRO_BATCH_PARTS") for env in environments]
    assert parts == [None, "2", "4"]


def test_ctrl_c_ends_the_job(api, spec):
    kuberay = KubeRay(api, spec)

    def pressed(seconds):
        kuberay(seconds)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(spec, "base", pressed)
    assert jobs(api) == []


def test_what_the_cluster_cannot_reach_is_refused_before_anything_is_submitted(api, spec, monkeypatch):
    with pytest.raises(FmopsError, match=r"base reads .*which lies on this machine.*s3://.*--baked-in"):
        launch(spec, "base", KubeRay(api, spec), baked_in=False)
    monkeypatch.delenv("FMOPS_STORE")
    with pytest.raises(FmopsError, match=r"the cluster cannot reach .*--store s3://bucket/prefix"):
        launch(spec, "base", KubeRay(api, spec))
    assert jobs(api) == []


def test_a_dry_run_prints_every_job_and_asks_nobody(spec):
    text = render_run(Project.open(spec), platform=platform("gpu"), baked_in=True)
    manifests = list(yaml.safe_load_all(text))
    assert [each["kind"] for each in manifests[:2]] == ["ConfigMap", "RayJob"]
    stages = [each["metadata"]["labels"]["fmops/stage"] for each in manifests[1:]]
    assert stages == list(Project.open(spec).graph.nodes)
    pretrain = manifests[1 + stages.index("pretrain")]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert pretrain["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pretrain["nodeSelector"]["node.kubernetes.io/instance-type"].startswith("g6")
    assert pretrain["containers"][0]["image"].endswith(f"/stages@{DIGEST}")


def large_model(spec, tiny_model, **pretrain):
    """The spec over a base of 40 billion parameters, of which its config alone is there."""
    shutil.copytree(tiny_model, spec.parent / "large")
    config = spec.parent / "large" / "config.json"
    large = {"hidden_size": 5120, "num_hidden_layers": 80, "intermediate_size": 27648, "num_attention_heads": 40}
    large |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    config.write_text(json.dumps(json.loads(config.read_text()) | large))
    said = yaml.safe_load(spec.read_text())
    spec.write_text(yaml.safe_dump(said | {"base": "large", "pretrain": {"batch_tokens": 2**20, **pretrain}}))


@pytest.mark.parametrize("priority", ["run", "urgent"])
def test_a_priority_is_one_of_the_queues_classes(spec, priority):
    said = render_run(Project.open(spec), platform=platform("gpu"), baked_in=True, priority=priority)
    labels = [each["metadata"]["labels"] for each in list(yaml.safe_load_all(said))[1:]]
    assert {each["kueue.x-k8s.io/priority-class"] for each in labels} == {priority}
    option = next(each for each in cli.commands["run"].params if each.name == "priority")
    queues = Path(__file__).resolve().parents[2] / "infra/platform/queues/templates/queues.yaml"
    classes = re.search(r"dict (.+) }}\n---\n.+\nkind: WorkloadPriorityClass", queues.read_text())
    assert set(re.findall(r'"(\w+)"', classes[1])) == set(option.type.choices)


def test_a_dry_run_shows_a_gang_for_what_one_node_does_not_hold(spec, tiny_model):
    large_model(spec, tiny_model, tokens=2**24)
    gpu = dataclasses.replace(platform("gpu"), pools={"gpu-training": 768}, shared_files=True)
    jobs = list(yaml.safe_load_all(render_run(Project.open(spec), platform=gpu, baked_in=True)))[1:]
    clusters = {each["metadata"]["labels"]["fmops/stage"]: each["spec"]["rayClusterSpec"] for each in jobs}
    gangs = {name: cluster["workerGroupSpecs"] for name, cluster in clusters.items() if "workerGroupSpecs" in cluster}
    assert {name: [group["replicas"] for group in groups] for name, groups in gangs.items()} == {"pretrain": [1]}


def test_a_plan_names_the_nodes_of_training_and_of_the_endpoint(spec):
    text = render_cluster_plan(Project.open(spec), on=None, nodes=None, requests_per_s=1.0)
    assert re.search(r"pretrain +1,024 +1 × g6\.xlarge +1 × 1 × 1 +0\.0 of 24 +0\.1", text), text
    assert "endpoint: 1 requests/s of 512 and 256 tokens" in text


def test_a_plan_says_what_a_device_holds_and_how_often_a_state_pays(spec, tiny_model):
    """Two nodes are taken because 16 bytes a parameter fill 16 devices; for days, so states are worth their time."""
    short = render_cluster_plan(Project.open(spec), on=None, nodes=None, requests_per_s=1.0)
    assert re.search(r"^pretrain .+ 100\.0% +end$", short, re.MULTILINE), short
    large_model(spec, tiny_model, tokens=2**34)
    text = render_cluster_plan(Project.open(spec), on="p5.48xlarge", nodes=None, requests_per_s=1.0)
    found = re.search(r"^pretrain .* 2 × p5\.48xlarge .* (\d+\.\d) of 80 .* (\d+) min$", text, re.MULTILINE)
    assert found, text
    # On the 8 devices of one node it would be twice that, which is more than nine tenths.
    assert 36 < float(found[1]) < 72
    # √(2 · 4.0 s · 50,700 h / 16 devices)
    assert 155 < int(found[2]) < 162


def test_an_image_without_digest_is_refused(spec):
    unbuilt = Platform("fmops", "cpu", "registry", {})
    with pytest.raises(FmopsError, match=r"unknown image of images\.lock\.yaml 'stages'"):
        render_run(Project.open(spec), platform=unbuilt, baked_in=True)


@pytest.fixture
def dagsters(api, spec, tmp_path, monkeypatch):
    """The definitions as Dagster's pod on the cluster loads them, and KubeRay beside it."""
    from fmops.orchestration import code_location, eks

    folder = tmp_path / "platform"
    folder.mkdir()
    (folder / "cluster.yaml").write_text(
        yaml.safe_dump({"cluster": {"name": "fmops", "profile": "cpu", "registry": "1.dkr.ecr/fmops"}})
    )
    (folder / "images.lock.yaml").write_text(yaml.safe_dump({"images": {"stages": {"tag": "1", "digest": DIGEST}}}))
    monkeypatch.setenv("FMOPS_PLATFORM", str(folder))
    monkeypatch.setattr(eks, "POLL_S", 0.0)
    kuberay = KubeRay(api, spec)
    api.before = lambda verb, path: kuberay(0) if verb == "GET" and "/rayjobs/" in path else None
    return code_location.load(str(spec), str(tmp_path / "workspace"))


def test_a_run_from_dagsters_page_is_a_job_of_the_cluster(api, dagsters):
    import dagster as dg

    with dg.DagsterInstance.ephemeral() as instance:
        done = dagsters.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(["base"])]
        )
    assert done.success
    (job,) = jobs(api)
    assert job["metadata"]["labels"]["fmops/stage"] == "base"
    assert job["spec"]["entrypoint"].startswith("fmops stage base --spec /srv/lifecycle.yaml")


def test_a_change_of_the_spec_starts_one_run_and_the_loop_is_left_to_where_the_traces_are(dagsters, spec):
    import dagster as dg

    sensor = dagsters.resolve_sensor_def("changes")
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance=instance, definitions=dagsters)
        first = sensor(context)
        assert [key.path[-1] for key in first.asset_selection] == list(Project.open(spec).graph.nodes)
        assert "base: " in first.tags["fmops/why"]
        assert "a run was started for this already" in sensor(context).skip_message
    assert not dagsters.schedules
