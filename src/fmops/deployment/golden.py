"""Golden prompts: does a running engine answer as its release was certified to?

Enters: a release, and a way to ask its engine. Leaves: which golden answers differ.
Refuses: a release that keeps no answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import Field

from fmops.artifacts import Frozen, Release
from fmops.deployment.parity import CHAT_PROBES, GREEDY_TOKENS, PICTURE_PROBES, PLAIN_PROBES
from fmops.deployment.verify import PARITY
from fmops.errors import IntegrityError
from fmops.pictures import in_parts

AGREEING = 0.9
"""Share of the golden answers to repeat to the letter. One in eleven may differ: two likeliest tokens can tie."""

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]
"""POST a JSON body to a path of the engine, return the JSON answer; raises OSError or ValueError."""


class TooLong(ValueError):
    """A prompt does not fit into what this engine may serve."""


class Golden(Frozen):
    """How the golden prompts went."""

    asked: int
    differ: tuple[str, ...] = ()
    error: str | None = Field(None, description="Why the engine could not be asked.")

    @property
    def agree(self) -> bool:
        """Whether enough answers are the certified ones; none asked is no agreement."""
        return self.asked > 0 and len(self.differ) <= (1 - AGREEING) * self.asked


def ask_golden(release: Release, ask: Ask) -> Golden:
    """Ask the probes that parity was proved with, greedily, and compare the answers.

    Parity may have had a longer context than `serve.max_tokens` allows: a probe that is too long is left out.

    Raises:
        IntegrityError: the release keeps no golden answers.
        OSError, ValueError, LookupError, TypeError: the engine does not answer as OpenAI's API does.
    """
    stated = json.loads((release.path / PARITY).read_bytes())["probes"]
    certified = {probe["name"]: probe["answer"] for probe in stated if probe.get("answer")}
    if not certified:
        raise IntegrityError(f"{release.path.name}/{PARITY} keeps no answers. `fmops run` releases it anew.")
    asked, differ = 0, []
    for name, answer in certified.items():
        try:
            found = _ask(name, release.name, ask)
        except TooLong:
            continue
        asked += 1
        if found != answer:
            differ.append(name)
    return Golden(asked=asked, differ=tuple(differ))


def _ask(name: str, model: str, ask: Ask) -> str:
    kind, _, probe = name.partition("/")
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": GREEDY_TOKENS}
    if kind != "plain":
        messages = CHAT_PROBES[probe] if kind == "chat" else [in_parts(each) for each in PICTURE_PROBES[probe]]
        reply = ask("/v1/chat/completions", {**body, "messages": messages})
        return str(reply["choices"][0]["message"]["content"])
    reply = ask("/v1/completions", {**body, "prompt": PLAIN_PROBES[probe]})
    return str(reply["choices"][0]["text"])


def engine_at(url: str, *, secret: str, timeout_s: float = 60.0) -> Ask:
    """Ask the engine at a base URL over HTTP; `secret` lets the workspace's own processes in."""
    import httpx

    headers = {"Authorization": f"Bearer {secret}"}

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = httpx.post(
                f"{url.rstrip('/').removesuffix('/v1')}{path}", json=body, headers=headers, timeout=timeout_s
            )
        except httpx.HTTPError as error:
            raise OSError(f"{path}: {error}") from error
        return answer_of(reply.status_code, reply.text)

    return ask


def answer_of(status: int, text: str) -> dict[str, Any]:
    """The body of an answer.

    Raises:
        TooLong: the engine says that the prompt does not fit.
        OSError: any other status than 200.
    """
    if status == 400 and "context_length_exceeded" in text:
        raise TooLong(text)
    if status != 200:
        raise OSError(f"status {status}: {text[:200]}")
    answer: dict[str, Any] = json.loads(text)
    return answer
