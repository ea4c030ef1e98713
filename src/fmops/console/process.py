"""The console as a process.

Enters: a project. Leaves: a listening console, until a signal.
Refuses: a port that is taken, and every address at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from starlette.types import ASGIApp

from fmops.console.access import Token, names
from fmops.console.app import build_console
from fmops.console.talk import Talk
from fmops.deployment.serving.server import address, bind, run_server
from fmops.orchestration.project import Project
from fmops.orchestration.up import console_url, gateway_url


class _Service:
    """What ends in order."""

    version = "console"

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    async def drain(self, *, grace_s: float) -> None:
        """Answers that run are cut with their connection to the gateway."""
        await self._talk.close()


def run_console(project: Project, *, host: str, port: int, read_only: bool, new_token: bool = False) -> None:
    """Serve the console of a workspace; says where it is.

    Raises:
        FmopsError: the port is taken, or the host is every address.
    """
    names(host, port)
    listener = bind(host, port)
    taken = listener.getsockname()[1]
    invite(project, url=address(listener), anew=new_token, make=sys.stdout.isatty())

    def build() -> tuple[_Service, ASGIApp]:
        talk = Talk(project.store.root, gateway_url(project.spec.serve), model=project.spec.name)
        return _Service(talk), build_console(project, talk, host=host, port=taken, read_only=read_only)

    run_server(build, [listener], page="/")


def invite(
    project: Project,
    *,
    url: str | None = None,
    anew: bool = False,
    make: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Say where the console is; with its token, in the part of the URL that no server sees, when it has just been made.

    Args:
        url: where it listens; the address of `fmops up` when left out.
        make: a token where there is none yet; not where a log would keep it.
    """
    token = Token(project.store.root).make(anew=anew) if make or anew else None
    at = url or console_url(project.spec.serve)
    if token is None:
        say(f"open      {at}/  (its token was shown when it was made; `fmops console --new-token` makes another)")
    else:
        say(f"open      {at}/#{token}  (the token is shown this once)")
