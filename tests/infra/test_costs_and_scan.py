"""Sums that the README shows, what the scanner finds, and the validation scripts, run where they can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
COSTS = yaml.safe_load((INFRA / "costs.yaml").read_text())
README = (INFRA / "README.md").read_text()


def idle_usd_an_hour():
    return sum(COSTS["prices"][line["price"]] * line["count"] for line in COSTS["idle"])


def test_the_readme_shows_each_line_of_the_idle_price_and_its_sum():
    for line in COSTS["idle"]:
        price = COSTS["prices"][line["price"]]
        assert f"| {line['what']} | {line['count']} × {price:g} | {price * line['count']:.3f} |" in README
    hour = idle_usd_an_hour()
    assert f"| **idle, each profile** | | **{hour:.2f}** |" in README
    assert f"{hour * COSTS['hours_a_month']:,.0f} USD a month" in README


@pytest.mark.parametrize("profile", COSTS["adds"])
def test_the_readme_shows_what_a_node_of_the_profile_adds(profile):
    for node in COSTS["adds"][profile]:
        price = COSTS["prices"][node]
        assert f"| {profile} | {node} | {price:.2f} | {idle_usd_an_hour() + price:.2f} |" in README


def test_no_number_in_the_price_table_comes_from_elsewhere():
    rows = re.findall(r"^\| (?:cpu|gpu|neuron) \| (\S+\.\S+) \|", README, re.MULTILINE)
    assert rows == [node for nodes in COSTS["adds"].values() for node in nodes]
    assert str(COSTS["taken"]) in README


def test_counts_in_the_price_table_are_those_of_the_code():
    code = "\n".join(page.read_text() for page in (INFRA / "cluster").glob("*.tf"))
    counts = {line["what"]: line["count"] for line in COSTS["idle"]}
    assert counts["system nodes"] == int(re.search(r"desired_size = (\d+)", code)[1])
    endpoints = re.search(r"interface_endpoints = toset\(\[(.*?)\]\)", code, re.DOTALL)[1].count('"') // 2
    assert counts["interface endpoints in three zones"] == 3 * endpoints
    assert counts["databases"] == len(re.search(r"databases += \[(.*)\]", code)[1].split(","))
    assert counts["keys"] == code.count('resource "aws_kms_key"')
    assert counts["NAT gateways"] == counts["their addresses"] == 3
    least = float(re.search(r"var.monthly_budget_usd >= (\d+)", code)[1])
    assert abs(idle_usd_an_hour() * COSTS["hours_a_month"] - least) < 100, "the smallest budget is about the idle price"


# checkov


def checkov():
    for name in (os.environ.get("FMOPS_CHECKOV"), INFRA / ".tools/checkov/bin/checkov", shutil.which("checkov")):
        if name and Path(name).is_file():
            return str(name)
    pytest.skip("no checkov: `make -C infra checkov` makes its environment, or set FMOPS_CHECKOV")


def scan(folder):
    command = [
        checkov(),
        "--directory",
        str(folder),
        "--framework",
        "terraform",
        "--output",
        "json",
        "--compact",
        "--quiet",
    ]
    environment = os.environ | {"BC_SKIP_MAPPING": "TRUE", "CHECKOV_EXPERIMENTAL_TERRAFORM_MANAGED_MODULES": "False"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_the_scanner_finds_nothing_that_is_not_explained():
    found = scan(INFRA)
    assert [f"{one['check_id']} {one['resource']}" for one in found["results"]["failed_checks"]] == []
    assert found["summary"]["passed"] > 200


def test_the_scanner_finds_images_that_nobody_scans(tmp_path):
    shutil.copytree(INFRA / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns(".terraform*"))
    page = tmp_path / "cluster/registry.tf"
    page.write_text(page.read_text().replace("scan_on_push = true", "scan_on_push = false"))
    (tmp_path / "platform").mkdir()
    shutil.copy(INFRA / "platform/images.yaml", tmp_path / "platform")
    assert "CKV_AWS_163" in {one["check_id"] for one in scan(tmp_path / "cluster")["results"]["failed_checks"]}


def test_each_exception_says_why():
    for page in INFRA.rglob("*.tf"):
        for check, why in re.findall(r"checkov:skip=(\w+):?(.*)", page.read_text()):
            assert len(why.split()) >= 5, f"{page.name}: {check} is skipped without a reason"


# The validation jobs' scripts


def allreduce(processes, *arguments):
    """What torchrun would start, without torchrun: exit code, output and errors of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(INFRA / "validation/files/allreduce.py"), "--megabytes=1", "--rounds=3", *arguments]
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    ends = [(*one.communicate(timeout=200), one.returncode) for one in started]
    return ends[0]


def test_the_fabric_test_measures_and_can_fail():
    said, errors, code = allreduce(2, "--expect=0.000001")
    assert code == 0, errors
    result = json.loads(said.splitlines()[-1])
    assert result["processes"] == 2
    assert result["bus_gb_s"] == pytest.approx(result["bytes"] / result["seconds"] / 1e9)  # 2 (n - 1) / n is 1

    said, errors, code = allreduce(2, "--expect=1000000")
    assert code == 1, errors
    assert '"passed": false' in said


def test_the_fabric_test_refuses_one_process_alone():
    _, errors, code = allreduce(1, "--expect=1")
    assert code == 1
    assert "moves nothing" in errors


def test_the_store_test_sees_a_role_that_may_delete():
    """moto enforces no rights, so that every role may delete: the script must say so, after its other steps passed."""
    import boto3
    import local_aws

    with local_aws.serve() as (address, _):
        aws = {
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
        }
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **local_aws.KEYS).create_bucket(
            Bucket="artifacts"
        )
        command = [sys.executable, str(INFRA / "validation/files/store.py"), "artifacts"]
        done = subprocess.run(command, env=os.environ | aws, capture_output=True, text=True)
    assert done.returncode == 1
    assert "The stages' role may delete artifacts" in done.stderr


# What `make` does for a person


def crane_in(folder, held):
    """A registry of text files behind `crane`'s command line: `held` names what is in it."""
    log = folder / "copied"
    script = folder / "crane"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in\nls) grep "^$2:" {folder}/held | cut -d: -f2;;\n'
        f'copy) echo "$2 $3" >> {log}; echo "$3" >> {folder}/held;;\ndigest) echo "sha256:of-$2";;\nesac\ntrue\n'
    )
    script.chmod(0o755)
    (folder / "held").write_text("\n".join(held) + "\n")
    return log


def run_images(folder, *arguments):
    (folder / "cluster.yaml").write_text("cluster: {registry: mine}\n")
    (folder / "images.yaml").write_text("images: {stages: {}, vllm: {from: 'hub/vllm:v1'}}\n")
    command = [sys.executable, str(INFRA / "platform/images.py"), "images.yaml", "cluster.yaml", *arguments]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_images_are_copied_once_and_noted_by_digest(tmp_path):
    log = crane_in(tmp_path, ["mine/stages:abc"])
    locks = [run_images(tmp_path, "abc"), run_images(tmp_path, "abc")]
    assert log.read_text() == "hub/vllm:v1 mine/vllm:v1\n"
    for done in locks:
        noted = yaml.safe_load(done.stdout)["images"]
        assert noted["vllm"] == {"tag": "v1", "digest": "sha256:of-mine/vllm:v1"}
        assert noted["stages"] == {"tag": "abc", "digest": "sha256:of-mine/stages:abc"}


def test_an_image_of_ours_that_was_never_pushed_is_named(tmp_path):
    crane_in(tmp_path, ["mine/stages:old"])
    assert "mine/stages:abc is not there. Build and push it first" in run_images(tmp_path, "abc").stderr


def test_destroy_refuses_while_data_is_kept_or_something_paid_for_runs(tmp_path):
    """Terraform would leave what Kubernetes made behind, and it would be paid for until somebody looks."""
    ran = tmp_path / "ran"
    kinds = ("describe-instances", "describe-volumes", "get-resources")
    answers = " ".join(f'*{kind}*) cat "{tmp_path / kind}";;' for kind in kinds)
    tools = {
        "terraform": f'case "$*" in *name) echo fmops;; *region) echo us-east-1;; *) echo "$*" >> {ran};; esac',
        "aws": f'test "$3 $4" = "--region us-east-1" && case "$*" in {answers} esac',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables = tmp_path / "terraform.tfvars"
    command = ["make", "--no-print-directory", "-C", str(INFRA), "destroy", f"TFVARS={variables}"]

    variables.write_text("keep_data = true\n")
    assert "Data is kept: say keep_data = false" in subprocess.run(command, capture_output=True, text=True).stderr
    variables.write_text("keep_data = false\n")
    for kind in kinds:
        for other in kinds:
            (tmp_path / other).write_text("")
        for text, says in (("i-0123", "paid for: i-0123. Run make destroy-platform first"), (None, "No such file")):
            if text:
                (tmp_path / kind).write_text(text)
            else:
                (tmp_path / kind).unlink()  # AWS does not answer
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode != 0
            assert says in done.stderr
            assert not ran.exists()

    (tmp_path / kinds[-1]).write_text("")
    assert subprocess.run(command, env=environment).returncode == 0
    assert "destroy" in ran.read_text()


def test_disks_of_claims_bear_the_tag_that_destroy_looks_for():
    said = (INFRA / "platform/foundations/templates/classes.yaml").read_text()
    assert 'tagSpecification_1: "fmops/cluster={{ .Values.cluster.name }}"' in said
    assert "Name=tag:fmops/cluster,Values=$$name" in (INFRA / "Makefile").read_text()
