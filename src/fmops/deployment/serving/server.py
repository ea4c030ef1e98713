"""The process around the app: a socket, uvicorn, and an orderly end.

Enters: a bound socket and the app. Leaves: a listening server, until a signal; then exit 0.
Refuses: a port that is taken. On SIGTERM readiness ends first, then new work is refused, then running answers finish.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from fmops.deployment.serving.http import BoundedHttp
from fmops.errors import FmopsError
from fmops.locks import locked
from fmops.store import write_atomically

GRACE_S = 20.0
"""How long running answers may take after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""
SECRET = "gateway.secret"
"""In the workspace, readable by its owner only: engines want it, cache salts and digests of users are keyed by it."""
KEEP_ALIVE_S = 75
"""Longer than the gateway keeps an idle connection (60 s): it never writes into one that is being closed."""


class Drainable(Protocol):
    """What stands behind the routes."""

    version: str

    async def drain(self, *, grace_s: float) -> None:
        """Take nothing new; return when what runs has ended, at the latest after the grace."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, not yet listening.

    Raises:
        FmopsError: the address is in use or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off: small pieces of a stream would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise FmopsError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another port with --port "
            "(0 takes a free one), or end what listens there."
        ) from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def workspace_secret(workspace: Path) -> str:
    """The secret that engines and gateway of a workspace share; made when first asked for."""
    path = workspace / SECRET
    with locked(workspace / f"{SECRET}.lock", wait_s=10):
        if not path.is_file():
            write_atomically(path, secrets.token_urlsafe(32) + "\n", mode=0o600)
    return path.read_text().strip()


def configure(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves here: quiet, and with an end to what it reads of a head; nobody's word for his address."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_S, http=BoundedHttp, proxy_headers=False,
    )  # fmt: skip


def run_server(
    build: Callable[[], tuple[Drainable, ASGIApp]], listeners: Sequence[socket.socket], *, grace_s: float = GRACE_S,
    page: str = "/v1",
) -> None:  # fmt: skip
    """Serve what `build` makes on the event loop, until a signal, then drain. Prints the first address and its page."""

    async def run() -> None:
        service, app = build()
        config = configure(app)
        await _Server(config, service, address(listeners[0]) + page, grace_s).serve(sockets=list(listeners))

    asyncio.run(run())


class _Server(uvicorn.Server):
    """Uvicorn closes its sockets at the signal; here the service drains first, and answers 503 meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Drainable, url: str, grace_s: float) -> None:
        super().__init__(config)
        self._service, self._url, self._grace_s = service, url, grace_s
        self._signals = 0
        self._loop = asyncio.get_running_loop()
        self._drained: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            print(f"{self._service.version} listens on {self._url}  (stop with Ctrl-C)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end now. Neither is raised again: an orderly end exits with 0."""
        self._signals += 1
        if self._signals == 1:
            self._loop.call_soon_threadsafe(self._begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def _begin_drain(self) -> None:
        self._drained = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(grace_s=self._grace_s)
        self.should_exit = True
