"""HTTP as both servers speak it: JSON bodies in, errors and events out.

Enters: a request, or what to say. Leaves: a parsed body; responses in the shape that OpenAI's clients read.
Refuses: bodies that are too large, too slow, too deep, or no JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fmops.deployment.serving.bodies import RequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_S = 30.0
"""Longest time that a client may take to send its request."""
GONE = 499
"""The client hung up: nobody reads this status, proxies and our metrics log it."""
SLOTS = "x-fmops-slots"
"""Header by which an engine says how many requests it advances at once."""
DONE = b"data: [DONE]\n\n"


async def read_json(request: Request) -> Any:
    """The body of a request.

    Raises:
        RequestError: 413, 408 or 400.
    """
    try:
        async with asyncio.timeout(BODY_S):
            read = await _read(request)
    except TimeoutError:
        raise RequestError(
            f"the request body did not arrive within {BODY_S:g} s", code="body_too_slow", status=408
        ) from None
    try:
        return json.loads(read, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is no valid JSON: {error}", code="invalid_json") from None


async def _read(request: Request) -> bytearray:
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MAX_BODY_BYTES:
            raise RequestError(f"the request body exceeds {MAX_BODY_BYTES} bytes", code="body_too_large", status=413)
    return read


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def error_response(error: RequestError) -> Response:
    """An error object, with the time to come back where there is one."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def bears(request: Request, secret: str) -> bool:
    """Whether the request carries `secret` as its bearer token; takes as long when it does not."""
    given = request.headers.get("authorization", "").encode()
    return hmac.compare_digest(given, f"Bearer {secret}".encode())
