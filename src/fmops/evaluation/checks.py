"""Instructions that can be verified: what an answer must hold, as data beside the question.

Enters: an answer and a list of checks, each a mapping of one name to its value. Leaves: followed or not.
Refuses: a check that it does not know, before anything is asked.

After IFEval (Zhou et al. 2023, arXiv 2311.07911): no judge is needed, since a program can see whether it was done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from fmops.errors import FmopsError, unknown


def _words(answer: str) -> int:
    return len(re.findall(r"\w+(?:['’-]\w+)*", answer))


def _sentences(answer: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", answer) if re.search(r"\w", part)])


def _bullets(answer: str) -> int:
    return len(re.findall(r"^\s*[-*•] +\S", answer, re.MULTILINE))


def _has(answer: str, text: str) -> bool:
    return text.casefold() in answer.casefold()


def _unfenced(answer: str) -> str:
    """The answer without one code fence round it; people ask for JSON, and models wrap it."""
    fence = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", answer, re.DOTALL)
    return fence.group(1) if fence else answer


def _json(answer: str, wanted: Mapping[str, str]) -> bool:
    """An object with exactly these keys, each of the JSON type named."""
    types: dict[str, type | tuple[type, ...]] = {"string": str, "number": (int, float), "list": list, "boolean": bool}
    try:
        value = json.loads(_unfenced(answer))
    except json.JSONDecodeError:
        return False
    if not isinstance(value, dict) or value.keys() != wanted.keys():
        return False
    return all(
        isinstance(value[key], types[kind]) and (kind != "number" or not isinstance(value[key], bool))
        for key, kind in wanted.items()
    )


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words_at_least": lambda answer, count: _words(answer) >= count,
    "words_at_most": lambda answer, count: 0 < _words(answer) <= count,
    "sentences": lambda answer, count: _sentences(answer) == count,
    "bullets": lambda answer, count: _bullets(answer) == count,
    "has": _has,
    "lacks": lambda answer, text: bool(answer.strip()) and not _has(answer, text),
    "starts": lambda answer, text: answer.strip().casefold().startswith(text.casefold()),
    "ends": lambda answer, text: answer.strip().casefold().endswith(text.casefold()),
    "matches": lambda answer, pattern: re.fullmatch(pattern, answer.strip()) is not None,
    "lower_case": lambda answer, wanted: bool(answer.strip()) and (answer == answer.lower()) == wanted,
    "upper_case": lambda answer, wanted: bool(answer.strip()) and (answer == answer.upper()) == wanted,
    "json": _json,
}
"""By name. An empty answer follows nothing."""


def followed(answer: str, checks: list[Mapping[str, Any]]) -> bool:
    """Whether the answer passes every check."""
    return all(CHECKS[name](answer, value) for check in checks for name, value in check.items())


def require_checks(checks: Any, where: str) -> None:
    """Look at the checks of one item.

    Raises:
        FmopsError: none, in the wrong form, or an unknown one.
    """
    if not isinstance(checks, list) or not checks or not all(isinstance(check, dict) and check for check in checks):
        raise FmopsError(f"{where}: the metric followed needs `checks`, a list such as [{{words_at_most: 20}}].")
    for check in checks:
        for name, value in check.items():
            if name not in CHECKS:
                raise unknown(f"check in {where}:", name, CHECKS)
            if name == "matches":
                _require_pattern(value, where)


def _require_pattern(pattern: Any, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise FmopsError(f"{where}: the check matches has no regular expression in {pattern!r}: {error}.") from None
