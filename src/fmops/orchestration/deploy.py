"""`fmops deploy --on eks`: a release becomes a service on the cluster, is checked, and only then gets traffic.

Enters: a project whose store is a bucket, a release, the platform's facts. Leaves: objects in the cluster, a route.
Refuses: unsigned releases; a release that answers otherwise than certified; to move traffic that a champion has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fmops.artifacts import Release
from fmops.deployment.golden import ask_golden
from fmops.deployment.manifests import (
    Manifest,
    Scale,
    disruption_budget,
    inference_service,
    placeholders,
    route,
)
from fmops.deployment.ray_serve import ray_service
from fmops.deployment.replica import Device, Replica, replica_for
from fmops.deployment.rollout.traffic import GatewayTraffic
from fmops.errors import EXIT_FAILED, FmopsError, unknown
from fmops.orchestration.project import Project
from fmops.orchestration.show import find_release
from fmops.store import Record

if TYPE_CHECKING:
    from fmops.adapters.kubernetes import Cluster

By = Literal["kserve", "ray"]
READY_S = 40 * 60.0
"""A node, an image of tens of GB, the weights, and on Neuron the compiler."""
POLL_S = 5.0


class DeployFailed(FmopsError):
    """The cluster could not serve the release, or it must not."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Platform:
    """What the manifests must know of the cluster, from the files beside infra/platform."""

    cluster: str
    profile: str
    registry: str
    digests: dict[str, str] = field(default_factory=dict)
    pools: dict[str, int] = field(default_factory=dict)
    """The ceiling of each node pool, in vCPU."""
    shared_files: bool = False
    """Whether nodes have a file system that they share (`lustre` in infra/cluster)."""

    @classmethod
    def read(cls, folder: Path) -> Platform:
        """`cluster.yaml` (`make platform-values`) and `images.lock.yaml` (`make images`) of a folder.

        Raises:
            FmopsError: one of them is not there.
        """
        found: dict[str, Any] = {}
        for name, made_by in (("cluster.yaml", "make platform-values"), ("images.lock.yaml", "make images")):
            if not (folder / name).is_file():
                raise FmopsError(f"no {folder / name}: `{made_by}` in infra/ writes it. Name its folder by --platform.")
            found |= yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        cluster = found["cluster"]
        digests = {name: image["digest"] for name, image in found["images"].items() if image.get("digest")}
        shared = bool(cluster.get("lustre"))
        return cls(
            cluster["name"], cluster["profile"], cluster["registry"], digests, cluster.get("pools") or {}, shared
        )

    @property
    def device(self) -> Device:
        """What its inference nodes compute with."""
        if self.profile == "gpu":
            return "gpu"
        if self.profile == "neuron":
            return "neuron"
        raise FmopsError(f"the cluster {self.cluster} has the profile {self.profile!r}: no node that vLLM runs on. "
                         "Its profiles gpu and neuron have.")  # fmt: skip

    def image(self, name: str) -> str:
        """An image of the installation's registry, by digest."""
        if name not in self.digests:
            raise unknown("image of images.lock.yaml", name, self.digests)
        return f"{self.registry}/{name}@{self.digests[name]}"


@dataclass(frozen=True)
class Deployment:
    """One release as it would be deployed."""

    record: Record
    release: Release
    replica: Replica
    service: Manifest
    others: tuple[Manifest, ...]

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.service, *self.others)


def plan_deployment(project: Project, key: str, *, platform: Platform, by: By, scale: Scale) -> Deployment:
    """Render a release for a cluster.

    Raises:
        FmopsError: its files are on this machine alone, it is unsigned, or too large.
    """
    if project.store.shared is None:
        raise FmopsError(
            f"the cluster cannot read {project.store.root}. Name a bucket: `fmops run --store s3://bucket/prefix` "
            "sends what is made; then deploy with the same --store."
        )
    record, release = find_release(project, key)
    weights = sum(entry.bytes for name, entry in record.files.items() if name.endswith(".safetensors"))
    config = json.loads((release.model / "config.json").read_bytes())
    replica = replica_for(
        config, weight_bytes=weights, device=platform.device, max_tokens=project.spec.serve.max_tokens
    )
    shared: dict[str, Any] = {
        "name": release.name,
        "uri": project.store.uri(record),
        "replica": replica,
        "scale": scale,
    }
    if by == "ray":
        if platform.device != "gpu":
            raise FmopsError(f"Ray Serve is rendered for GPUs alone, not for {platform.device}. Use --by kserve.")
        service = ray_service(record.key, **shared, image=platform.image("ray-llm"))
        others: list[Manifest] = []
    else:
        service = inference_service(record.key, **shared)
        others = [disruption_budget(record.key)]
    others.append(placeholders(release.name, replica=replica, warm=scale.warm, image=platform.image("pause")))
    return Deployment(record, release, replica, service, tuple(others))


class _Readable(yaml.SafeDumper):
    """Each value where it stands, without anchors; texts of several lines as lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def as_yaml(manifests: Iterable[Manifest]) -> str:
    """Manifests as people read them."""
    return str(yaml.dump_all(manifests, Dumper=_Readable, sort_keys=False, width=120))


def render(deployment: Deployment) -> str:
    """The manifests as YAML."""
    return as_yaml(deployment.manifests)


def deploy_release(
    deployment: Deployment, cluster: Cluster, *, platform: Platform, say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Apply, follow until it is ready, ask the golden prompts, and route to it if nothing serves yet.

    Raises:
        DeployFailed: it does not become ready, or answers otherwise than certified (then it is taken away again).
    """
    key, name = deployment.record.key, deployment.release.name
    for manifest in deployment.manifests:
        cluster.apply(manifest)
        say(f"applied {manifest['kind']} {manifest['metadata']['name']}")
    traffic = GatewayTraffic(cluster, name)
    _follow(traffic, key, say=say, sleep=sleep, clock=clock)
    _golden(deployment, traffic, cluster, say=say)
    serving = traffic.serving()
    if serving is None:
        backend = traffic.backend(key)
        assert backend is not None
        cluster.apply(route(name, cluster=platform.cluster, champion=(key, backend)))
        say(f"routed https://{name}.{platform.cluster}.internal/v1 to {key}")
    elif serving == key:
        say(f"{key} serves already")
    else:
        say(f"{serving} serves. Next: fmops rollout start --release {key} --on eks")


def _follow(
    traffic: GatewayTraffic, key: str, *, say: Callable[[str], None], sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:  # fmt: skip
    """Wait until the service is ready, and say each change on the way."""
    deadline, last = clock() + READY_S, ""
    while True:
        state = traffic.state(key)
        if state.text != last:
            say(f"{key}: {state.text}")
            last = state.text
        if state.ready:
            return
        if state.failed:
            raise DeployFailed(f"{key} does not start: {state.text}. It gets no traffic; look at its pods' logs.")
        if clock() >= deadline:
            raise DeployFailed(
                f"{key} is not ready after {READY_S / 60:.0f} minutes: {state.text}. It gets no traffic. Nodes may be "
                "missing: `kubectl get nodeclaims`."
            )
        sleep(POLL_S)


def _golden(deployment: Deployment, traffic: GatewayTraffic, cluster: Cluster, *, say: Callable[[str], None]) -> None:
    """Compare the running engine's answers with the certified ones; parity may have been proved on another engine."""
    key = deployment.record.key
    url = traffic.url(key)
    assert url is not None
    try:
        golden = ask_golden(deployment.release, traffic.engine(url))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DeployFailed(
            f"{key} is ready, but does not answer the golden prompts: {type(error).__name__}: {error}. "
            "It gets no traffic."
        ) from None
    if not golden.agree:
        service = deployment.service
        cluster.delete(service["kind"], key, version=service["apiVersion"], namespace=service["metadata"]["namespace"])
        raise DeployFailed(
            f"{len(golden.differ)} of {golden.asked} golden answers of {key} are not the certified ones: "
            f"{', '.join(golden.differ)}. It got no traffic and is taken away again. Certify it on the engine that "
            "serves it (`serve.engine: vllm`, the stage release on a GPU)."
        )
    say(f"{golden.asked - len(golden.differ)} of {golden.asked} golden answers are the certified ones")


def describe(deployment: Deployment, *, scale: Scale) -> str:
    """What will be deployed, in words."""
    replica = deployment.replica
    kind: Any = deployment.service["kind"]
    return (
        f"{deployment.record.key} as {kind}: {scale.least} to {max(scale.least, scale.most)} replicas of "
        f"{replica.accelerators} {replica.device}, {replica.cpu} CPU, {replica.memory_gib} GiB; certified on "
        f"{deployment.release.parity.engine}"
    )
