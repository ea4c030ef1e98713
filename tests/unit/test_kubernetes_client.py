"""The Kubernetes client: who is asked, with whose credentials, and what its refusals say."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import fake_kubernetes
import pytest
import yaml

from fmops.adapters.kubernetes import ApiError, Conflict, connect
from fmops.errors import FmopsError

POD = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {"name": "a", "namespace": "fmops-serve", "labels": {"app": "x"}}, "spec": {"nodeName": "n"},
}  # fmt: skip
WHERE = {"version": "v1", "namespace": "fmops-serve"}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Iterator[fake_kubernetes.FakeKubernetes]:
    with fake_kubernetes.serve() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
        yield server


def test_objects_are_made_read_listed_applied_and_ended(fake):
    cluster = connect()
    assert cluster.get("Pod", "a", **WHERE) is None
    cluster.create(POD)
    assert cluster.get("Pod", "a", **WHERE)["spec"] == {"nodeName": "n"}
    assert [pod["metadata"]["name"] for pod in cluster.list("Pod", labels="app=x", **WHERE)] == ["a"]
    assert cluster.list("Pod", labels="app=y", **WHERE) == []
    cluster.apply({**POD, "spec": {"priority": 1}})
    assert cluster.get("Pod", "a", **WHERE)["spec"] == {"nodeName": "n", "priority": 1}
    assert cluster.delete("Pod", "a", **WHERE)
    assert not cluster.delete("Pod", "a", **WHERE)


def test_two_of_a_name_and_a_stale_write_are_conflicts(fake):
    cluster = connect()
    read = cluster.create(POD)
    with pytest.raises(Conflict, match="already exists"):
        cluster.create(POD)
    fake.change("Pod", "a", spec={"nodeName": "other"})
    with pytest.raises(Conflict, match=r"409 to PUT .*/pods/a: the object has been modified"):
        cluster.replace(read)


@pytest.mark.parametrize(
    ("status", "said"), [(403, "see the access entries in infra/cluster/access.tf"), (500, "ordered by the test")]
)
def test_a_refusal_names_the_call_and_the_remedy(fake, status, said):
    fake.refusals.append(("POST", status))
    with pytest.raises(ApiError, match=f"fake answers {status} to POST /api/v1/namespaces/fmops-serve/pods: .*{said}"):
        connect().create(POD)


def test_a_token_is_asked_of_the_command_and_again_when_it_no_longer_holds(fake, tmp_path, monkeypatch):
    path = tmp_path / "config"
    config = yaml.safe_load(path.read_text())
    # The plug-in prints what lies in a file, which the test changes; each call leaves a line.
    script = tmp_path / "get-token"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "(here / 'calls').open('a').write('x')\n"
        "assert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['kind'] == 'ExecCredential'\n"
        "print(json.dumps({'status': {'token': (here / 'token').read_text()}}))\n"
    )
    (tmp_path / "token").write_text(fake.token)
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(script), str(tmp_path)]
    }  # fmt: skip
    config["users"][0]["user"] = {"exec": plugin}
    path.write_text(yaml.safe_dump(config))
    cluster = connect()
    cluster.create(POD)
    cluster.get("Pod", "a", **WHERE)
    assert (tmp_path / "calls").read_text() == "x"
    fake.token = "renewed"
    (tmp_path / "token").write_text("renewed")
    assert cluster.get("Pod", "a", **WHERE) is not None
    assert (tmp_path / "calls").read_text() == "xx"
    fake.token = "nobody has it"
    with pytest.raises(ApiError, match=r"answers 401 .*Log in again"):
        cluster.get("Pod", "a", **WHERE)


def test_a_command_that_gives_no_token_is_shown(fake, tmp_path):
    path = tmp_path / "config"
    config = yaml.safe_load(path.read_text())
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-command", "args": ["eks"]}
    config["users"][0]["user"] = {"exec": plugin}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(FmopsError, match="context 'fake': `no-such-command eks` gives no token"):
        connect().create(POD)


def test_no_kubeconfig_no_context_and_nobody_there(fake, tmp_path, monkeypatch):
    with pytest.raises(FmopsError, match=r"unknown context 'prod'\. .*Known: fake\."):
        connect("prod")
    fake.url = "http://127.0.0.1:9"
    fake.kubeconfig(tmp_path / "config")
    with pytest.raises(ApiError, match=r"of fake \(http://127\.0\.0\.1:9\) cannot be reached.*be inside its network"):
        connect().create(POD)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(FmopsError, match=r"no cluster: there is no .*none\. `aws eks update-kubeconfig"):
        connect()


def test_a_server_whose_certificate_is_not_checked_is_refused(fake, tmp_path):
    path = tmp_path / "config"
    config = yaml.safe_load(path.read_text())
    config["clusters"][0]["cluster"]["insecure-skip-tls-verify"] = True
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(FmopsError, match="does not check its server's certificate"):
        connect()
