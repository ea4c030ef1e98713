"""`fmops deploy --on eks` from an order to traffic: an S3 API, a Kubernetes API, and engines that a test plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fake_kubernetes
import local_s3
import pytest
import yaml

from fmops.adapters.kubernetes import connect
from fmops.artifacts import Parity, Release
from fmops.deployment.manifests import Scale
from fmops.deployment.parity import CHAT_PROBES
from fmops.errors import FmopsError
from fmops.orchestration.deploy import READY_S, DeployFailed, Deployment, Platform, deploy_release, plan_deployment
from fmops.orchestration.project import Project
from fmops.orchestration.signatures import sign_release
from fmops.store import Record, Store, content_digest, file_entries, utc_now

pytestmark = pytest.mark.xdist_group("deploy")

STORE = f"s3://{local_s3.BUCKET}/tiny"
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "dtype": "bfloat16"}
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


@dataclass
class World:
    """A laptop with a spec, a bucket with two releases, a cluster."""

    spec: Path
    kubernetes: fake_kubernetes.FakeKubernetes
    first: str
    second: str

    @property
    def project(self) -> Project:
        return Project.open(self.spec)

    def planned(self, key: str, **scale: int) -> Deployment:
        platform = Platform.read(self.spec.parent / "platform")
        return plan_deployment(self.project, key, platform=platform, by="kserve", scale=Scale(**scale))

    def deploy(self, key: str, *, answer: str | None, status: dict | None = None, seconds: float = 1.0) -> list[str]:
        """Deploy while KServe reaches `status` at the second look, and its engine answers `answer`."""
        said: list[str] = []
        looks: list[float] = []
        if answer is not None:
            self.kubernetes.serve_with(f"http:{key}-predictor:80", lambda path, body: (200, reply(answer)))

        def sleep(_: float) -> None:
            looks.append(seconds)
            self.kubernetes.change("InferenceService", key, status=READY if status is None else status)

        deploy_release(
            self.planned(key), connect(), platform=Platform.read(self.spec.parent / "platform"), say=said.append,
            sleep=sleep, clock=lambda: sum(looks),
        )  # fmt: skip
        return said


def reply(text: str) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def add_release(store: Store, letter: str) -> Record:
    folder = store.folder("release", letter * 64)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model" / "model.safetensors").write_text(letter * 1000)
    probes = [{"name": f"chat/{name}", "answer": f"{letter} certified"} for name in CHAT_PROBES]
    (folder / "parity.json").write_text(json.dumps({"probes": probes}))
    parity = Parity(
        passed=True, prompts=1, engine="vllm", token_ids_equal=True, template_equal=True, greedy_equal=True,
        max_logprob_difference=0.0, tolerance=1e-3,
    )  # fmt: skip
    files = file_entries(folder)
    release = Release(path=folder, name="tiny", parity=parity, licence=None, verdict="promote")
    record = Record(
        node="release", stage="release", kind="release", version=1, fingerprint=letter * 64,
        digest=content_digest(files), seed=0, config={}, inputs={}, files=files,
        artifact=release.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip
    store.commit(record)
    sign_release(store, record)
    return record


def write_platform(folder: Path, *, profile: str = "gpu") -> None:
    folder.mkdir(exist_ok=True)
    cluster = {"name": "fmops", "profile": profile, "registry": "1.dkr.ecr.us-east-1.amazonaws.com/fmops"}
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"cluster": cluster}))
    images = {name: {"tag": "1", "digest": "sha256:" + "a" * 64} for name in ("vllm", "ray-llm", "pause")}
    (folder / "images.lock.yaml").write_text(yaml.safe_dump({"images": images}))


@pytest.fixture(scope="module")
def s3() -> Iterator[local_s3.LocalS3]:
    with local_s3.serve() as served:
        yield served


@pytest.fixture
def world(s3, tmp_path, monkeypatch) -> Iterator[World]:
    for name, value in {**s3.environment, "FMOPS_STORE": STORE}.items():
        monkeypatch.setenv(name, value)
    spec = tmp_path / "lifecycle.yaml"
    spec.write_text("name: tiny\nbase: base\nserve: {max_tokens: 512}\n")
    write_platform(tmp_path / "platform")
    store = Project.open(spec).store
    first, second = add_release(store, "a"), add_release(store, "b")
    with fake_kubernetes.serve() as kubernetes:
        monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig(tmp_path / "config")))
        yield World(spec, kubernetes, first.key, second.key)
    for name in s3.names():
        s3.client.delete_object(Bucket=local_s3.BUCKET, Key=name)


def test_the_first_release_gets_all_traffic_once_it_answers_as_certified(world):
    said = world.deploy(world.first, answer="a certified")
    assert said == [
        f"applied InferenceService {world.first}",
        f"applied PodDisruptionBudget {world.first}",
        "applied Deployment tiny-warm",
        f"{world.first}: waiting for its controller",
        f"{world.first}: ready",
        f"{len(CHAT_PROBES)} of {len(CHAT_PROBES)} golden answers are the certified ones",
        f"routed https://tiny.fmops.internal/v1 to {world.first}",
    ]
    service = world.kubernetes.find("InferenceService", world.first)["spec"]["predictor"]["model"]
    assert service["storageUri"].startswith(f"{STORE}/artifacts/{world.first}/")
    assert service["resources"]["limits"]["nvidia.com/gpu"] == "1"
    [rule] = world.kubernetes.find("HTTPRoute", "tiny")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": f"{world.first}-predictor", "port": 80, "weight": 1}]


def test_a_second_release_stands_ready_and_waits_for_its_rollout(world):
    world.deploy(world.first, answer="a certified")
    said = world.deploy(world.second, answer="b certified")
    assert said[-1] == f"{world.first} serves. Next: fmops rollout start --release {world.second} --on eks"
    [rule] = world.kubernetes.find("HTTPRoute", "tiny")["spec"]["rules"]
    assert [each["name"] for each in rule["backendRefs"]] == [f"{world.first}-predictor"]
    assert world.deploy(world.first, answer="a certified")[-1] == f"{world.first} serves already"


def test_a_service_that_answers_otherwise_is_taken_away_and_gets_no_traffic(world):
    with pytest.raises(DeployFailed, match=r"golden answers of .* are not the certified ones.*taken away again"):
        world.deploy(world.first, answer="some other model")
    assert world.kubernetes.find("InferenceService", world.first) is None
    assert world.kubernetes.find("HTTPRoute", "tiny") is None


def test_a_service_that_does_not_answer_gets_no_traffic(world):
    with pytest.raises(DeployFailed, match="is ready, but does not answer the golden prompts: OSError: status 503"):
        world.deploy(world.first, answer=None)
    assert world.kubernetes.find("HTTPRoute", "tiny") is None


def test_what_kserve_says_of_a_model_that_does_not_load_is_passed_on(world):
    failed = {
        "modelStatus": {
            "transitionStatus": "BlockedByFailedLoad",
            "lastFailureInfo": {"reason": "ModelLoadFailed", "message": "CUDA out of memory"},
        }
    }
    with pytest.raises(DeployFailed, match=r"does not start: ModelLoadFailed: CUDA out of memory\. It gets no traffic"):
        world.deploy(world.first, answer=None, status=failed)


def test_nobody_waits_for_ever(world):
    waiting = {"conditions": [{"type": "Ready", "status": "False", "message": "0/3 nodes have nvidia.com/gpu"}]}
    with pytest.raises(DeployFailed, match=r"not ready after 40 minutes: 0/3 nodes have nvidia\.com/gpu"):
        world.deploy(world.first, answer=None, status=waiting, seconds=READY_S / 3)


def test_an_unsigned_release_is_not_deployed(world):
    [signature] = (world.spec.parent / ".fmops" / "signatures").glob(f"{world.first}.sig")
    store = world.project.store
    store.shared.keep(f"signatures/{world.first}.sig", store.root / "signatures" / f"{world.second}.sig")
    with pytest.raises(FmopsError, match="is not what was signed"):
        world.planned(world.first)
    assert signature.is_file()


def test_a_store_that_the_cluster_cannot_read_is_refused(world, monkeypatch):
    monkeypatch.delenv("FMOPS_STORE")
    with pytest.raises(FmopsError, match=r"the cluster cannot read .* Name a bucket: `fmops run --store s3://"):
        world.planned("champion")


@pytest.mark.parametrize(
    ("profile", "by", "said"),
    [("cpu", "kserve", "no node that vLLM runs on"), ("neuron", "ray", "Ray Serve is rendered for GPUs alone")],
)
def test_a_cluster_without_the_devices_is_refused(world, profile, by, said):
    write_platform(world.spec.parent / "platform", profile=profile)
    platform = Platform.read(world.spec.parent / "platform")
    with pytest.raises(FmopsError, match=said):
        plan_deployment(world.project, world.first, platform=platform, by=by, scale=Scale())


def test_a_platform_without_its_files_says_who_writes_them(tmp_path):
    with pytest.raises(FmopsError, match=r"no .*cluster\.yaml: `make platform-values` in infra/ writes it"):
        Platform.read(tmp_path)
    write_platform(tmp_path)
    with pytest.raises(FmopsError, match=r"unknown image of images\.lock\.yaml 'vlm'\. Did you mean 'vllm'\?"):
        Platform.read(tmp_path).image("vlm")


@pytest.mark.parametrize(("by", "kind"), [("kserve", "InferenceService"), ("ray", "RayService")])
def test_a_dry_run_prints_what_would_be_applied_and_asks_no_cluster(world, by, kind):
    command = [
        sys.executable, "-m", "fmops", "deploy", world.first, "--on", "eks", "--by", by, "--warm", "2", "--dry-run",
        "--spec", str(world.spec), "--platform", str(world.spec.parent / "platform"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    manifests = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert manifests[kind]["metadata"]["name"] == world.first, done.stderr
    assert manifests["Deployment"]["spec"]["replicas"] == 2
    assert world.kubernetes.requests == []
