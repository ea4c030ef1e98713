"""The console's routes: one page, one state, few orders.

Enters: HTTP from a browser on this machine. Leaves: the page, the state as JSON with an ETag, the outcome of orders.
Refuses: requests without the token, of other origins, for other hosts; orders that come too late (409).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmops.console.access import COOKIE_S, Token, cookie_name, names, refusal
from fmops.console.state import Snapshots
from fmops.console.talk import Talk
from fmops.deployment.rollout.command import run_action
from fmops.deployment.serving.bodies import RequestError
from fmops.deployment.serving.wire import error_response, read_json
from fmops.errors import FmopsError
from fmops.orchestration.project import Project

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer. No script runs but the page's own files, whatever a model may have written."""

Handler = Callable[[Request], Awaitable[Response]]


class Order(BaseModel):
    """`POST /api/orders`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    order: Literal["start", "promote", "hold", "resume", "rollback"]
    seen: str = Field(min_length=1, max_length=200, description="Id of the rollout; with `start`, the champion.")
    release: str | None = Field(None, max_length=200, description="What to roll out, with `start`.")
    why: str = Field("", max_length=500, description="Remembered with the order.")


def build_console(project: Project, talk: Talk, *, host: str, port: int, read_only: bool) -> ASGIApp:
    """The app of one workspace."""
    console = _Console(project, talk, port=port, read_only=read_only)
    routes = [
        Route("/health", console.health, methods=["GET"]),
        Route("/api/session", console.open_session, methods=["POST"]),
        Route("/api/session", console.end_session, methods=["DELETE"]),
        Route("/api/state", console.guarded(console.state), methods=["GET"]),
        Route("/api/orders", console.changing(console.order), methods=["POST"]),
        Route("/api/chat", console.changing(console.chat), methods=["POST"]),
        Route("/api/feedback", console.changing(console.feedback), methods=["POST"]),
        *_page_routes(),
    ]
    return _Guard(Starlette(routes=routes), known=names(host, port))


class _Console:
    """The handlers."""

    def __init__(self, project: Project, talk: Talk, *, port: int, read_only: bool) -> None:
        self._project, self._talk, self._read_only = project, talk, read_only
        self._cookie = cookie_name(port)
        self._token = Token(project.store.root)
        self._snapshots = Snapshots(project, read_only=read_only)

    def guarded(self, handler: Handler) -> Handler:
        """Only with the token."""

        async def handle(request: Request) -> Response:
            try:
                if not self._token.is_right(request.cookies.get(self._cookie, "")):
                    raise RequestError(
                        "the console wants its token. `fmops up` showed it once; `fmops console --new-token` makes "
                        "another.", code="no_token", status=401,
                    )  # fmt: skip
                return await handler(request)
            except RequestError as error:
                return error_response(error)

        return handle

    def changing(self, handler: Handler) -> Handler:
        """Only with the token, and not where the console just shows."""

        async def handle(request: Request) -> Response:
            if self._read_only:
                raise RequestError(
                    "this console only shows. Start it without --read-only to give orders and to chat.",
                    code="read_only", status=403,
                )  # fmt: skip
            return await handler(request)

        return self.guarded(handle)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def open_session(self, request: Request) -> Response:
        """Exchange the token for a cookie that no script can read."""
        try:
            given = await read_json(request)
            token = given.get("token") if isinstance(given, dict) else None
            if not isinstance(token, str) or not self._token.is_right(token):
                raise RequestError(
                    "that is not the token. `fmops console --new-token` makes another.", code="wrong_token", status=401
                )
        except RequestError as error:
            return error_response(error)
        response = JSONResponse({"accepted": True})
        response.set_cookie(self._cookie, token, max_age=COOKIE_S, httponly=True, samesite="strict")
        return response

    async def end_session(self, request: Request) -> Response:
        response = JSONResponse({"ended": True})
        response.delete_cookie(self._cookie, httponly=True, samesite="strict")
        return response

    async def state(self, request: Request) -> Response:
        """Everything that the page shows; 304 where nothing has changed."""
        tag, body = await run_in_threadpool(self._snapshots.current)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(body, media_type="application/json", headers={"ETag": tag})

    async def order(self, request: Request) -> Response:
        """Do what `fmops rollout` does, if the world still is as the person saw it."""
        try:
            order = Order.model_validate(await read_json(request))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the order"
            raise RequestError(f"{where}: {first['msg']}", code="invalid_order") from None
        store, policy = self._project.store, self._project.spec.rollout

        def act() -> str:
            return run_action(store, policy, order.order, key=order.release, why=order.why.strip(), seen=order.seen)

        try:
            said = await run_in_threadpool(act)
        except FmopsError as error:
            raise RequestError(str(error), code="conflict", status=409) from None
        finally:
            self._snapshots.forget()
        return JSONResponse({"said": said.splitlines()[0]})

    async def chat(self, request: Request) -> Response:
        given = await read_json(request)
        return await self._talk.chat(given.get("messages") if isinstance(given, dict) else None)

    async def feedback(self, request: Request) -> Response:
        return await self._talk.feedback(await read_json(request))


class _Guard:
    """In front of every route: whose request it is, and what every answer carries."""

    def __init__(self, app: ASGIApp, *, known: frozenset[str]) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            return
        request = Request(scope)
        # The supervisor asks for /health by address; it tells nothing.
        why = refusal(request.headers, known=self._known, changes=request.method not in ("GET", "HEAD"))
        answer: ASGIApp = self._app if why is None else error_response(RequestError(why, code="foreign", status=403))
        await answer(scope, receive, send_guarded)


def _page_routes() -> list[Route]:
    """The page's files, read once. They hold nothing of the workspace, so they need no token."""
    return [
        Route(f"/{'' if path.name == 'index.html' else path.name}", _file(path), methods=["GET"])
        for path in sorted(PAGE.iterdir())
        if path.suffix in KINDS
    ]


def _file(path: Path) -> Callable[[Request], Response]:
    content = path.read_bytes()

    def answer(request: Request) -> Response:
        return Response(content, media_type=KINDS[path.suffix])

    return answer
