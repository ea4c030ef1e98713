"""Who answers which share: the one protocol through which a rollout moves traffic.

Enters: the traffic that is wanted. Leaves: the same, and True, once the world agrees.
Refuses: to overwrite what somebody else has changed meanwhile (compare-and-swap).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fmops.deployment.golden import Ask, answer_of
from fmops.deployment.manifests import NAMESPACE, Backend
from fmops.deployment.rollout.machine import SetTraffic
from fmops.deployment.serving.routes import ROUTES, Routes, RoutesFile, RoutesMoved, Target
from fmops.errors import FmopsError

if TYPE_CHECKING:
    from fmops.adapters.kubernetes import Cluster

WHOLE = 10_000
"""Sum of a route's weights: shares of a hundredth of a percent."""
TRIES = 5


class Traffic(Protocol):
    """What moves shares: the local gateway here; KServe's or the Gateway API's weights on a cluster.

    Implementations are idempotent and may be killed at any point: the controller calls again.
    """

    def set(self, wanted: SetTraffic) -> None:
        """Make the shares so; a release keeps the engine that it has."""

    def url(self, release: str) -> str | None:
        """Where a release's engine answers, or None while it has none."""


class LocalTraffic:
    """The routes file that the local gateway reads before each request."""

    def __init__(self, workspace: Path) -> None:
        self._file = RoutesFile(workspace / ROUTES)

    def set(self, wanted: SetTraffic) -> None:
        """Replace the routes if they differ.

        Raises:
            RoutesMoved: somebody changed them in between; look again.
        """
        now = self._file.current()
        routes = Routes(
            champion=_target(now, wanted.champion),
            challenger=_target(now, wanted.challenger) if wanted.challenger else None,
            canary_share=wanted.canary,
            shadow_share=wanted.shadow,
            version=now.version,
        )
        if routes != now:
            self._file.compare_and_swap(routes, expected=now.version)

    def url(self, release: str) -> str | None:
        """Where the release's engine answers, as the supervisor wrote it."""
        return _target(self._file.current(), release).url


def _target(routes: Routes, release: str) -> Target:
    present = [target for target in (routes.champion, routes.challenger) if target and target.release == release]
    # The supervisor starts an engine for a release without one, and writes its URL.
    return present[0] if present else Target(release=release, url=None)


@dataclass(frozen=True)
class ServiceState:
    """How far a release's service is."""

    text: str
    ready: bool = False
    failed: bool = False


class GatewayTraffic:
    """The weights of a lifecycle's HTTPRoute at the cluster's gateway; KServe or KubeRay run the engines."""

    def __init__(self, cluster: Cluster, lifecycle: str) -> None:
        self._cluster, self._lifecycle = cluster, lifecycle

    def set(self, wanted: SetTraffic) -> None:
        """Put the weights so; whoever changes the route at the same time is read again, never overwritten.

        Raises:
            RoutesMoved: others change it all the time.
            FmopsError: there is no route yet, or a release has no service.
        """
        from fmops.adapters.kubernetes import Conflict

        for _ in range(TRIES):
            route = self._route()
            if route is None:
                raise FmopsError(
                    f"no HTTPRoute {self._lifecycle} in {NAMESPACE}: nothing serves yet. `fmops deploy --on eks` first."
                )
            changed = self._changed(route, wanted)
            if changed == route:
                return
            try:
                self._cluster.replace(changed)
            except Conflict:
                continue
            return
        raise RoutesMoved(f"the route {self._lifecycle} was changed by others {TRIES} times. Look again.")

    def url(self, release: str) -> str | None:
        """The release's service as the API server's proxy names it, once it is ready."""
        backend = self.backend(release)
        return f"http:{backend.service}:{backend.port}" if backend and self.state(release).ready else None

    def engine(self, url: str) -> Ask:
        """Ask the engine at an address that `url` gave."""

        def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
            reply = self._cluster.ask(url, path, body, namespace=NAMESPACE)
            return answer_of(reply.status_code, reply.text)

        return ask

    def serving(self) -> str | None:
        """The release that the route's annotation calls champion; None while there is no route."""
        route = self._route()
        return route["metadata"].get("annotations", {}).get("fmops/champion") if route else None

    def backend(self, release: str) -> Backend | None:
        """The service in front of a release's pods, by who runs them."""
        if self._service("InferenceService", "serving.kserve.io/v1beta1", release):
            return Backend(service=f"{release}-predictor", port=80)
        if self._service("RayService", "ray.io/v1", release):
            return Backend(service=f"{release}-serve-svc", port=8000)
        return None

    def state(self, release: str) -> ServiceState:
        """What KServe or KubeRay say of a release."""
        service = self._service("InferenceService", "serving.kserve.io/v1beta1", release) or self._service(
            "RayService", "ray.io/v1", release
        )
        if service is None:
            return ServiceState("there is no such service")
        status = service.get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or ()}
        ready = conditions.get("Ready", {})
        if ready.get("status") == "True":
            return ServiceState("ready", ready=True)
        model = status.get("modelStatus") or {}
        failure = model.get("lastFailureInfo") or {}
        if model.get("transitionStatus") in ("BlockedByFailedLoad", "InvalidSpec"):
            return ServiceState(f"{failure.get('reason')}: {failure.get('message')}", failed=True)
        said = ready.get("message") or ready.get("reason") or (model.get("states") or {}).get("targetModelState")
        return ServiceState(str(said or "waiting for its controller"))

    def _changed(self, route: Mapping[str, Any], wanted: SetTraffic) -> dict[str, Any]:
        """The route with other weights; what else is in it stays."""
        canary = round(wanted.canary * WHOLE)
        weights = [(wanted.champion, WHOLE - canary)]
        if wanted.challenger and canary:
            weights.append((wanted.challenger, canary))
        rule = {**route["spec"]["rules"][0]}
        rule["backendRefs"] = [{**self._reference(release), "weight": weight} for release, weight in weights]
        rule["filters"] = [each for each in rule.get("filters", ()) if each["type"] != "RequestMirror"]
        if wanted.challenger and wanted.shadow:
            fraction = {"numerator": round(wanted.shadow * WHOLE), "denominator": WHOLE}
            mirror = {"backendRef": self._reference(wanted.challenger), "fraction": fraction}
            rule["filters"].append({"type": "RequestMirror", "requestMirror": mirror})
        if not rule["filters"]:
            del rule["filters"]
        notes = {**route["metadata"].get("annotations", {}), "fmops/champion": wanted.champion}
        return {
            **route,
            "metadata": {**route["metadata"], "annotations": notes},
            "spec": {**route["spec"], "rules": [rule, *route["spec"]["rules"][1:]]},
        }

    def _reference(self, release: str) -> dict[str, Any]:
        backend = self.backend(release)
        if backend is None:
            raise FmopsError(f"{release} has no service in {NAMESPACE}. `fmops deploy {release} --on eks` first.")
        return {"name": backend.service, "port": backend.port}

    def _route(self) -> dict[str, Any] | None:
        version = "gateway.networking.k8s.io/v1"
        return self._cluster.get("HTTPRoute", self._lifecycle, version=version, namespace=NAMESPACE)

    def _service(self, kind: str, version: str, release: str) -> dict[str, Any] | None:
        return self._cluster.get(kind, release, version=version, namespace=NAMESPACE)
