"""The gateway as a process.

Enters: a workspace and the spec's serving keys. Leaves: a listening gateway, until a signal.
Refuses: a port that is taken.
"""

from __future__ import annotations

from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from fmops.deployment.serving.gateway.app import build_admin, build_gateway
from fmops.deployment.serving.gateway.desk import Desk, Limits
from fmops.deployment.serving.server import bind, run_server, workspace_secret
from fmops.lifecycle import Serve


def run_gateway(workspace: Path, config: Serve, *, name: str) -> None:
    """Serve the routes of `workspace` under the model's `name`; metrics listen on the next port, for this machine only.

    Raises:
        FmopsError: a port is taken.
    """
    listener = bind(config.host, config.port)
    port = listener.getsockname()[1]
    admin_listener = bind("127.0.0.1", port + 1 if config.port else 0)
    secret = workspace_secret(workspace)
    limits = Limits(tokens_per_minute=config.tokens_per_minute, context_tokens=config.max_tokens)

    def build() -> tuple[Desk, ASGIApp]:
        desk = Desk(workspace, secret=secret, limits=limits, per_user=config.split == "user")
        return desk, by_port(build_gateway(desk, name=name), admin=build_admin(desk), port=port)

    run_server(build, [listener, admin_listener])


def by_port(public: ASGIApp, *, admin: ASGIApp, port: int) -> ASGIApp:
    """Requests at `port` see the public routes, all others those of the admin."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (public if scope["server"][1] == port else admin)(scope, receive, send)

    return app
