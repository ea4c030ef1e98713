"""The gateway's routes: an allow-list in front of the engines.

Enters: HTTP with an API key. Leaves: the answer of the release that chance chose, named in `x-fmops-release`.
Refuses: everything else: no key, no budget, too much, too many, unknown routes, in the shape of OpenAI's errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fmops.deployment.serving.bodies import Body, ChatBody, CompletionBody, RequestError, Text, parse_body
from fmops.deployment.serving.gateway.answering import Answering
from fmops.deployment.serving.gateway.desk import Desk, Job
from fmops.deployment.serving.gateway.tracing import Operation, identity, kept
from fmops.deployment.serving.wire import GONE, error_response, read_json
from fmops.traces import Feedback

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
PICTURE_TOKENS = 64
"""Guessed for a picture, until the engine says."""

Handler = Callable[[Request], Awaitable[Response]]


def build_gateway(desk: Desk, *, name: str) -> Starlette:
    """The public routes; `name` is the model's name in the API. What is not here does not exist."""
    api = _Api(desk, name)
    routes = [
        Route("/v1/chat/completions", api.guarded(api.chat, "chat"), methods=["POST"]),
        Route("/v1/completions", api.guarded(api.complete, "completions"), methods=["POST"]),
        Route("/v1/feedback", api.guarded(api.feedback, "feedback"), methods=["POST"]),
        Route("/v1/models", api.guarded(api.models, "models"), methods=["GET"]),
        Route("/v1/models/{model}", api.guarded(api.model, "models"), methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: api.http_error, Exception: api.crashed})


def build_admin(desk: Desk) -> Starlette:
    """For this machine only: what Prometheus reads."""

    async def metrics(request: Request) -> Response:
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(routes=[Route("/metrics", metrics, methods=["GET"])])


class FeedbackBody(BaseModel):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Text = Field(max_length=128)
    thumb: Literal["up", "down"] | None = None
    correction: Text | None = None
    comment: Text | None = None
    user: str | None = None


class _Api:
    """The handlers of one gateway."""

    def __init__(self, desk: Desk, name: str) -> None:
        self._desk, self._name = desk, name

    def guarded(self, handler: Handler, route: str) -> Handler:
        """Answer refusals in OpenAI's shape and count them; an answer counts itself."""

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except RequestError as error:
                self._desk.metrics.refused.labels(error.code or "invalid_request").inc()
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            if not isinstance(response, Answering):
                self._desk.metrics.requests.labels(route, str(response.status_code)).inc()
            return response

        return handle

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatBody, "chat")

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody, "text_completion")

    async def models(self, request: Request) -> Response:
        self._desk.keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._desk.keys.check(request.headers.get("authorization"))
        self._known(request.path_params["model"])
        return JSONResponse(self._card())

    async def feedback(self, request: Request) -> Response:
        """Keep what a person says about an answer; an answer that the tenant did not get does not exist for him."""
        tenant = self._desk.keys.check(request.headers.get("authorization")).tenant
        try:
            body = FeedbackBody.model_validate(await read_json(request))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(str(step) for step in first["loc"])
            raise RequestError(f"{param!r}: {first['msg']}", param=param or None, code="invalid_value") from None
        if body.thumb is None and not body.correction and not body.comment:
            raise RequestError("give at least one of 'thumb', 'correction' and 'comment'", code="empty_feedback")
        if await self._desk.owner(body.id) != tenant:
            raise RequestError(f"there is no answer {body.id!r}", param="id", code="not_found", status=404)
        now = self._desk.wall_clock()
        row = Feedback(
            id=body.id, at_s=now, tenant=tenant, user=identity(self._desk.secret, tenant, body.user), thumb=body.thumb,
            correction=body.correction and kept(body.correction), comment=body.comment and kept(body.comment),
        )  # fmt: skip
        self._desk.feedback.append(row, at_s=now)
        self._desk.metrics.feedback.labels("correction" if body.correction else body.thumb or "comment").inc()
        return JSONResponse({"id": body.id, "object": "feedback", "accepted": True})

    async def health(self, request: Request) -> Response:
        status = self._desk.status()
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def http_error(self, request: Request, error: Exception) -> Response:
        """Unknown routes and wrong methods."""
        assert isinstance(error, HTTPException)
        self._desk.metrics.refused.labels("unknown_url").inc()
        return error_response(RequestError(str(error.detail), status=error.status_code, code="unknown_url"))

    async def crashed(self, request: Request, error: Exception) -> Response:
        """A fault of ours; Starlette raises it again after this answer, so that the log holds the traceback."""
        self._desk.metrics.requests.labels("error", "500").inc()
        return error_response(RequestError("internal error", status=500, code="internal_error"))

    async def _generate(self, request: Request, kind: type[Body], operation: Operation) -> Response:
        """Everything that may be refused before an engine is asked; the answer itself runs as the response."""
        desk = self._desk
        arrived = desk.clock()
        key = desk.keys.check(request.headers.get("authorization"))
        place = desk.admit(key.tenant)
        try:
            value = await read_json(request)
            body = parse_body(value, kind)
            self._known(body.model)
            guess, most = self._cost(body)
            loan = desk.budgets.borrow(
                key.tenant, guess + most, per_minute=key.tokens_per_minute or desk.limits.tokens_per_minute
            )
        except BaseException:
            place.close()
            raise
        user = identity(desk.secret, key.tenant, value.get("user"))
        job = Job(
            operation=operation, body=body, tenant=key.tenant, user=user, arrived=arrived, prompt_guess=guess,
            loan=loan, headers=request.headers,
        )  # fmt: skip
        return Answering(desk, job, place)

    def _cost(self, body: ChatBody | CompletionBody) -> tuple[int, int]:
        """Guessed tokens of the prompt, and the most that the answer may have.

        Raises:
            RequestError: the answer alone would exceed the context.
        """
        context = self._desk.limits.context_tokens
        asked = body.max_tokens
        if isinstance(body, ChatBody):
            guess = sum(_guess(turn.text) + PICTURE_TOKENS * len(turn.pictures) for turn in body.messages)
            asked = body.max_completion_tokens or asked
            most = asked or max(1, context - guess)
        else:
            guess = _guess(body.prompt) if isinstance(body.prompt, str) else len(body.prompt)
            most = asked or COMPLETION_TOKENS
        if most > context:
            raise RequestError(
                f"{most} tokens to generate exceed the context of {context} tokens",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return guess, most

    def _known(self, model: str) -> None:
        if model != self._name:
            raise RequestError(
                f"the model {model!r} does not exist here. Known: {self._name}.",
                param="model", code="model_not_found", status=404,
            )  # fmt: skip

    def _card(self) -> dict[str, Any]:
        champion = self._desk.routes.current().champion
        return {
            "id": self._name, "object": "model", "created": 0, "owned_by": "fmops",
            "version": champion.release if champion else None,
        }  # fmt: skip


def _guess(text: str) -> int:
    """Tokens of a text nobody has tokenised yet: four bytes each; the engine's own count settles it."""
    return len(text.encode()) // 4 + 1
