"""The admission policies refuse what they say and let through what we deploy: their CEL is evaluated."""

from __future__ import annotations

import copy

import cel
import pytest
from manifests import DIGEST, manifests

pytestmark = pytest.mark.xdist_group("infra-manifests")


def refusals(policy_name, manifest):
    """The messages of a policy for a manifest, as the API server would give them."""
    policy = next(
        m for m in manifests("cpu") if m["kind"] == "ValidatingAdmissionPolicy" and m["metadata"]["name"] == policy_name
    )["spec"]
    context = {"object": manifest}
    context["variables"] = {v["name"]: cel.evaluate(v["expression"], context) for v in policy.get("variables", [])}
    return [v["message"] for v in policy["validations"] if not cel.evaluate(v["expression"], context)]


CONTAINER = {
    "name": "stage",
    "image": f"registry/stages@{DIGEST}",
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
}
POD = {"kind": "Pod", "metadata": {"name": "stage"}, "spec": {"containers": [CONTAINER]}}


def changed(manifest, path, value):
    manifest = copy.deepcopy(manifest)
    *above, last = path
    node = manifest
    for key in above:
        node = node[key]
    node[last] = value
    return manifest


def test_a_pod_by_digest_with_requests_is_let_through():
    assert refusals("images-by-digest", POD) == refusals("requests-and-limits", POD) == []


@pytest.mark.parametrize("image", ["stages:v1", "stages", "stages@sha256:abc", f"stages@{DIGEST}x"])
def test_an_image_that_is_no_digest_is_refused(image):
    assert (
        "Name it by digest" in refusals("images-by-digest", changed(POD, ["spec", "containers", 0, "image"], image))[0]
    )


def test_an_initial_container_is_no_way_round():
    pod = changed(POD, ["spec", "initContainers"], [{"name": "fetch", "image": "busybox"}])
    assert refusals("images-by-digest", pod)


@pytest.mark.parametrize(
    "resources", [{}, {"requests": {"cpu": "1"}}, {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1"}}]
)
def test_a_pod_that_cannot_be_sized_is_refused(resources):
    pod = changed(POD, ["spec", "containers", 0, "resources"], resources)
    assert "limit of memory" in refusals("requests-and-limits", pod)[0]


def service(kind, annotations=None):
    metadata = {"name": "x"} | ({"annotations": annotations} if annotations is not None else {})
    return {"kind": "Service", "metadata": metadata, "spec": {"type": kind} if kind else {}}


@pytest.mark.parametrize("kind", [None, "ClusterIP", "ExternalName"])
def test_services_inside_are_let_through(kind):
    assert refusals("no-way-in-from-outside", service(kind)) == []


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_a_dashboard_gets_no_address_outside(kind):
    assert "kubectl port-forward" in refusals("no-way-in-from-outside", service(kind))[0]


INTERNAL = "service.beta.kubernetes.io/aws-load-balancer-internal"


def test_the_gateway_stays_inside():
    assert refusals("gateway-stays-inside", service("LoadBalancer", {INTERNAL: "true"})) == []
    assert refusals("gateway-stays-inside", service("ClusterIP")) == []
    for public in (service("LoadBalancer"), service("LoadBalancer", {INTERNAL: "false"}), service("NodePort")):
        assert "would be public" in refusals("gateway-stays-inside", public)[0]


TOKEN = {"authOptions": {"mode": "token"}, "headGroupSpec": {}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda cluster: {"kind": "RayCluster", "spec": cluster},
        lambda cluster: {"kind": "RayJob", "spec": {"rayClusterSpec": cluster}},
        lambda cluster: {"kind": "RayService", "spec": {"rayClusterConfig": cluster}},
    ],
    ids=["RayCluster", "RayJob", "RayService"],
)
def test_ray_runs_with_a_token_and_shows_no_dashboard(wrap):
    assert refusals("ray-with-token", wrap(TOKEN)) == []
    for cluster in ({}, {"authOptions": {}}, {"authOptions": {"mode": "disabled"}}):
        assert "Ray runs whatever is sent" in refusals("ray-with-token", wrap(cluster))[0]
    exposed = {**TOKEN, "headGroupSpec": {"serviceType": "LoadBalancer"}}
    assert "dashboard would get an address" in refusals("ray-with-token", wrap(exposed))[0]


def test_each_policy_is_bound_and_denies():
    bound = {
        m["spec"]["policyName"]: m["spec"]["validationActions"]
        for m in manifests("cpu")
        if m["kind"] == "ValidatingAdmissionPolicyBinding"
    }
    named = {m["metadata"]["name"] for m in manifests("cpu") if m["kind"] == "ValidatingAdmissionPolicy"}
    assert bound == {name: ["Deny"] for name in named}
