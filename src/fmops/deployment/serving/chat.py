"""`fmops chat`: a conversation in the terminal.

Enters: a server's URL and what a person types. Leaves: answers, as they are written.
Refuses: to start without a server; the error says how to start one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from fmops.errors import EXIT_FAILED, FmopsError

HELP = "Ctrl-C stops an answer, Ctrl-D ends, /reset starts over."
TEMPERATURE, TOP_P = 0.2, 0.9
"""Small models lose the thread at OpenAI's default of 1; these are what SmolLM2's authors recommend."""
LOCAL_KEY = "local.key"
"""In the workspace, readable by its owner only: what this shows to the gateway of this machine."""
CONNECT_S = 5.0
QUIET_S = 120.0
"""Longest wait for the next piece of an answer."""

Messages = list[dict[str, str]]


class ChatFailed(FmopsError):
    """The server said no, or broke off."""

    exit_code = EXIT_FAILED


def own_key(workspace: Path | None) -> str:
    """The key to show: FMOPS_API_KEY, else the one that `fmops up` keeps in the workspace, else one that means none."""
    local = workspace / LOCAL_KEY if workspace else None
    kept = local.read_text().strip() if local and local.is_file() else "none"
    return os.environ.get("FMOPS_API_KEY") or kept


def chat(url: str, *, system: str | None, prompt: str | None, key: str = "none") -> None:
    """Talk to the server at `url` until Ctrl-D; with `prompt`, ask once and return.

    Raises:
        ChatFailed: no server answers there, or it refuses the one prompt.
    """
    base = url.rstrip("/").removesuffix("/v1")
    opening: Messages = [{"role": "system", "content": system}] if system else []
    timeout, headers = httpx.Timeout(QUIET_S, connect=CONNECT_S), {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base, timeout=timeout, headers=headers, trust_env=False) as client:
        model, version = _find_model(client, base)
        if prompt is not None:
            _answer(client, model, [*opening, {"role": "user", "content": prompt}])
            return
        print(f"{version} at {base}. {HELP}")
        _converse(client, model, opening)


def _find_model(client: httpx.Client, base: str) -> tuple[str, str]:
    """The served model's name, and its version for people."""
    try:
        response = client.get("/v1/models")
        if response.status_code == 401:
            raise ChatFailed(f"{base} wants an API key. Put one into FMOPS_API_KEY; `fmops keys add NAME` makes it.")
        response.raise_for_status()
        card: dict[str, Any] = response.json()["data"][0]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ChatFailed(
            f"no model answers at {base} ({error}). Start one with `fmops serve` or `fmops up`, or name another server "
            "with --url."
        ) from None
    return str(card["id"]), str(card.get("version", card["id"]))


def _converse(client: httpx.Client, model: str, opening: Messages) -> None:
    messages = list(opening)
    while True:
        try:
            typed = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if typed == "/reset":
            messages = list(opening)
            print("A new conversation.")
        elif typed.startswith("/"):
            print(f"Unknown command {typed.split()[0]}. {HELP}")
        elif typed:
            messages = _turn(client, model, [*messages, {"role": "user", "content": typed}])


def _turn(client: httpx.Client, model: str, messages: Messages) -> Messages:
    """One question and its answer; what failed is shown and left out of the conversation."""
    try:
        answer = _answer(client, model, messages)
    except ChatFailed as error:
        print(error, file=sys.stderr)
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer}]


def _answer(client: httpx.Client, model: str, messages: Messages) -> str:
    """Print an answer piece by piece; Ctrl-C keeps what has come so far."""
    pieces: list[str] = []
    body = {"model": model, "messages": messages, "stream": True, "temperature": TEMPERATURE, "top_p": TOP_P}
    try:
        for piece in _stream(client, body):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        # Leaving the stream closes the connection, and the server stops generating.
        print(" …", end="")
    except httpx.HTTPError as error:
        raise ChatFailed(f"the connection broke: {error or type(error).__name__}. Is `fmops serve` running?") from None
    finally:
        print()
    return "".join(pieces)


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise ChatFailed(_message(response.text, f"the server answered {response.status_code}"))
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ChatFailed(_message(data, "the answer broke off"))
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def _message(text: str, otherwise: str) -> str:
    """The server's own words, from an OpenAI error object."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return otherwise
