"""`fmops run --on eks` on a real Ray: a stage sent as a job with a token, a node killed under it, the same weights.

The Kubernetes API is ours; the test plays KubeRay and sends each RayJob's own entrypoint to a cluster of two nodes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra `ray` is not installed", allow_module_level=True)

import fake_kubernetes
import local_s3
import yaml
from ray_cluster import lose_a_node, two_nodes

from fmops.adapters.kubernetes import connect
from fmops.orchestration.deploy import Platform
from fmops.orchestration.eks import EksLauncher
from fmops.orchestration.execute import LAUNCHER, PROCESSES, execute
from fmops.orchestration.project import Project

pytestmark = pytest.mark.xdist_group("ray")

STAMP = "2026-11-27T00:00:00.{:09d}Z"
GANG = {LAUNCHER: "ray", PROCESSES: "2"}
"""What a job over several nodes says of itself; the spec's runtime is for one machine."""
ENDED = {"SUCCEEDED": "Complete", "FAILED": "Failed", "STOPPED": "Complete"}


class KubeRay:
    """Sends a RayJob's entrypoint to `cluster` at the first look, and takes its state and log over at every other."""

    def __init__(self, api, cluster, spec: Path):
        from ray.job_submission import JobSubmissionClient

        self.api, self.cluster, self.spec = api, cluster, spec
        self.client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
        self.killed = False

    def __call__(self, seconds: float) -> None:
        for job in [each for each in list(self.api.objects.values()) if each["kind"] == "RayJob"]:
            name = job["metadata"]["name"]
            if "status" not in job:
                pod = {"kind": "Pod", "metadata": {"name": name, "labels": {"batch.kubernetes.io/job-name": name}}}
                self.api.objects[f"/api/v1/namespaces/fmops-train/pods/{name}"] = pod
                entrypoint = self._here(job["spec"]["entrypoint"])
                self.client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"env_vars": GANG})
                self.api.change("RayJob", name, status={"jobDeploymentStatus": "Running"})
                continue
            state = self.client.get_job_status(name)
            lines = self.client.get_job_logs(name).splitlines()
            self.api.logs[name, "ray-job-submitter"] = [(STAMP.format(n), line) for n, line in enumerate(lines, 1)]
            if not self.killed and any('"event": "metrics", "step": 14,' in line for line in lines):
                self.killed = True
                lose_a_node(self.cluster)
            if state in ENDED:
                status = {"jobDeploymentStatus": ENDED[state], "jobStatus": str(state.value), "reason": "AppFailed"}
                self.api.change("RayJob", name, status=status)
        time.sleep(min(seconds, 0.05))  # between looks at a process of another kind; nothing waits for it to pass

    def _here(self, entrypoint: str) -> str:
        """The same command with the folders of the pod somewhere else."""
        places = {"/srv/lifecycle.yaml": str(self.spec), "/scratch/fmops": str(self.spec.parent / "pod")}
        return " ".join(places.get(part, part) for part in entrypoint.split())


@pytest.fixture
def spec(tmp_path, tiny_model, monkeypatch):
    from pydoc_data.topics import topics

    (tmp_path / "docs").mkdir()
    for name in sorted(topics)[:60]:
        (tmp_path / "docs" / f"{name}.txt").write_text(topics[name])
    path = tmp_path / "lifecycle.yaml"
    said = {
        "name": "mine", "base": os.path.relpath(tiny_model, tmp_path),
        "data": {"corpora": {"docs": {"source": "docs/*.txt"}}}, "curate": {"block_tokens": 128, "quality": False},
        "pretrain": {"tokens": 18_432, "batch_tokens": 384, "checkpoints": 8, "evaluations": 1},
        "runtime": {"processes": 2, "sharding": "ddp", "threads": 1, "precision": "float32"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(said))
    with local_s3.serve() as s3, fake_kubernetes.serve() as api:
        for name, value in (s3.environment | {"FMOPS_STORE": f"s3://{local_s3.BUCKET}/ray"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        yield path, api


def made_here(spec: Path, name: str):
    return execute(Project.open(spec), name, fingerprint=None, stream=io.StringIO())


def test_a_node_dies_during_pretraining_and_the_weights_are_those_of_a_run_that_was_left_alone(spec, monkeypatch):
    path, api = spec
    for name in ("base", "corpus"):
        made_here(path, name)
    platform = Platform("fmops", "cpu", "1.dkr.ecr.us-east-1.amazonaws.com/fmops", {"stages": "sha256:" + "ab" * 32})
    events = []
    with two_nodes(takes_jobs=True) as cluster:
        refused_without_the_token(cluster)
        kuberay = KubeRay(api, cluster, path)
        project = Project.open(path)
        launcher = EksLauncher(connect(), platform, baked_in=True, sleep=kuberay)
        record = launcher(
            project, "pretrain", fingerprint=project.planner().plan()["pretrain"].fingerprint,
            log=path.parent / "pretrain.log", on_event=events.append,
        )  # fmt: skip
    told = [event["text"] for event in events if "text" in event]
    assert kuberay.killed
    assert any(text.startswith("going on from checkpoint") for text in told), told
    assert record.artifact["trained_tokens"] > 10_000

    # The same work under torchrun, with nobody killed, for a bucket that knows nothing of it.
    monkeypatch.setenv("FMOPS_STORE", f"s3://{local_s3.BUCKET}/alone")
    alone = [made_here(path, name) for name in ("base", "corpus", "pretrain")][-1]
    assert (alone.fingerprint, alone.digest) == (record.fingerprint, record.digest)


def refused_without_the_token(cluster) -> None:
    import urllib.error
    import urllib.request

    address = f"http://{cluster.head_node.webui_url}/api/jobs/"
    body = json.dumps({"entrypoint": "id"}).encode()
    for headers in ({}, {"Authorization": "Bearer guessed"}):
        request = urllib.request.Request(
            address, data=body, headers={"Content-Type": "application/json"} | headers, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (401, 403)
