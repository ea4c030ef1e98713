"""What can be told from an answer at once: cheap signals for every request.

Enters: prompt and answer as text. Leaves: 0/1 signals, and lengths, by name.
Refuses: to say what it cannot tell; a signal that does not apply is left out, never 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from fmops.deployment.monitoring.language import expects_another_language, language
from fmops.redaction import redact
from fmops.refusals import goes_in_circles, is_refusal
from fmops.toxicity import toxicity

BINARY = (
    "empty", "truncated", "repeated", "refused", "wrong_language", "invalid_json", "personal_data", "secret",
    "prompt_leak", "toxic",
)  # fmt: skip
"""Signals of 0 or 1; 1 is what nobody wants, except that a refusal may be right."""

SECRETS = frozenset({"private-key", "jwt", "aws-key", "aws-secret", "token"})
TOXIC = 0.95
"""Probability from which an answer counts as abusive: above the evaluation's 0.5, since "Here you are:" has 0.9."""
LEAKED_WORDS = 8
"""So many words of the system prompt in a row are a leak."""

_WORD = re.compile(r"\w+")
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|system|user|assistant|endoftext|eot_id|start_header_id|end_header_id)\|>"
    r"|<</?SYS>>|\[/?INST\]|<(?:start|end)_of_turn>"
)
_CODE = r"function|script|program|pars\w+|files?|librar\w+|module|python|javascript|examples?|code (?:that|to|for)"
_ASKS_JSON = re.compile(
    r"(?i)\b(?:answer|reply|respond|return|output|produce|give|provide|print|format|generate|write|create|list|extract)\b"
    r".{0,80}?\b(?:as|in|with|using|only|valid|an?|one|following)\s+(?:\w+\s+){0,2}?JSON\b"
    r"|\b(?:return|output|produce|give|provide|print|generate|write)\s+(?:(?:me|us|only|valid)\s+)*JSON\b"
    r"|\bJSON\s+only\b"
)
_ABOUT_JSON = re.compile(
    r"(?i)^\W*(?:how|what|why|when|where|which|who|explain|describe|define|do|does|can i|should)\b" rf"|\b(?:{_CODE})\b"
)
_FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
_CONFESSED = re.compile(
    r"(?i)\bmy (?:system (?:prompt|message)|initial instructions?|hidden instructions?)\b[^.?!]{0,30}:"
)


def measure(
    prompt: str,
    response: str,
    *,
    finish_reason: str | None,
    system: str = "",
    found: Mapping[str, int] | None = None,
    cut: bool = False,
) -> dict[str, float]:
    """Signals of one answer: those of `BINARY` that apply, `characters` and `words`.

    `found` is what redaction found in the raw answer, by type, where the caller has redacted it already. Personal data
    and secrets count only where the prompt does not hold as many of the same type: an echo is no leak. `cut` says that
    the answer went on: then nobody can tell whether it is JSON.
    """
    wants_json = not cut and (asks_for_json(prompt) or asks_for_json(system))
    words = _WORD.findall(response)
    signals = {
        "characters": float(len(response)),
        "words": float(len(words)),
        "empty": float(not words),
        "truncated": float(finish_reason == "length"),
    }
    if not words:
        return signals | ({"invalid_json": 1.0} if wants_json else {})
    leaked = _leaked(prompt, redact(response)[1] if found is None else found)
    signals |= {
        "repeated": float(goes_in_circles(words)),
        "refused": float(is_refusal(response)),
        "personal_data": float(bool(leaked - SECRETS)),
        "secret": float(bool(leaked & SECRETS)),
        "prompt_leak": float(_leaks(response, words, system)),
        "toxic": float(toxicity(response) >= TOXIC),
    }
    if wants_json:
        signals["invalid_json"] = float(not _is_json(response))
    else:
        asked, answered = language(prompt), language(response)
        if asked and answered and not expects_another_language(prompt):
            signals["wrong_language"] = float(asked != answered)
    return signals


def asks_for_json(text: str) -> bool:
    """Whether a sentence asks for an answer in JSON, in English; questions about JSON, and orders of code, do not."""
    if "json" not in text.lower():
        return False
    sentences = re.split(r"[.!?]\s|\n", text)
    return any(_ASKS_JSON.search(each) and not _ABOUT_JSON.search(each) for each in sentences)


def _leaked(prompt: str, found: Mapping[str, int]) -> set[str]:
    if not any(found.values()):
        return set()
    # A prompt that was redacted before shows its types as placeholders.
    given = redact(prompt)[1]
    return {kind for kind, count in found.items() if count > given[kind] + prompt.count(f"<{kind}>")}


def _leaks(response: str, words: list[str], system: str) -> bool:
    if _CONTROL.search(response) or _CONFESSED.search(response):
        return True
    given = _WORD.findall(system)
    if len(given) < LEAKED_WORDS:
        return False
    said = f" {' '.join(words)} "
    return any(
        f" {' '.join(given[start : start + LEAKED_WORDS])} " in said for start in range(len(given) - LEAKED_WORDS + 1)
    )


def _is_json(response: str) -> bool:
    """JSON, be it inside one code fence, as models wrap it."""
    fence = _FENCE.fullmatch(response)
    # A card's number without quotation marks was JSON before it was redacted.
    whole = (fence.group(1) if fence else response).replace("<card>", "0")
    try:
        json.loads(whole, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
