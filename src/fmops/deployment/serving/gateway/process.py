"""The gateway as a process.

Enters: a workspace and the spec's serving keys. Leaves: a listening gateway, until a signal.
Refuses: a port that is taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from fmops.deployment.serving.gateway.app import build_admin, build_gateway
from fmops.deployment.serving.gateway.desk import Desk, Limits
from fmops.deployment.serving.server import bind, run_server, workspace_secret
from fmops.errors import FmopsError
from fmops.production import Serve

if TYPE_CHECKING:
    from fmops.adapters.otel import Spans

COLLECTORS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either switches spans on; OpenTelemetry's exporter reads the address from them itself."""
CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""`true` puts prompts and answers, redacted, into the spans."""


def run_gateway(workspace: Path, config: Serve, *, name: str) -> None:
    """Serve the routes of `workspace` under the model's `name`; metrics listen on the next port, for this machine only.

    Raises:
        FmopsError: a port is taken, or a collector is named and the extra `otel` is missing.
    """
    spans = spans_of(os.environ)
    listener = bind(config.host, config.port)
    port = listener.getsockname()[1]
    admin_listener = bind("127.0.0.1", port + 1 if config.port else 0)
    secret = workspace_secret(workspace)
    limits = Limits(tokens_per_minute=config.tokens_per_minute, context_tokens=config.max_tokens)

    def build() -> tuple[Desk, ASGIApp]:
        desk = Desk(workspace, secret=secret, limits=limits, per_user=config.split == "user", spans=spans)
        return desk, by_port(build_gateway(desk, name=name), admin=build_admin(desk), port=port)

    run_server(build, [listener, admin_listener])


def spans_of(environment: Mapping[str, str]) -> Spans | None:
    """Spans where the environment names a collector.

    Raises:
        FmopsError: what sends them is not installed.
    """
    named = [name for name in COLLECTORS if environment.get(name)]
    if not named or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        raise FmopsError(
            f"{named[0]} asks for spans, and OpenTelemetry's exporter is not installed. "
            "Install it with: pip install 'fmops[otel]', or unset the variable."
        )
    from fmops.adapters.otel import Spans

    return Spans(content=environment.get(CONTENT, "").lower() == "true")


def by_port(public: ASGIApp, *, admin: ASGIApp, port: int) -> ASGIApp:
    """Requests at `port` see the public routes, all others those of the admin."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (public if scope["server"][1] == port else admin)(scope, receive, send)

    return app
