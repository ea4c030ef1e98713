"""Dagster on the cluster loads the code location that its values name: its arguments and variables, started here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import local_s3
import pytest
import yaml
from manifests import DIGEST, manifests

pytestmark = pytest.mark.xdist_group("infra-manifests")


def deployment():
    (found,) = [
        each["spec"]["source"]["helm"]["valuesObject"]["dagster-user-deployments"]["deployments"]
        for each in manifests("gpu")
        if each["kind"] == "Application" and each["metadata"]["name"] == "dagster"
    ]
    return found[0]


def test_it_runs_the_image_of_the_stages_by_digest_with_what_the_platform_says():
    image = deployment()["image"]
    assert f"{image['repository']}:{image['tag']}".endswith(f"/fmops/stages:1@{DIGEST}")
    (mount,) = deployment()["volumeMounts"]
    (told,) = [each for each in deployment()["env"] if each["name"] == "FMOPS_PLATFORM"]
    assert told["value"] == mount["mountPath"]
    (volume,) = deployment()["volumes"]
    (said,) = [
        each for each in manifests("gpu")
        if each["kind"] == "ConfigMap" and each["metadata"].get("namespace") == "dagster"
    ]  # fmt: skip
    assert volume["configMap"]["name"] == said["metadata"]["name"]
    assert yaml.safe_load(said["data"]["cluster.yaml"])["cluster"]["profile"] == "gpu"
    assert yaml.safe_load(said["data"]["images.lock.yaml"])["images"]["stages"]["digest"] == DIGEST


def test_dagster_may_do_what_the_launcher_asks_and_no_more():
    role, bound = (
        next(each for each in manifests("cpu") if each["kind"] == kind and each["metadata"]["name"] == "launcher")
        for kind in ("Role", "RoleBinding")
    )
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    asked = {
        ("rayjobs", "create"), ("rayjobs", "get"), ("rayjobs", "delete"), ("configmaps", "patch"),
        ("configmaps", "create"), ("pods", "list"), ("pods/log", "get"),
    }  # fmt: skip
    assert asked <= allowed
    assert ("secrets", "get") not in allowed
    assert {"kind": "ServiceAccount", "name": "dagster", "namespace": "dagster"} in bound["subjects"]


def test_the_code_server_starts_with_those_arguments_and_is_healthy(tmp_path, tiny_model):
    (tmp_path / "lifecycle.yaml").write_text(f"name: mine\nbase: {os.path.relpath(tiny_model, tmp_path)}\n")
    (tmp_path / "fmops").mkdir()
    for name, part in (("cluster.yaml", "cluster"), ("images.lock.yaml", "images")):
        (tmp_path / "fmops" / name).write_text(f"{part}: {{}}\n")
    places = {
        "/srv/lifecycle.yaml": str(tmp_path / "lifecycle.yaml"), "/etc/fmops": str(tmp_path / "fmops"),
        "/tmp/fmops": str(tmp_path / "workspace"), "/tmp": str(tmp_path),
    }  # fmt: skip
    with local_s3.serve() as s3, socket.create_server(("127.0.0.1", 0)) as free:
        stated = {each["name"]: places.get(each["value"], each["value"]) for each in deployment()["env"]}
        environment = os.environ | s3.environment | stated | {"FMOPS_STORE": f"s3://{local_s3.BUCKET}/lifecycle"}
        port = str(free.getsockname()[1])
        free.close()
        dagster = [sys.executable, "-m", "dagster", "api"]
        server = subprocess.Popen(
            [*dagster, "grpc", "-h", "127.0.0.1", "-p", port, *deployment()["dagsterApiGrpcArgs"]], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said = ""
            for line in server.stdout:
                said += line
                if "Started Dagster code server" in line:
                    break
            health = subprocess.run([*dagster, "grpc-health-check", "-p", port], env=environment)
            assert health.returncode == 0, said
        finally:
            server.terminate()
            server.communicate()
