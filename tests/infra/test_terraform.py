"""The Terraform of the cluster: valid, refusing what costs money, applied to and destroyed from a local AWS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import boto3
import local_aws
import pytest
import yaml
from manifests import cluster_values

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
MIRRORS = ("/opt/tf-plugins", "/usr/share/terraform/plugins", "/usr/local/share/terraform/plugins")
PROVIDER = "registry.terraform.io/hashicorp/aws/5.100.0"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Terraform's environment: plug-ins from a local mirror, nothing from this machine's own configuration."""
    if not shutil.which("terraform"):
        pytest.skip("no terraform on PATH (1.11 or newer)")
    mirror = next(
        (m for m in (os.environ.get("FMOPS_TERRAFORM_MIRROR"), *MIRRORS) if m and Path(m, PROVIDER).is_dir()), None
    )
    if mirror is None:
        pytest.skip(f"no local mirror with {PROVIDER}: set FMOPS_TERRAFORM_MIRROR (terraform providers mirror FOLDER)")
    configuration = tmp_path_factory.mktemp("terraform") / "cli.tfrc"
    configuration.write_text(f'provider_installation {{\n  filesystem_mirror {{\n    path = "{mirror}"\n  }}\n}}\n')
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "AWS_"))}
    return kept | {"TF_CLI_CONFIG_FILE": str(configuration), "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}


def terraform(folder, environment, *arguments, codes=(0,)):
    command = ["terraform", f"-chdir={folder}", *arguments, *(["-no-color"] if arguments[0] != "output" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in codes, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def copy_of_infra(folder):
    ignored = shutil.ignore_patterns(".terraform*", "*.tfstate*", ".tools", "terraform.tfvars", "backend.hcl")
    shutil.copytree(INFRA, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="session")
def checked(environment, tmp_path_factory):
    """A copy of infra/ whose cluster is initialised, to test and to break."""
    infra = copy_of_infra(tmp_path_factory.mktemp("checked") / "infra")
    terraform(infra / "cluster", environment, "init", "-backend=false", "-input=false")
    return infra


@pytest.mark.xdist_group("infra-terraform")
def test_it_is_formatted_and_valid(environment, checked):
    assert terraform(INFRA, environment, "fmt", "-check", "-recursive") == ""
    assert "The configuration is valid" in terraform(checked / "cluster", environment, "validate")


@pytest.mark.xdist_group("infra-terraform")
def test_profiles_security_and_refusals_hold(environment, checked):
    said = terraform(checked / "cluster", environment, "test")
    assert "0 failed" in said
    # A variable with a rule that no run tries would be a rule that nobody has seen refuse.
    ruled = {
        name
        for name, body in re.findall(r'variable "(\w+)" {(.*?)\n}', (INFRA / "cluster/variables.tf").read_text(), re.S)
        if "validation {" in body
    }
    tried = set(
        re.findall(r"expect_failures = \[var\.(\w+)\]", (INFRA / "cluster/tests/refusals.tftest.hcl").read_text())
    )
    assert tried == ruled


# What a careless change would write, and the sentence that must stop it.
CARELESS = [
    ("cluster.tf", "= length(var.public_access_cidrs) > 0\n", "= true\n", "private by default"),
    ("cluster.tf", '"api", "audit", ', "", "five logs"),
    ("cluster.tf", "_creator_admin_permissions = false", "_creator_admin_permissions = true", "no administrator"),
    ("cluster.tf", '"STANDARD"', '"EXTENDED"', "six times as much"),
    ("nodes.tf", "_response_hop_limit = 1", "_response_hop_limit = 2", "IMDSv2 with one hop"),
    ("registry.tf", '"IMMUTABLE"', '"MUTABLE"', "immutable and scanned"),
    ("storage.tf", "restrict_public_buckets = true", "restrict_public_buckets = false", "made public"),
    ("storage.tf", 'status = "Enabled"\n  }\n}', 'status = "Suspended"\n  }\n}', "keep versions"),
    ("storage.tf", "force_destroy = !var.keep_data", "force_destroy = true", "Data is kept"),
    ("metadata.tf", "storage_encrypted               = true", "storage_encrypted = false", "encrypted and private"),
    ("network.tf", "map_public_ip_on_launch = false", "map_public_ip_on_launch = true", "public address by default"),
    ("accelerators.tf", "count    = local.profile.efa ? 1 : 0", "count    = 1", "pays for no fabric"),
    ("spend.tf", "threshold           = var.monthly_budget_usd", "threshold           = 1e9", "stand at the sum"),
]  # fmt: skip


@pytest.mark.xdist_group("infra-terraform")
def test_each_careless_change_is_stopped(environment, checked, tmp_path):
    infra = tmp_path / "infra"
    shutil.copytree(checked, infra, symlinks=True)
    for page, right, wrong, _ in CARELESS:
        path = infra / "cluster" / page
        assert right in path.read_text(), f"{page} no longer says {right!r}: renew this test"
        path.write_text(path.read_text().replace(right, wrong))
    variables = infra / "cluster/variables.tf"
    variables.write_text(re.sub(r"  validation {\n.*?\n  }\n", "", variables.read_text(), flags=re.DOTALL))

    said = " ".join(terraform(infra / "cluster", environment, "test", codes=(1,)).split())
    missed = [sentence for *_, sentence in CARELESS if sentence not in said]
    assert missed == []
    # With every rule of the variables gone, not one of the refusals still passes.
    refusals = said[said.index("tests/refusals.tftest.hcl... in progress") :]
    assert re.findall(r'run "(\w+)"\.\.\. pass', refusals) == []


# The local AWS


@pytest.fixture(scope="module")
def applied(environment, tmp_path_factory):
    """The state's bucket and the cluster of the profile cpu, applied; the last test destroys it."""
    infra = copy_of_infra(tmp_path_factory.mktemp("applied") / "infra")
    os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"
    with local_aws.serve() as (address, extras):
        aws = environment | {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "3",
        }
        state, cluster = infra / "state", infra / "cluster"
        terraform(state, aws, "init", "-input=false")
        command = ["terraform", f"-chdir={state}", "apply", "-auto-approve", "-input=false", "-no-color"]
        # S3's lifecycle rules take the provider a minute to believe, here and there: the two go side by side.
        first = subprocess.Popen(
            [*command, "-var=name=fmops", "-var=region=us-east-1"],
            env=aws,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **local_aws.KEYS)
            # moto takes «deny without TLS» for «deny»: our own state bucket cannot be used over plain HTTP.
            client.create_bucket(Bucket="states")
            lines = [
                'bucket = "states"',
                'key = "cluster.tfstate"',
                'region = "us-east-1"',
                "encrypt = true",
                "use_lockfile = true",
            ]
            (cluster / "backend.hcl").write_text("\n".join(lines))
            page = (cluster / "profiles/cpu.tfvars").read_text().replace("111122223333", local_aws.ACCOUNT)
            (cluster / "terraform.tfvars").write_text(page)
            terraform(cluster, aws, "init", "-input=false", "-backend-config=backend.hcl")
            terraform(cluster, aws, "apply", "-auto-approve", "-input=false", "-parallelism=20")
            said, _ = first.communicate(timeout=300)
            assert first.returncode == 0, said
            yield cluster, aws, extras, client
        finally:
            if first.poll() is None:
                first.terminate()
                first.wait()


# moto forgets these fields of what it made, and a second plan would set them again.
FORGOTTEN = {
    "aws_db_parameter_group",
    "aws_eks_cluster",
    "aws_eks_node_group",
    "aws_launch_template",
    "aws_vpc_security_group_egress_rule",
    "aws_vpc_security_group_ingress_rule",
}


# In this order, on one cluster: three tests, since one would take longer than a test may on a busy machine.


@pytest.mark.xdist_group("infra-aws")
def test_the_cluster_is_made(applied):
    cluster, aws, extras, client = applied

    # Made: add-ons before nodes and after, people and nodes let in, a role for each account that needs one.
    assert set(extras.addons) == {
        "vpc-cni",
        "kube-proxy",
        "eks-pod-identity-agent",
        "coredns",
        "metrics-server",
        "aws-ebs-csi-driver",
    }
    assert len(extras.entries) == 2
    accounts = {(one["namespace"], one["serviceAccount"]) for one in extras.associations.values()}
    assert {("kube-system", "karpenter"), ("fmops-train", "stages"), ("fmops-serve", "predictor")} <= accounts
    assert client.get_bucket_versioning(Bucket=f"fmops-state-{local_aws.ACCOUNT}-us-east-1")["Status"] == "Enabled"

    # IAM takes 10,240 characters of inline policies in a role; the local AWS counts nothing.
    iam = boto3.client("iam", endpoint_url=aws["AWS_ENDPOINT_URL"], region_name="us-east-1", **local_aws.KEYS)
    for role in iam.list_roles()["Roles"]:
        for policy in iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]:
            document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=policy)["PolicyDocument"]
            assert len(json.dumps(document, separators=(",", ":"))) < 10_240, role["RoleName"]

    # The platform's values come out as its charts read them.
    values = yaml.safe_load(terraform(cluster, aws, "output", "-raw", "platform"))["cluster"]
    assert values.keys() == cluster_values("cpu").keys()

    made = len([name for name in terraform(cluster, aws, "state", "list").split() if not name.startswith("data.")])
    assert f"A real apply of {made} resources" in (INFRA / "README.md").read_text()

    # The state is in the bucket and nobody holds its lock.
    assert [found["Key"] for found in client.list_objects_v2(Bucket="states")["Contents"]] == ["cluster.tfstate"]


@pytest.mark.xdist_group("infra-aws")
def test_a_second_plan_wants_nothing_new(applied):
    cluster, aws, *_ = applied
    terraform(cluster, aws, "plan", "-input=false", "-out=again.bin")
    changes = json.loads(terraform(cluster, aws, "show", "-json", "again.bin"))["resource_changes"]
    assert {change["type"] for change in changes if change["change"]["actions"] != ["no-op"]} <= FORGOTTEN


@pytest.mark.xdist_group("infra-aws")
def test_data_is_let_go_first_then_nothing_is_left(applied):
    cluster, aws, extras, client = applied
    holders = ["aws_db_instance.metadata", "aws_s3_bucket.artifacts", "aws_s3_bucket.logs", "aws_ecr_repository.this"]
    targets = [f"-target={name}" for name in holders]
    terraform(cluster, aws, "apply", "-auto-approve", "-input=false", "-var=keep_data=false", *targets)
    kept = [name for name in terraform(cluster, aws, "state", "list").split() if not name.startswith("data.")]
    said = terraform(
        cluster, aws, "destroy", "-auto-approve", "-input=false", "-var=keep_data=false", "-parallelism=20"
    )
    assert f"Destroy complete! Resources: {len(kept)} destroyed" in said
    assert (extras.addons, extras.entries, extras.associations) == ({}, {}, {})
    left = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    assert left == {"states", f"fmops-state-{local_aws.ACCOUNT}-us-east-1"}
