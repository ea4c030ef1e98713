"""Who answers which share: the one protocol through which a rollout moves traffic.

Enters: the traffic that is wanted. Leaves: the same, and True, once the world agrees.
Refuses: to overwrite what somebody else has changed meanwhile (compare-and-swap).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fmops.deployment.rollout.machine import SetTraffic
from fmops.deployment.serving.routes import ROUTES, Routes, RoutesFile, Target


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
