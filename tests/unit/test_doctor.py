"""`fmops doctor` finds what would stop a run, and says what to do."""

from __future__ import annotations

import subprocess
import sys

import fake_kubernetes
import pytest

from fmops.orchestration import doctor
from fmops.orchestration.doctor import Finding, examine_cluster, examine_here, render_findings
from fmops.orchestration.project import Project

SPEC = "name: mine\nbase: ./model\ndata: {corpora: {docs: {source: docs/*.txt}}}\npretrain: {tokens: 1000}\n"


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "lifecycle.yaml"
    path.write_text(SPEC)
    return path


def here(spec):
    return {each.what: each for each in examine_here(spec, open_project=lambda: Project.open(spec))}


def test_a_good_machine_has_no_fault(spec):
    found = here(spec)
    assert [each for each in found.values() if each.state == "fault"] == []
    assert found["packages"].said.startswith("fmops 0.")
    assert "mine, " in found["spec"].said
    assert "0 artifacts, champion none yet" in found["workspace"].said


def test_a_full_disk_is_a_fault_with_a_remedy(spec, monkeypatch):
    usage = doctor.shutil.disk_usage(spec.parent)._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert here(spec)["disk"].state == "fault"
    assert "--workspace" in here(spec)["disk"].remedy


def test_a_mistake_in_the_spec_is_shown_with_its_line(spec):
    spec.write_text(SPEC.replace("pretrain", "pretrian"))
    found = here(spec)["spec"]
    assert found.state == "fault"
    assert "pretrian" in found.said


def test_a_damaged_record_is_named(spec):
    record = spec.parent / ".fmops" / "artifacts" / f"benchmarks-{'ab' * 8}" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("no record")
    found = here(spec)["workspace"]
    assert found.state == "fault"
    assert str(record.parent) in found.said


def test_the_exit_code_says_whether_there_is_a_fault(tmp_path, spec):
    command = [sys.executable, "-m", "fmops", "doctor", "--spec", str(spec)]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "ok    python: 3." in good.stdout
    spec.write_text("name: [")
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "fault spec: " in bad.stdout


def crd(api, name, *versions):
    served = [{"name": version, "served": True} for version in versions]
    api.objects[f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"] = {
        "kind": "CustomResourceDefinition", "metadata": {"name": name}, "spec": {"versions": served},
    }  # fmt: skip


@pytest.fixture
def api(tmp_path, monkeypatch):
    with fake_kubernetes.serve() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        api.allowed = {"rayjobs", "inferenceservices"}
        api.objects["/version"] = {"kind": "Version", "metadata": {"name": "v"}, "gitVersion": "v1.34.1"}
        yield api


def whole(api):
    for name, (version, _) in doctor.KINDS.items():
        crd(api, name, version)
    for name in ("fmops-train", "fmops-serve"):
        api.objects[f"/api/v1/namespaces/{name}"] = {"kind": "Namespace", "metadata": {"name": name}}
    account = {"kind": "ServiceAccount", "metadata": {"name": "stages"}}
    api.objects["/api/v1/namespaces/fmops-train/serviceaccounts/stages"] = account
    queue = {"kind": "LocalQueue", "metadata": {"name": "stages"}, "status": {"pendingWorkloads": 2}}
    api.objects["/apis/kueue.x-k8s.io/v1beta2/namespaces/fmops-train/localqueues/stages"] = queue
    models = {
        "kind": "Gateway",
        "metadata": {"name": "models"},
        "status": {"conditions": [{"type": "Programmed", "status": "True"}]},
    }
    api.objects["/apis/gateway.networking.k8s.io/v1/namespaces/fmops-serve/gateways/models"] = models
    pool = {"kind": "NodePool", "metadata": {"name": "gpu"}, "spec": {"limits": {"cpu": "96"}}}
    api.objects["/apis/karpenter.sh/v1/nodepools/gpu"] = pool
    node = {"kind": "Node", "metadata": {"name": "n"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}}
    api.objects["/api/v1/nodes/n"] = node


def test_a_whole_platform_has_no_fault(api):
    whole(api)
    found = {each.what: each for each in examine_cluster(None)}
    assert [each for each in found.values() if each.state != "ok"] == []
    assert found["cluster"].said == "fake, Kubernetes v1.34.1"
    assert found["queue stages"].said == "2 stages wait"
    assert found["nodes"].said.startswith("1 nodes, 8 nvidia.com/gpu")


def test_what_the_platform_lacks_is_named_with_its_remedy(api):
    whole(api)
    del api.objects["/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io"]
    crd(api, "localqueues.kueue.x-k8s.io", "v1alpha1")
    del api.objects["/api/v1/namespaces/fmops-train/serviceaccounts/stages"]
    del api.objects["/apis/kueue.x-k8s.io/v1beta2/namespaces/fmops-train/localqueues/stages"]
    gateway = api.objects["/apis/gateway.networking.k8s.io/v1/namespaces/fmops-serve/gateways/models"]
    gateway["status"] = {"conditions": [{"type": "Programmed", "status": "False", "message": "no address"}]}
    pool = api.objects["/apis/karpenter.sh/v1/nodepools/gpu"]
    pool["status"] = {"conditions": [{"type": "Ready", "status": "False", "message": "NodeClass not found"}]}
    text = render_findings(examine_cluster(None))
    assert "fault rayjobs.ray.io: not installed; stages of `fmops run --on eks` needs it\n      See infra" in text
    assert "fault localqueues.kueue.x-k8s.io: serves v1alpha1; our manifests are v1beta" in text
    assert "fault service account stages: is not there\n      Argo CD's application `queues` makes it." in text
    assert "fault gateway models: is not programmed: no address" in text
    assert "fault queue stages: is not there" in text
    assert "fault node pool gpu: is not ready: NodeClass not found" in text


def test_an_engineer_is_told_what_his_role_may_do_and_what_it_may_not_see(api):
    """His role sends jobs to one namespace: most of the platform is hidden from him, and that is no fault."""
    whole(api)
    api.allowed = {"rayjobs"}
    api.hidden = ("/apis/apiextensions.k8s.io", "/api/v1/nodes", "/apis/karpenter.sh")
    found = list(examine_cluster(None))
    said = {each.what: each for each in found}
    assert [each.what for each in found if each.state == "fault"] == []
    assert said["`fmops run --on eks`"].said == "your role may create rayjobs in fmops-train"
    assert said["`fmops deploy --on eks`"].state == "note"
    assert "`administrators`" in said["`fmops deploy --on eks`"].remedy
    assert {"custom resources", "node pools", "nodes"} <= {each.what for each in found if each.state == "note"}
    assert said["queue stages"].state == "ok"


def test_no_cluster_is_one_fault_with_the_way_to_one(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (found,) = examine_cluster(None)
    assert found.state == "fault"
    assert "aws eks update-kubeconfig" in found.said


def test_a_remedy_stands_below_its_fault_only():
    lines = render_findings([Finding("a", "ok", "fine", "none"), Finding("b", "note", "low", "raise it")]).splitlines()
    assert lines == ["ok    a: fine", "note  b: low", "      raise it"]
