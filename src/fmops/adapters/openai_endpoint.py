"""A served model behind an OpenAI-compatible endpoint, as evaluation asks it: greedily or by a seed, again when busy.

Enters: a base URL that ends in /v1, request bodies. Leaves: answers as JSON objects.
Refuses: an endpoint that does not answer, a request that it calls wrong, an answer of another shape; by name.

A key comes from the environment (`FMOPS_API_KEY`, else `OPENAI_API_KEY`): it belongs in no spec and in no record.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx

from fmops.errors import FmopsError

TRIES = 6
BUSY = (429, 502, 503, 504)
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 600.0


class OpenAIEndpoint:
    """One model of one endpoint. Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Without `model`, the endpoint's only one.

        Raises:
            FmopsError: nobody answers at `url`, or it serves several models, or not this one.
        """
        self.url = url.rstrip("/")
        key = os.environ.get("FMOPS_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=transport)
        weakref.finalize(self, self._client.close)
        self._sleep = sleep
        cards = {str(card["id"]): card for card in _field(self._ask("GET", "models", None), "data", self.url)}
        served = list(cards)
        if model is None and len(served) != 1:
            raise FmopsError(f"{self.url} serves {', '.join(served) or 'nothing'}: name the one that is meant.")
        if model is not None and model not in served:
            raise FmopsError(f"{self.url} serves no model {model!r}, but {', '.join(served) or 'nothing'}.")
        self.model = model or served[0]
        self.release: str | None = cards[self.model].get("version")
        """Key of the release that is served, where the server says it, as FMOps' own does."""
        stated = cards[self.model].get("batch_tolerance")
        self.batch_tolerance: float | None = float(stated) if isinstance(stated, int | float) else None
        """Nats by which company moves its log-probabilities, where the server says it, as FMOps' engines do."""

    def chat(
        self, messages: list[dict[str, str]], *, max_tokens: int, stop: tuple[str, ...] = (),
        sampling: Mapping[str, float] | None = None,
    ) -> str:  # fmt: skip
        """The answer to a dialogue: greedy, or by `sampling`'s temperature, top_p and seed."""
        asked = {**_greedy(max_tokens, stop), **(sampling or {})}
        choice = self._choice("chat/completions", {"messages": messages, **asked})
        # A server may say null for an answer without text.
        return str(_field(choice, "message", self.url).get("content") or "")

    def complete(
        self, prompt: str, *, max_tokens: int, stop: tuple[str, ...] = (), sampling: Mapping[str, float] | None = None
    ) -> str:
        """The continuation of a text: greedy, or by `sampling`'s temperature, top_p and seed."""
        choice = self._choice("completions", {"prompt": prompt, **_greedy(max_tokens, stop), **(sampling or {})})
        return str(_field(choice, "text", self.url))

    def prompt_logprobs(self, text: str) -> list[tuple[float | None, float]]:
        """Of each token of the text: its log-probability given those before it, how far that is above the next one's.

        The lead is below 0 where another token is likelier. The first token has no log-probability. Places in the text
        are not read: a character of two tokens is counted twice.
        """
        answer = self._ask("POST", "completions", self._echo(text, logprobs=True))
        found = _field(self._first(answer, "completions"), "logprobs", self.url) or {}
        values, tops = (_field(found, name, self.url) for name in ("token_logprobs", "top_logprobs"))
        generated = int(_field(_field(answer, "usage", self.url), "completion_tokens", self.url))
        return [
            (value, _lead(value, (top or {}).values()))
            for value, top in list(zip(values, tops, strict=True))[: len(values) - generated]
        ]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, with what the server puts before it."""
        answer = self._ask("POST", "completions", self._echo(text, logprobs=False))
        return int(_field(_field(answer, "usage", self.url), "prompt_tokens", self.url))

    def _echo(self, text: str, *, logprobs: bool) -> dict[str, Any]:
        asked = {"echo": True, "logprobs": 2} if logprobs else {}
        return {"model": self.model, "prompt": text, **asked, **_greedy(1, ())}

    def _choice(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._first(self._ask("POST", route, {"model": self.model, **body}), route)

    def _first(self, answer: dict[str, Any], route: str) -> dict[str, Any]:
        choices = _field(answer, "choices", self.url)
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise FmopsError(f"{self.url}/{route} answered without a choice. Is it an OpenAI-compatible endpoint?")
        first: dict[str, Any] = choices[0]
        return first

    def _ask(self, method: str, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                response = self._client.request(method, f"{self.url}/{route}", json=body)
            except httpx.TransportError as error:
                raise FmopsError(
                    f"no answer from {self.url}/{route}: {type(error).__name__}. Start it (`fmops serve`), "
                    "and give its address up to /v1."
                ) from None
            if response.status_code in BUSY and attempt < TRIES:
                self._sleep(_wait_s(response, attempt))
                continue
            return self._read(response, route)
        raise AssertionError("unreachable")

    def _read(self, response: httpx.Response, route: str) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code != 200:
            told = answer.get("error") if isinstance(answer, dict) else None
            text = told.get("message") if isinstance(told, dict) else response.text[:200]
            remedy = " Set FMOPS_API_KEY." if response.status_code in (401, 403) else ""
            raise FmopsError(f"{self.url}/{route} answered {response.status_code}: {text}.{remedy}")
        if not isinstance(answer, dict):
            raise FmopsError(f"{self.url}/{route} answered no JSON object. Is it an OpenAI-compatible endpoint?")
        return answer


def _greedy(max_tokens: int, stop: tuple[str, ...]) -> dict[str, Any]:
    return {"max_tokens": max_tokens, "temperature": 0, **({"stop": list(stop)} if stop else {})}


def _lead(value: float | None, likeliest: Iterable[float]) -> float:
    """What a token of this log-probability is ahead of the likeliest other one; 0 where the server tells no other."""
    if value is None:
        return -math.inf
    best, *others = sorted(likeliest, reverse=True) or [value]
    return value - best if value < best else value - max(others, default=value)


def _wait_s(response: httpx.Response, attempt: int) -> float:
    stated = response.headers.get("Retry-After", "")
    return min(float(stated) if stated.isdigit() else 2.0 ** (attempt - 1), LONGEST_WAIT_S)


def _field(value: Any, name: str, url: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise FmopsError(f"{url} answered without {name!r}. Is it an OpenAI-compatible endpoint?")
    return value[name]
