"""Rows of benchmarks in the forms that packages give them.

Enters: a row and where it stands. Leaves: a document, None where its answer is no choice of its own.
Refuses: a row without the form's fields.
"""

from __future__ import annotations

import re
from typing import Any

from fmops.errors import FmopsError, nearest

_LETTER = re.compile(r"(?:^|\n)\s*([A-J])\. ")


def require(field: str, row: dict[str, Any], where: str) -> None:
    """Raise for a row without `field`, with the nearest one that there is."""
    if field not in row:
        raise FmopsError(f"{where} has no field {field!r}.{nearest(field, row)} Its fields: {', '.join(sorted(row))}.")


def lettered(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Turn `options` ("A. x\\nB. y") and `answer` into `choices` and `label`; None when the answer is no option."""
    require("options", row, where)
    require("answer", row, where)
    choices = [part.strip() for part in _LETTER.split(str(row["options"]))[2::2]]
    answer = row["answer"][0] if isinstance(row["answer"], list) and row["answer"] else row["answer"]
    wanted = re.sub(r"^[A-J]\. ", "", str(answer)).strip()
    if wanted not in choices or len(set(choices)) != len(choices) or not all(choices):
        return None
    kept = {key: value for key, value in row.items() if key not in {"options", "answer"}}
    return {**kept, "choices": choices, "label": choices.index(wanted)}
