"""Images of outside charts: found in what helm renders, asked of a registry, pinned when a pod is made."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import cel
import pytest
import yaml
from manifests import DIGEST, cluster_values, helm, image_lock, manifests, schema_findings

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = ROOT / "infra/platform"
pytestmark = pytest.mark.xdist_group("infra-manifests")


def images_of(*objects):
    code = "import json, sys, chart_images; print(*sorted(chart_images.images_of(json.load(sys.stdin))))"
    command, given = [sys.executable, "-c", code], json.dumps(objects)
    return subprocess.run(command, input=given, cwd=PLATFORM, capture_output=True, text=True, check=True).stdout.split()


def test_images_are_found_where_charts_name_them():
    operator = {
        "name": "operator",
        "image": "quay.io/prometheus-operator/prometheus-operator:v0.90.1",
        "args": ["--prometheus-config-reloader=quay.io/prometheus-operator/prometheus-config-reloader:v0.90.1"],
        "env": [{"name": "PROXY_IMAGE", "value": "docker.io/envoyproxy/envoy:distroless-v1.38.0"}],
    }
    pinned = {"name": "pinned", "image": f"public.ecr.aws/karpenter/controller:1.14.1@{DIGEST}"}
    found = images_of(
        {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [operator, pinned]}}}},
        {"kind": "Prometheus", "spec": {"image": "quay.io/prometheus/prometheus:v3.9.0"}},
        {"kind": "DaemonSet", "spec": {"initContainers": [{"image": "busybox:1.37"}], "image": {"repository": "a"}}},
        {"kind": "ConfigMap", "data": {"more": "see https://example.com/docs/page:1 and example.com/label: 3"}},
        {"kind": "CustomResourceDefinition", "spec": {"description": "for instance quay.io/other/image:v1"}},
    )
    assert found == [
        "busybox:1.37",
        "docker.io/envoyproxy/envoy:distroless-v1.38.0",
        "quay.io/prometheus-operator/prometheus-config-reloader:v0.90.1",
        "quay.io/prometheus-operator/prometheus-operator:v0.90.1",
        "quay.io/prometheus/prometheus:v3.9.0",
    ]


# A chart, a repository of charts and a registry on this machine


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def registry(tmp_path):
    """Address of a real registry (Debian's docker-registry) that holds the image `app:1.0`, and the image's digest."""
    command = shutil.which("docker-registry") or os.environ.get("FMOPS_REGISTRY")
    if command is None:
        pytest.skip("no docker-registry: Debian's package of that name, or FMOPS_REGISTRY names the program")
    address = f"localhost:{free_port()}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(settings))
    with subprocess.Popen([command, "serve", str(tmp_path / "registry.yaml")], stderr=subprocess.DEVNULL) as process:
        try:
            yield address, pushed(f"http://{address}/v2/app")
        finally:
            process.terminate()


def pushed(url):
    """The digest of an image of one small layer."""

    def send(method, where, body=b"", kind="application/octet-stream"):
        request = urllib.request.Request(where, data=body, method=method, headers={"Content-Type": kind})
        with urllib.request.urlopen(request) as answer:
            return answer.headers

    def upload(body):
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        place = send("POST", f"{url}/blobs/uploads/")["Location"]
        send("PUT", f"{place}&digest={digest}", body)
        return {"digest": digest, "size": len(body), "mediaType": "application/vnd.oci.image.config.v1+json"}

    for _ in range(100):
        try:
            config = upload(b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}')
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []}).encode()
    assert send("PUT", f"{url}/manifests/1.0", manifest, kind)
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


@pytest.fixture
def repository(tmp_path):
    """URL of a repository of charts with the one that a test writes under `tool`."""
    folder = tmp_path / "charts"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        chart = tmp_path / "tool"
        (chart / "templates").mkdir(parents=True)
        (chart / "Chart.yaml").write_text("{apiVersion: v2, name: tool, version: 1.2.3}")
        (chart / "templates" / "pod.yaml").write_text(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: tool}\n"
            "spec: {containers: [{name: tool, image: '{{ .Values.image }}:1.0'}]}\n"
        )
        subprocess.run([helm(), "package", str(chart), "-d", str(folder)], check=True, capture_output=True)
        subprocess.run([helm(), "repo", "index", str(folder), "--url", url], check=True, capture_output=True)
        yield url
        server.shutdown()


def run(tmp_path, repository, image):
    """`make pin-images` for one outside chart. crane is not here, so this asks the registry's API as it does."""
    platform = tmp_path / "platform"
    shutil.copytree(PLATFORM / "apps", platform / "apps", ignore=shutil.ignore_patterns("values*"))
    tool = {"wave": 1, "namespace": "tools", "repo": repository, "chart": "tool", "version": "1.2.3"}
    (platform / "apps" / "values.yaml").write_text(yaml.safe_dump({"applications": {"tool": tool}}))
    (platform / "apps" / "values").mkdir()
    (platform / "apps" / "values" / "tool.yaml").write_text(f"image: {image}\n")
    (platform / "cluster.yaml").write_text(yaml.safe_dump({"cluster": cluster_values("cpu")}))
    (platform / "images.lock.yaml").write_text(yaml.safe_dump({"images": image_lock()}))
    (tmp_path / "crane").write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\n"
        "host, _, rest = sys.argv[2].partition('/')\nname, _, tag = rest.rpartition(':')\n"
        "kinds = {'Accept': 'application/vnd.oci.image.manifest.v1+json'}\n"
        "asked = urllib.request.Request(f'http://{host}/v2/{name}/manifests/{tag}', method='HEAD', headers=kinds)\n"
        "try:\n    print(urllib.request.urlopen(asked).headers['Docker-Content-Digest'])\n"
        "except OSError as error:\n    sys.exit(f'{sys.argv[2]}: {error}')\n"
    )
    (tmp_path / "crane").chmod(0o755)
    homes = {name: str(tmp_path / "helm") for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}
    return subprocess.run(
        [sys.executable, str(PLATFORM / "chart_images.py"), str(platform), helm()],
        env={**os.environ, **homes, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_charts_image_is_noted_with_the_digest_that_the_registry_says(registry, repository, tmp_path):
    address, digest = registry
    done = run(tmp_path, repository, f"{address}/app")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == {"chartImages": {f"{address}/app:1.0": digest}}
    assert f"tool: {address}/app:1.0" in done.stderr


def test_an_image_that_no_registry_has_is_named(registry, repository, tmp_path):
    address, _ = registry
    done = run(tmp_path, repository, f"{address}/none")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"crane digest {address}/none:1.0" in done.stderr


# When a pod is made


PINNED = {"quay.io/some/operator:v1": DIGEST, "busybox:1.37": DIGEST}


def rendered(**values):
    command = [helm(), "template", "foundations", str(PLATFORM / "foundations"), "--values", "-"]
    given = {"cluster": cluster_values("cpu"), "images": image_lock(), **values}
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True)
    return [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"].startswith("MutatingAdmission")]


def test_a_pod_of_an_outside_chart_gets_the_digests_that_were_noted():
    policy, binding = rendered(chartImages=PINNED)
    assert not [finding for each in (policy, binding) for finding in schema_findings(each, PLATFORM)]
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    pod = {
        "spec": {
            "initContainers": [{"name": "a", "image": "own:1"}, {"name": "b", "image": "busybox:1.37"}],
            "containers": [{"name": "c", "image": "quay.io/some/operator:v1"}, {"name": "d", "image": f"x@{DIGEST}"}],
        }
    }
    context = {"object": pod, "variables": {}}
    for variable in policy["spec"]["variables"]:
        context["variables"][variable["name"]] = cel.evaluate(variable["expression"], context)
    assert context["variables"]["containers"] == [
        {"name": "c", "image": f"quay.io/some/operator:v1@{DIGEST}"}, {"name": "d", "image": f"x@{DIGEST}"},
    ]  # fmt: skip
    assert context["variables"]["first"] == [
        {"name": "a", "image": "own:1"}, {"name": "b", "image": f"busybox:1.37@{DIGEST}"},
    ]  # fmt: skip
    context["object"] = {"spec": {"containers": pod["spec"]["containers"]}}
    assert cel.evaluate(policy["spec"]["variables"][2]["expression"], context) == []


def test_without_noted_digests_there_is_no_such_policy_and_argo_cd_hands_them_to_the_foundations_alone():
    assert rendered() == []
    assert not [each for each in manifests("cpu") if each["kind"].startswith("MutatingAdmission")]
    command = [helm(), "template", "apps", str(PLATFORM / "apps"), "--values", "-"]
    given = {"cluster": cluster_values("cpu"), "images": image_lock(), "chartImages": PINNED}
    given["git"] = {"repo": "r", "revision": "1"}
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True)
    values = {
        each["metadata"]["name"]: each["spec"]["source"]["helm"]["valuesObject"]
        for each in yaml.safe_load_all(done.stdout)
        if each and each["kind"] == "Application"
    }
    assert [name for name, its in values.items() if "chartImages" in (its or {})] == ["foundations"]
    assert values["foundations"]["chartImages"] == PINNED
