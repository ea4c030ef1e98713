"""The chat: through the gateway, like any client's, so that it is split, traced and counted like theirs.

Enters: a conversation, or what a person says about an answer. Leaves: the gateway's reply as it comes.
Refuses: to talk to an engine; to let the browser see a key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from starlette.responses import JSONResponse, Response, StreamingResponse

from fmops.deployment.serving.bodies import RequestError
from fmops.deployment.serving.chat import CONNECT_S, QUIET_S, TEMPERATURE, TOP_P, own_key
from fmops.deployment.serving.wire import error_response, event

RELEASE = "x-fmops-release"


class Talk:
    """One gateway, seen from the console."""

    def __init__(self, workspace: Path, gateway: str, *, model: str) -> None:
        self._workspace, self._model, self._gateway = workspace, model, gateway
        timeout = httpx.Timeout(QUIET_S, connect=CONNECT_S)
        self._client = httpx.AsyncClient(base_url=gateway, timeout=timeout, trust_env=False)

    async def chat(self, messages: Any) -> Response:
        """Stream the answer to a conversation; its release is in the header `x-fmops-release`, its id in the events."""
        body = {
            "model": self._model, "messages": messages, "stream": True, "temperature": TEMPERATURE, "top_p": TOP_P
        }  # fmt: skip
        reply = await self._send("/v1/chat/completions", body)
        if isinstance(reply, Response):
            return reply
        headers = {name: reply.headers[name] for name in (RELEASE,) if name in reply.headers}
        return StreamingResponse(_relay(reply), media_type="text/event-stream", headers=headers)

    async def feedback(self, said: Any) -> Response:
        """Pass on what a person says about an answer of this console's."""
        reply = await self._send("/v1/feedback", said)
        if isinstance(reply, Response):
            return reply
        try:
            return JSONResponse({"accepted": True})
        finally:
            await reply.aclose()

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.aclose()

    async def _send(self, path: str, body: Any) -> httpx.Response | Response:
        """The gateway's open reply; or a refusal, with its remedy, in the shape of the gateway's own."""
        headers = {"Authorization": f"Bearer {own_key(self._workspace)}"}
        request = self._client.build_request("POST", path, json=body, headers=headers)
        try:
            reply = await self._client.send(request, stream=True)
            if reply.status_code == 200:
                return reply
            text = await reply.aread()
        except httpx.HTTPError as error:
            return _refused(f"the gateway at {self._gateway} does not answer ({error or type(error).__name__}). "
                            "`fmops up` starts it.")  # fmt: skip
        await reply.aclose()
        if reply.status_code == 401:
            return _refused("the gateway does not take the console's key. Remove local.key from the workspace and run "
                            "`fmops up`, or put a key into FMOPS_API_KEY.")  # fmt: skip
        return Response(text, status_code=reply.status_code, media_type="application/json")


async def _relay(reply: httpx.Response) -> AsyncIterator[bytes]:
    """The events as they come. When the browser leaves, the connection closes, and the engine stops."""
    try:
        async for piece in reply.aiter_raw():
            yield piece
    except httpx.HTTPError as error:
        yield event(RequestError(f"the gateway broke off: {error or type(error).__name__}", status=502).body())
    finally:
        await reply.aclose()


def _refused(message: str) -> Response:
    return error_response(RequestError(message, code="gateway_down", status=502))
