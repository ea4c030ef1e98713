"""An OpenAI-compatible endpoint for one release.

Enters: HTTP. Leaves: answers that name the release they come from.
Refuses: a release that is not certified, and every malformed request, in the shape that OpenAI's clients read.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fmops.artifacts import Release
from fmops.deployment.serving.bodies import ChatBody, CompletionBody, RequestError, Sampling, parse_body
from fmops.deployment.serving.engine import EngineError, Generation, PromptError, Token, load_engine
from fmops.deployment.serving.replies import Kind, Reply
from fmops.deployment.serving.server import bind, run_server
from fmops.deployment.serving.service import Answer, Service
from fmops.deployment.serving.wire import DONE, GONE, SLOTS, bears, error_response, event, read_json
from fmops.deployment.verify import verify_release
from fmops.errors import FmopsError
from fmops.production import Serve

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat may use what the context leaves."""

REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)

Handler = Callable[[Request], Awaitable[Response]]


def serve(
    release: Release, config: Serve, *, files: Mapping[str, str], threads: int, version: str, secret: str | None = None
) -> None:
    """Serve a release until SIGTERM or SIGINT; `files` are its SHA-256 digests from the record.

    With a `secret` only who bears it is answered: `fmops up` lets the gateway in, and nobody round it.

    Raises:
        IntegrityError: the folder is not what the record says, or parity is missing or failed.
        FmopsError: the port is taken, or parity was proved on another engine than the one that would serve.
    """
    parity = verify_release(release.path, files)
    engine = parity.engine if config.engine == "auto" else config.engine
    if parity.engine != engine:
        raise FmopsError(
            f"{version} was certified on the engine {parity.engine!r}, the spec serves with {engine!r}. "
            f"Set serve.engine: {parity.engine}, or release it for {engine!r}."
        )
    # Taken before the model is loaded: a port in use is found at once.
    listener = bind(config.host, config.port)
    loaded = load_engine(engine, release.model, max_tokens=config.max_tokens, threads=threads)

    def build() -> tuple[Service, Starlette]:
        service = Service(loaded, version=version)
        return service, build_app(service, name=release.name, secret=secret)

    try:
        run_server(build, [listener])
    finally:
        loaded.close()


def build_app(service: Service, *, name: str, secret: str | None = None) -> Starlette:
    """The routes, for a service; `name` is the model's name in the API. All but /health want the `secret`, if any."""
    api = _Api(service, name, secret)
    routes = [
        Route("/v1/chat/completions", api.guarded(api.chat, "chat"), methods=["POST"]),
        Route("/v1/completions", api.guarded(api.complete, "completions"), methods=["POST"]),
        Route("/v1/models", api.guarded(api.models, "models"), methods=["GET"]),
        Route("/v1/models/{model}", api.guarded(api.model, "models"), methods=["GET"]),
        Route("/health", api.guarded(api.health, "health"), methods=["GET"]),
        Route("/metrics", api.guarded(api.metrics, "metrics"), methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: api.http_error, Exception: api.crashed})


class _EventStream(StreamingResponse):
    """Server-sent events that give the answer's place back however the stream ends, begun or not."""

    def __init__(self, events: AsyncIterator[bytes], answer: Answer) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class _Api:
    """The handlers of one service."""

    def __init__(self, service: Service, name: str, secret: str | None) -> None:
        self._service, self._name, self._secret = service, name, secret

    def guarded(self, handler: Handler, route: str) -> Handler:
        """Answer mistakes in OpenAI's shape, count the request, and say which release answered."""

        async def handle(request: Request) -> Response:
            try:
                if self._secret and route != "health" and not bears(request, self._secret):
                    raise RequestError("this engine answers its gateway only", code="invalid_api_key", status=401)
                response = await handler(request)
            except RequestError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            self._service.metrics.requests.labels(route, str(response.status_code)).inc()
            response.headers["x-fmops-release"] = self._service.version
            response.headers[SLOTS] = str(self._service.engine.slots)
            return response

        return handle

    async def chat(self, request: Request) -> Response:
        self._service.refuse_early()
        body = parse_body(await read_json(request), ChatBody)
        self._known(body.model)
        messages = [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
            | ({"pictures": turn.pictures} if turn.pictures else {})
            for turn in body.messages
        ]
        shown = tuple(url for turn in body.messages for url in turn.pictures)
        prompt = await self._encode(lambda: self._service.engine.tokenizer.encode_chat(messages), "messages")
        asked = (
            body.max_completion_tokens
            or body.max_tokens
            or max(1, self._service.engine.tokenizer.context_tokens - len(prompt))
        )
        top = (body.top_logprobs or 0) if body.logprobs else None
        generation = replace(_generation(body, prompt, asked), top_logprobs=top or 0, pictures=shown)
        return await self._answer(request, body, generation, kind="chat", top_logprobs=top)

    async def complete(self, request: Request) -> Response:
        self._service.refuse_early()
        body = parse_body(await read_json(request), CompletionBody)
        self._known(body.model)
        given = body.prompt
        prompt = (
            await self._encode(lambda: self._service.engine.tokenizer.encode(given), "prompt")
            if isinstance(given, str)
            else list(given)
        )
        asked = body.max_tokens or COMPLETION_TOKENS
        generation = replace(
            _generation(body, prompt, asked), top_logprobs=body.logprobs or 0, scores_prompt=bool(body.echo)
        )
        return await self._answer(request, body, generation, kind="text_completion", top_logprobs=body.logprobs)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._known(request.path_params["model"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        status = self._service.status()
        return JSONResponse(
            {"status": status, "release": self._service.version}, status_code=200 if status == "ok" else 503
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def http_error(self, request: Request, error: Exception) -> Response:
        """Unknown routes and wrong methods."""
        assert isinstance(error, HTTPException)
        routes = "/v1/chat/completions, /v1/completions, /v1/models, /health, /metrics"
        text = f"{request.method} {request.url.path}: {error.detail}. Known: {routes}."
        response = error_response(RequestError(text, status=error.status_code, code="unknown_url"))
        response.headers["x-fmops-release"] = self._service.version
        return response

    async def crashed(self, request: Request, error: Exception) -> Response:
        """A fault of ours; Starlette raises it again after this answer, so that the log holds the traceback."""
        self._service.metrics.requests.labels("error", "500").inc()
        return error_response(
            RequestError(f"internal error: {type(error).__name__}", status=500, code="internal_error")
        )

    def _known(self, model: str) -> None:
        if model != self._name:
            raise RequestError(
                f"the model {model!r} does not exist here. Known: {self._name}.",
                param="model", code="model_not_found", status=404,
            )  # fmt: skip

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "fmops",
            "version": self._service.version,
            "batch_tolerance": self._service.engine.batch_tolerance,
        }

    async def _encode(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return await asyncio.to_thread(encode)
        except PromptError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from None

    async def _answer(
        self, request: Request, body: Sampling, generation: Generation, *, kind: Kind, top_logprobs: int | None
    ) -> Response:
        answer = self._service.open(generation, operation=kind)
        reply = Reply(
            kind, engine=self._service.engine, model=self._name, version=self._service.version,
            prompt_tokens=len(generation.prompt), top_logprobs=top_logprobs, request_id=_request_id(request),
        )  # fmt: skip
        if body.stream:
            return _EventStream(_events(answer, reply, usage=body.wants_usage), answer)
        try:
            tokens = await _unless_gone(request, _collect(answer))
        except EngineError as error:
            raise RequestError(str(error), code="engine_failed", status=503, retry_after_s=1) from None
        finally:
            answer.close()
        return Response(status_code=GONE) if tokens is None else JSONResponse(reply.whole(tokens))


def _generation(body: Sampling, prompt: list[int], max_tokens: int) -> Generation:
    """What both kinds of request ask of the engine alike."""
    return Generation(
        prompt=tuple(prompt), max_tokens=max_tokens, temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0, seed=body.seed, stop=tuple(body.stop or ()), cache_salt=body.cache_salt or "",
    )  # fmt: skip


def _request_id(request: Request) -> str:
    """The caller's, as vLLM does it, so that whoever routes a request knows the answer's id; else a random one."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


async def _collect(answer: Answer) -> list[Token]:
    return [token async for token in answer]


async def _unless_gone(request: Request, work: Any) -> list[Token] | None:
    """The result of `work`, or None when the client hangs up first; then the work is cancelled."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        result: list[Token] | None = doing.result() if doing.done() else None
    finally:
        for task in (doing, watching):
            task.cancel()
    return result


async def _events(answer: Answer, reply: Reply, *, usage: bool) -> AsyncIterator[bytes]:
    """A stream ends with [DONE] when it is complete and with an error event when it is not; never in silence."""
    count, total = 0, 0.0
    try:
        async for token in answer:
            # With the first token, not before it: a client measures the time to it.
            if not count and (opening := reply.opening()):
                yield event(opening)
            count, total = count + 1, total + token.logprob
            if piece := reply.piece(token):
                yield event(piece)
    except EngineError as error:
        yield event(RequestError(str(error), code="stream_failed", status=503).body())
        return
    if usage:
        yield event(reply.closing(count, total))
    yield DONE
