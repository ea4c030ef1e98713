"""One admitted request: asked of an engine, relayed, traced.

Enters: a job. Leaves: the engine's answer as it comes, ended by `[DONE]` or by an error event, never in silence.
Refuses: to ask twice what may already have been answered once: a stream whose engine has begun is not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from hashlib import blake2b
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fmops.deployment.serving.bodies import ChatBody, RequestError
from fmops.deployment.serving.gateway.circuit import EngineDown
from fmops.deployment.serving.gateway.desk import Desk, Job, Place
from fmops.deployment.serving.gateway.tracing import Exchange, last_user_text, system_text
from fmops.deployment.serving.gateway.upstream import Reply
from fmops.deployment.serving.routes import Target, draw
from fmops.deployment.serving.wire import DONE, GONE, error_response, event
from fmops.traces import Arm

USAGE = b'"choices":[]'
"""Marks the event that carries the token counts; inside a text the quotation marks would be escaped."""
PATHS = {"chat": "/v1/chat/completions", "text_completion": "/v1/completions"}
PREFIXES = {"chat": "chatcmpl", "text_completion": "cmpl"}


class Answering(Response):
    """The response whose body is an engine's answer."""

    def __init__(self, desk: Desk, job: Job, place: Place) -> None:
        self._desk, self._job, self._place = desk, job, place
        self.background = None
        self.status_code = 0
        """What the client was sent; 0 until then."""
        self._complete = self._gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the end, the client's leaving, the deadline, or the gateway's own end."""
        gone = asyncio.ensure_future(_disconnected(receive))
        work = asyncio.ensure_future(self._answer(send))
        left_s = self._desk.limits.request_s - (self._desk.clock() - self._job.arrived)
        try:
            await asyncio.wait({gone, work, self._desk.ended}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._gone = gone.done()
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                if not self._gone and not self._complete:
                    await self._break_off(send)
            else:
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            self._desk.metrics.requests.labels(self._job.operation, str(self.status_code or GONE)).inc()
            self._desk.budgets.settle(self._job.loan, self._job.used)
            self._place.close()

    async def _answer(self, send: Send) -> None:
        """Ask the engine that chance chose; the champion once more where that is safe."""
        desk, job = self._desk, self._job
        request_id = secrets.token_hex(12)
        routes = desk.routes.current()
        chance = draw(routes, job.user if desk.per_user and job.user else request_id)
        target = routes.challenger if chance.arm == "canary" else routes.champion
        exchange = self._exchange(request_id, chance.arm, target)
        if chance.shadow and routes.challenger:
            self._mirror(exchange, routes.challenger)
        down = await self._attempt(exchange, target, send)
        if down is None:
            return
        now = desk.routes.current().champion
        # A stream that may have begun is not repeated; nor is a door knocked at twice that was closed.
        if (not job.body.stream and down.sent) or (not down.sent and now != target):
            again = self._exchange(f"{request_id}-2", "champion", now, retry_of=exchange.id)
            down = await self._attempt(again, now, send)
        if down is not None:
            if down.code == "overloaded":
                desk.metrics.refused.labels(down.code).inc()
            refusal = RequestError(str(down), code=down.code, status=down.status, retry_after_s=down.retry_after_s or 1)
            await self._send(send, error_response(refusal), release=None)

    async def _attempt(self, exchange: Exchange, target: Target | None, send: Send) -> EngineDown | None:
        """One exchange, traced however it ends; returns why there was no answer, while the client has got nothing."""
        reply = None
        try:
            desk = self._desk
            left_s = max(0.0, desk.limits.wait_s - (desk.clock() - self._job.arrived))
            reply = await self._ask(exchange, target, stream=bool(self._job.body.stream), wait_s=left_s)
            exchange.status = reply.status
            if reply.is_stream:
                await self._relay(exchange, reply, send)
            else:
                await self._pass_on(exchange, reply, send)
        except EngineDown as down:
            exchange.status, exchange.error = down.status, str(down)
            return down
        except asyncio.CancelledError:
            exchange.cancelled = self._gone
            exchange.error = None if exchange.cancelled else "cut by the gateway"
            exchange.status = exchange.status or 503
            raise
        finally:
            if reply:
                reply.close()
            trace = self._desk.remember(exchange)
            unread = trace.prompt_tokens or (self._job.prompt_guess if trace.completion_tokens else 0)
            self._job.used += unread + trace.completion_tokens
        return None

    async def _ask(self, exchange: Exchange, target: Target | None, *, stream: bool, wait_s: float) -> Reply:
        if target is None:
            raise EngineDown("nothing is released yet", sent=False, status=503)
        body = upstream_body(self._job, stream=stream, secret=self._desk.secret)
        request_id = exchange.id.partition("-")[2]
        path = PATHS[exchange.operation]
        context = exchange.span.headers if exchange.span else {}
        headers = {**context, "X-Request-Id": request_id}
        reply = await self._desk.engines.ask(target, path, body, headers=headers, tenant=exchange.tenant, wait_s=wait_s)
        if reply.status >= 500:
            failed = await reply.body()
            sent = reply.status != 503
            wait = reply.headers.get("Retry-After", "")
            raise EngineDown(
                _message(failed), sent=sent, status=502 if sent else 503,
                retry_after_s=int(wait) if wait.isdigit() else None,
            )  # fmt: skip
        return reply

    async def _pass_on(self, exchange: Exchange, reply: Reply, send: Send) -> None:
        """A whole answer, or the engine's refusal."""
        body = await reply.body()
        exchange.received.append(body)
        headers = {"Retry-After": reply.headers["Retry-After"]} if "Retry-After" in reply.headers else {}
        whole = Response(body, status_code=reply.status, media_type="application/json", headers=headers)
        await self._send(send, whole, release=exchange.release)

    async def _relay(self, exchange: Exchange, reply: Reply, send: Send) -> None:
        """A stream, event by event, until its [DONE]."""
        usage = self._job.body.wants_usage
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-fmops-release", exchange.release.encode()),
        ]  # fmt: skip
        exchange.is_stream = True
        self.status_code = 200
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last = b""
        try:
            while events := await reply.events():
                exchange.first = exchange.first or self._desk.clock()
                exchange.received.append(events)
                last = events
                shown = events if usage else without_usage(events)
                if shown:
                    await send({"type": "http.response.body", "body": shown, "more_body": True})
        except EngineDown as down:
            exchange.error = str(down)
        if exchange.error is None and not last.endswith(DONE):
            exchange.error = "the engine ended its answer early"
        told = last.rpartition(b"data: ")[2].startswith(b'{"error"')
        end = b"" if exchange.error is None or told else _broken(exchange.error)
        self._complete = True
        await send({"type": "http.response.body", "body": end})

    def _mirror(self, seen: Exchange, challenger: Target) -> None:
        """Let the challenger see the request too. Nobody waits for it."""
        desk = self._desk
        if len(desk.mirrors) >= desk.limits.shadows:
            return
        exchange = self._exchange(f"{seen.id.partition('-')[2]}-s", "shadow", challenger, shadow_of=seen.id)

        async def mirror() -> None:
            try:
                async with asyncio.timeout(desk.limits.request_s):
                    # A mirror takes what is free; it never stands in line before a person.
                    reply = await self._ask(exchange, challenger, stream=False, wait_s=0.0)
                    exchange.status = reply.status
                    exchange.received.append(await reply.body())
            except (EngineDown, TimeoutError) as error:
                exchange.status, exchange.error = getattr(error, "status", 504), str(error) or "too slow"
            desk.remember(exchange)

        task = asyncio.ensure_future(mirror())
        desk.mirrors.add(task)
        task.add_done_callback(desk.mirrors.discard)

    def _exchange(
        self, request_id: str, arm: Arm, target: Target | None, *, retry_of: str | None = None,
        shadow_of: str | None = None,
    ) -> Exchange:  # fmt: skip
        job, desk = self._job, self._desk
        started_s = desk.wall_clock() - (desk.clock() - job.arrived)
        span = None
        if desk.spans:
            asked = job.body.model_dump()
            span = desk.spans.start(job.headers, operation=job.operation, started_s=started_s, asked=asked)
        return Exchange(
            id=f"{PREFIXES[job.operation]}-{request_id}", operation=job.operation, tenant=job.tenant, user=job.user,
            prompt=last_user_text(job.body), system=system_text(job.body), arm=arm,
            release=target.release if target else "none",
            started_s=started_s, started=job.arrived, retry_of=retry_of, shadow_of=shadow_of, span=span,
        )  # fmt: skip

    async def _break_off(self, send: Send) -> None:
        """End what the client has begun to read, or tell it that nothing will come."""
        why = "the server shut down before" if self._desk.draining else "the time limit was over before"
        why = f"{why} this answer was complete"
        if self.status_code:
            await send({"type": "http.response.body", "body": _broken(why)})
        else:
            status = 503 if self._desk.draining else 504
            refusal = RequestError(why, code="cut", status=status, retry_after_s=1)
            await self._send(send, error_response(refusal), release=None)

    async def _send(self, send: Send, whole: Response, *, release: str | None) -> None:
        if release:
            whole.headers["x-fmops-release"] = release
        self.status_code, self._complete = whole.status_code, True
        await send({"type": "http.response.start", "status": whole.status_code, "headers": whole.raw_headers})
        await send({"type": "http.response.body", "body": whole.body})


def upstream_body(job: Job, *, stream: bool, secret: str) -> bytes:
    """What an engine is asked: the checked fields only, the token counts always, and caches apart by tenant.

    `cache_salt` is vLLM's: without it the time to the first token tells a tenant what another has asked.
    """
    body: dict[str, Any] = job.body.model_dump(exclude_none=True, exclude={"stream", "stream_options"})
    if isinstance(job.body, ChatBody):
        body["messages"] = [{"role": turn.role, "content": turn.plain()} for turn in job.body.messages]
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body["cache_salt"] = blake2b(job.tenant.encode(), key=secret.encode()[:64], digest_size=16).hexdigest()
    return json.dumps(body, ensure_ascii=False).encode()


def without_usage(events: bytes) -> bytes:
    """Events without the token counts, for a client that did not ask for them."""
    if USAGE not in events:
        return events
    return b"".join(one + b"\n\n" for one in events.split(b"\n\n") if one and USAGE not in one)


def _broken(reason: str) -> bytes:
    return event(RequestError(reason, code="stream_failed", status=503).body())


def _message(body: bytes) -> str:
    """An engine's own words, where it speaks OpenAI's language."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return "the engine failed"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
