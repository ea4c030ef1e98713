"""What must hold before a challenger sees a request: its files, its parity, its golden answers.

Enters: a release, its record's digests, the URL of its engine. Leaves: the reasons against it; none when all holds.
Refuses: nothing itself; an engine that does not answer is a reason, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fmops.artifacts import Frozen, Release
from fmops.deployment.parity import CHAT_PROBES, GREEDY_TOKENS, PLAIN_PROBES
from fmops.deployment.verify import PARITY, verify_release
from fmops.errors import IntegrityError

AGREEING = 0.9
"""Share of the golden answers to repeat to the letter. One in eleven may differ: two likeliest tokens can tie."""

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]
"""POST a JSON body to a path of the engine, return the JSON answer; raises OSError or ValueError."""


class Golden(Frozen):
    """How the golden prompts went."""

    asked: int
    differ: tuple[str, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether enough answers are the certified ones; none asked is no agreement."""
        return self.asked > 0 and len(self.differ) <= (1 - AGREEING) * self.asked


def before_traffic(release: Release, files: Mapping[str, str], ask: Ask) -> tuple[str, ...]:
    """Reasons not to send traffic to an engine that claims to serve `release`.

    The files are compared with the record, parity must have been proved on them, and the running engine must repeat the
    answers that it was certified with: a wrong tokenizer, chat template or weights do not.
    """
    try:
        verify_release(release.path, files)
        golden = ask_golden(release, ask)
    except IntegrityError as error:
        return (str(error),)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return (f"its engine does not answer the golden prompts: {type(error).__name__}: {error}",)
    if golden.agree:
        return ()
    return (
        f"{len(golden.differ)} of {golden.asked} golden answers are not the certified ones: "
        f"{', '.join(golden.differ)}. The running engine's tokenizer, chat template or weights are not the release's",
    )


def ask_golden(release: Release, ask: Ask) -> Golden:
    """Ask the probes that parity was proved with, greedily, and compare the answers.

    Raises:
        IntegrityError: the release keeps no golden answers.
        OSError, ValueError, LookupError, TypeError: the engine does not answer as OpenAI's API does.
    """
    stated = json.loads((release.path / PARITY).read_bytes())["probes"]
    certified = {probe["name"]: probe["answer"] for probe in stated if probe.get("answer")}
    if not certified:
        raise IntegrityError(f"{release.path.name}/{PARITY} keeps no answers. `fmops run` releases it anew.")
    differ = [name for name, answer in certified.items() if _ask(name, release.name, ask) != answer]
    return Golden(asked=len(certified), differ=tuple(differ))


def _ask(name: str, model: str, ask: Ask) -> str:
    kind, _, probe = name.partition("/")
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": GREEDY_TOKENS}
    if kind == "chat":
        reply = ask("/v1/chat/completions", {**body, "messages": CHAT_PROBES[probe]})
        return str(reply["choices"][0]["message"]["content"])
    reply = ask("/v1/completions", {**body, "prompt": PLAIN_PROBES[probe]})
    return str(reply["choices"][0]["text"])


def engine_at(url: str, *, timeout_s: float = 60.0) -> Ask:
    """Ask the engine at a base URL over HTTP."""
    import httpx

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = httpx.post(f"{url.rstrip('/').removesuffix('/v1')}{path}", json=body, timeout=timeout_s)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise OSError(f"{path}: {error}") from error
        answer: dict[str, Any] = reply.json()
        return answer

    return ask
