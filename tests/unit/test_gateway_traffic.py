"""A rollout on a cluster: the weights of the gateway's route follow the controller, and nobody is overwritten."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import fake_kubernetes
import pytest

from fmops.adapters.kubernetes import connect
from fmops.artifacts import Parity, Release
from fmops.deployment.manifests import Backend, route
from fmops.deployment.parity import CHAT_PROBES
from fmops.deployment.rollout.controller import Controller
from fmops.deployment.rollout.machine import SetTraffic
from fmops.deployment.rollout.traffic import GatewayTraffic
from fmops.deployment.serving.routes import RoutesMoved
from fmops.errors import FmopsError
from fmops.integrity import sha256
from fmops.production import Rollout
from fmops.store import Record, Store, content_digest, file_entries, utc_now

READY = {"conditions": [{"type": "Ready", "status": "True"}]}
OLD, NEW = "release-aaaaaaaaaaaaaaaa", "release-bbbbbbbbbbbbbbbb"


def service(key: str, kind: str = "InferenceService") -> dict:
    version = {"InferenceService": "serving.kserve.io/v1beta1", "RayService": "ray.io/v1"}[kind]
    return {"apiVersion": version, "kind": kind, "metadata": {"name": key, "namespace": "fmops-serve"}, "spec": {}}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Iterator[fake_kubernetes.FakeKubernetes]:
    with fake_kubernetes.serve() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
        cluster = connect()
        for key in (OLD, NEW):
            cluster.create(service(key))
        cluster.create(route("tiny", cluster="fmops", champion=(OLD, Backend(service=f"{OLD}-predictor", port=80))))
        yield server


@pytest.fixture
def traffic(fake) -> GatewayTraffic:
    return GatewayTraffic(connect(), "tiny")


def rule(fake) -> dict:
    return fake.find("HTTPRoute", "tiny")["spec"]["rules"][0]


def weights(fake) -> dict[str, int]:
    return {each["name"]: each["weight"] for each in rule(fake)["backendRefs"]}


def test_weights_are_the_shares_that_are_wanted(fake, traffic):
    traffic.set(SetTraffic(champion=OLD, challenger=NEW, canary=0.01))
    assert weights(fake) == {f"{OLD}-predictor": 9900, f"{NEW}-predictor": 100}
    traffic.set(SetTraffic(champion=OLD, challenger=NEW, canary=0.5))
    assert weights(fake) == {f"{OLD}-predictor": 5000, f"{NEW}-predictor": 5000}
    traffic.set(SetTraffic(champion=NEW, challenger=None))
    assert weights(fake) == {f"{NEW}-predictor": 10000}
    assert traffic.serving() == NEW
    assert rule(fake)["timeouts"] == {"request": "600s"}


def test_what_is_so_already_is_not_written_again(fake, traffic):
    wanted = SetTraffic(champion=OLD, challenger=NEW, canary=0.1)
    traffic.set(wanted)
    fake.requests.clear()
    traffic.set(wanted)
    assert not [verb for verb, _ in fake.requests if verb != "GET"]


def test_shadow_is_a_mirror_and_ends_with_it(fake, traffic):
    traffic.set(SetTraffic(champion=OLD, challenger=NEW, shadow=0.1))
    assert weights(fake) == {f"{OLD}-predictor": 10000}
    [mirror] = rule(fake)["filters"]
    assert mirror["requestMirror"] == {
        "backendRef": {"name": f"{NEW}-predictor", "port": 80}, "fraction": {"numerator": 1000, "denominator": 10000},
    }  # fmt: skip
    traffic.set(SetTraffic(champion=OLD, challenger=NEW, canary=0.1))
    assert "filters" not in rule(fake)


def test_a_change_of_somebody_else_in_between_is_kept(fake, traffic):
    def somebody(verb: str, path: str) -> None:
        if verb == "PUT":
            fake.before = None
            now = fake.find("HTTPRoute", "tiny")
            now["spec"]["hostnames"].append("chat.example.com")
            fake.change("HTTPRoute", "tiny", spec=now["spec"])

    fake.before = somebody
    traffic.set(SetTraffic(champion=OLD, challenger=NEW, canary=0.1))
    assert weights(fake) == {f"{OLD}-predictor": 9000, f"{NEW}-predictor": 1000}
    assert fake.find("HTTPRoute", "tiny")["spec"]["hostnames"] == ["tiny.fmops.internal", "chat.example.com"]
    assert [verb for verb, path in fake.requests if path.endswith("/tiny")].count("PUT") == 2


def test_a_route_that_others_change_all_the_time_is_left_to_them(fake, traffic):
    fake.refusals = [("PUT", 409)] * 5
    with pytest.raises(RoutesMoved, match="the route tiny was changed by others 5 times"):
        traffic.set(SetTraffic(champion=OLD, challenger=NEW, canary=0.1))


def test_without_a_route_or_a_service_the_remedy_is_named(fake, traffic):
    with pytest.raises(FmopsError, match="no HTTPRoute other in fmops-serve: nothing serves yet"):
        GatewayTraffic(connect(), "other").set(SetTraffic(champion=OLD, challenger=None))
    with pytest.raises(FmopsError, match=r"release-c has no service in fmops-serve\. `fmops deploy release-c"):
        traffic.set(SetTraffic(champion=OLD, challenger="release-c", canary=0.1))


def test_an_engine_has_an_address_once_it_is_ready(fake, traffic):
    assert traffic.url(NEW) is None
    fake.change("InferenceService", NEW, status={"modelStatus": {"states": {"targetModelState": "Loading"}}})
    assert (traffic.url(NEW), traffic.state(NEW).text) == (None, "Loading")
    fake.change("InferenceService", NEW, status=READY)
    assert traffic.url(NEW) == f"http:{NEW}-predictor:80"
    connect().create(service("release-on-ray", "RayService"))
    fake.change("RayService", "release-on-ray", status=READY)
    assert traffic.url("release-on-ray") == "http:release-on-ray-serve-svc:8000"


def add_release(store: Store, letter: str) -> str:
    """A release with parity and golden answers, but weights that are only bytes."""
    folder = store.folder("release", letter * 64)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_text(letter)
    parity = Parity(
        passed=True, prompts=1, engine="vllm", token_ids_equal=True, template_equal=True, greedy_equal=True,
        max_logprob_difference=0.0, tolerance=1e-3,
    )  # fmt: skip
    report = {
        "parity": parity.model_dump(mode="json"),
        "files": {"model/model.safetensors": sha256(folder / "model" / "model.safetensors")},
        "probes": [{"name": "chat/question", "answer": f"answer of {letter}"}],
    }
    (folder / "parity.json").write_text(json.dumps(report))
    files = file_entries(folder)
    release = Release(path=folder, name="tiny", parity=parity, licence=None, verdict="promote")
    record = Record(
        node="release", stage="release", kind="release", version=1, fingerprint=letter * 64,
        digest=content_digest(files), seed=0, config={}, inputs={}, files=files,
        artifact=release.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip
    return store.commit(record).key


def vllm(text: str):
    def answer(path: str, body: dict) -> tuple[int, dict]:
        assert (path, body["messages"]) == ("/v1/chat/completions", CHAT_PROBES["question"])
        return 200, {"choices": [{"message": {"content": text}}]}

    return answer


@pytest.fixture
def rollout(fake, traffic, tmp_path):
    """A controller over two releases, the newer one's service not ready yet."""
    store = Store(tmp_path / ".fmops")
    champion, challenger = add_release(store, "a"), add_release(store, "b")
    assert (champion, challenger) == (OLD, NEW)
    store.move_aliases({"champion": champion}, expected={"champion": None}, why="the first")
    controller = Controller(store, traffic=traffic, engine=traffic.engine, clock=lambda: 1_800_000_000.0)
    controller.start(challenger, Rollout(steps=(0.25,), shadow=0.0, answers=30))
    return store, controller


def test_the_controller_moves_weights_only_after_the_golden_prompts(fake, rollout):
    store, controller = rollout
    controller.look()
    assert weights(fake) == {f"{OLD}-predictor": 10000}
    fake.change("InferenceService", NEW, status=READY)
    fake.serve_with(f"http:{NEW}-predictor:80", vllm("answer of b"))
    assert controller.look().state.phase == "canary"
    assert weights(fake) == {f"{OLD}-predictor": 7500, f"{NEW}-predictor": 2500}
    assert controller.look("promote").state.phase == "promoted"
    assert weights(fake) == {f"{NEW}-predictor": 10000}
    assert store.aliases()["champion"] == NEW


@pytest.mark.parametrize(("answer", "said"), [(vllm("something else"), "not the certified ones"), (None, "status 503")])
def test_an_engine_that_is_not_the_release_gets_no_traffic(fake, rollout, answer, said):
    store, controller = rollout
    fake.change("InferenceService", NEW, status=READY)
    if answer:
        fake.serve_with(f"http:{NEW}-predictor:80", answer)
    state = controller.look().state
    assert state.phase == "rolled back"
    assert said in state.reason
    assert weights(fake) == {f"{OLD}-predictor": 10000}
    assert store.aliases()["champion"] == OLD


def test_the_command_line_rolls_back_on_the_cluster(fake, rollout, tmp_path, tiny_spec):
    import os
    import sys

    fake.change("InferenceService", NEW, status=READY)
    fake.serve_with(f"http:{NEW}-predictor:80", vllm("answer of b"))
    _, controller = rollout
    controller.look()
    command = [sys.executable, "-m", "fmops", "rollout", "rollback", "--on", "eks", "--spec", str(tiny_spec),
               "--workspace", str(tmp_path / ".fmops")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert "rolled back" in done.stdout, done.stderr
    assert weights(fake) == {f"{OLD}-predictor": 10000}


@pytest.fixture
def tiny_spec(tmp_path):
    path = tmp_path / "lifecycle.yaml"
    path.write_text("name: tiny\nbase: base\nevaluate: {suites: [capability]}\n")
    return path
