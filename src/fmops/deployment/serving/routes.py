"""Who answers which share of the traffic: `.fmops/routes.json`, and the draw of each request.

Enters: the file, replaced whole by the rollout controller. Leaves: `Routes`, and an arm for each request.
Refuses: a change made from a stale view (compare-and-swap on `version`).
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from fmops.artifacts import Frozen
from fmops.errors import EXIT_FAILED, FmopsError, first_mistake
from fmops.locks import locked
from fmops.store import write_atomically

ROUTES = "routes.json"
Share = Annotated[float, Field(ge=0, le=1)]


class RoutesMoved(FmopsError):
    """Somebody changed the routes in between; an API answers 409."""

    exit_code = EXIT_FAILED


class Target(Frozen):
    """One release and where its engine answers."""

    release: str = Field(description="Key of the release artifact.")
    url: str | None = Field(None, description="Base URL of its engine; null until one is ready, then it gets traffic.")


class Routes(Frozen):
    """Where traffic goes. The champion takes what the canary does not."""

    champion: Target | None = None
    challenger: Target | None = None
    canary_share: Share = Field(0.0, description="Share of the requests that the challenger answers.")
    shadow_share: Share = Field(0.0, description="Share of the champion's requests that the challenger sees as well.")
    version: int = Field(0, ge=0, description="Raised by one with every change; 0 is the file that does not exist.")

    @model_validator(mode="after")
    def _possible(self) -> Routes:
        if self.challenger is None and (self.canary_share or self.shadow_share):
            raise ValueError("canary_share and shadow_share need a challenger")
        return self


class Draw(Frozen):
    """What chance gave one request."""

    arm: Literal["champion", "canary"]
    shadow: bool = Field(description="The challenger sees a copy; its answer is discarded.")


def draw(routes: Routes, identity: str) -> Draw:
    """Assign a request by a digest of the rollout and `identity`, a random id of the request or a user.

    The same identity draws the same number for as long as the challenger is the same: who is a canary at 1 % still is
    at 10 %. A new challenger shuffles everybody. Canary and mirror are drawn independently.
    """
    if routes.challenger is None or routes.challenger.url is None:
        return Draw(arm="champion", shadow=False)
    release = routes.challenger.release
    if _uniform(release, "canary", identity) < routes.canary_share:
        return Draw(arm="canary", shadow=False)
    return Draw(arm="champion", shadow=_uniform(release, "shadow", identity) < routes.shadow_share)


def _uniform(*parts: str) -> float:
    """A number in [0, 1) that only the parts decide."""
    digest = blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


class RoutesFile:
    """The routes on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._routes = Routes()

    def current(self) -> Routes:
        """The routes as of now. Costs one look at the file's times: a change holds from the next request on.

        Raises:
            FmopsError: the file is no routes.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._routes = None, Routes()
            return self._routes
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._routes = self._read()
            self._stamp = stamp
        return self._routes

    def compare_and_swap(self, routes: Routes, *, expected: int) -> Routes:
        """Replace the routes if their version still is `expected`; returns them with the next version.

        Raises:
            RoutesMoved: it is not; nothing is changed.
        """
        with locked(self.path.with_suffix(".lock"), wait_s=10):
            now = self._read() if self.path.is_file() else Routes()
            if now.version != expected:
                raise RoutesMoved(
                    f"the routes are at version {now.version}, expected {expected}: somebody changed them meanwhile. "
                    "Read them again, then decide again."
                )
            written = routes.model_copy(update={"version": expected + 1})
            write_atomically(self.path, written.model_dump_json(indent=1) + "\n")
        return written

    def _read(self) -> Routes:
        try:
            return Routes.model_validate_json(self.path.read_bytes())
        except ValidationError as error:
            raise FmopsError(
                f"{self.path} is no routes file: {first_mistake(error)}. Mend it, or remove it and run "
                "`fmops up` again."
            ) from None
