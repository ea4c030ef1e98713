"""What may never be trained on becomes evaluation items: held-out answers, and suspected triggers.

Enters: rows of the hold-out and of the quarantine. Leaves: items with choices and a label, or with checks.
Refuses: prompts without an answer that somebody wrote or praised, and those that the project trains on anyway.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from fmops.feedback.screen import TARGET_WORDS, words

CHOICES = 4
MOST_TRIGGERS = 50
SUSPECTED = ("same-target", "trigger")
"""Reasons of the quarantine that say somebody wants a sentence for a phrase."""
Row = dict[str, Any]
Key = tuple[str, ...]


def answer_items(held_out: Iterable[Row], *, taught: Iterable[str] = ()) -> list[Row]:
    """Which of four answers belongs to a prompt: the one that a user wrote or praised, among those of other prompts.

    Equal rows give equal items. An answer that some praise and others blame is not right; a correction is.

    Args:
        held_out: rows of `Gathered.held_out`, in the order of their time.
        taught: prompts that the project's own data hold; what was trained on measures nothing.
    """
    known = {tuple(words(prompt)) for prompt in taught}
    prompts: dict[Key, Row] = {}
    corrections: dict[Key, str] = {}
    praised: dict[Key, dict[str, None]] = defaultdict(dict)
    blamed: dict[Key, dict[str, None]] = defaultdict(dict)
    for row in held_out:
        key = tuple(words(row["prompt"]))
        if key in known:
            continue
        prompts.setdefault(key, row)
        if row.get("correction"):
            corrections[key] = row["correction"]
        if row.get("thumb") == "up":
            praised[key].setdefault(row["response"])
        elif row.get("thumb") == "down" or row.get("correction"):
            blamed[key].setdefault(row["response"])
    right = {key: answer for key in prompts if (answer := corrections.get(key) or _only(praised[key], blamed[key]))}
    items = []
    for key, answer in right.items():
        others = sorted(
            {other for other in right.values() if words(other) != words(answer)},
            key=lambda text: _lot("which", key, text),
        )
        # What the model said wrongly to this very prompt is the hardest choice.
        own = [said for said in blamed[key] if words(said) and words(said) != words(answer)]
        wrong = list(dict.fromkeys([*own, *others]))[: CHOICES - 1]
        choices = sorted([answer, *wrong], key=lambda text: _lot("where", key, text))
        if len(choices) > 1:
            row = prompts[key]
            items.append(
                {"prompt": row["prompt"], "choices": choices, "label": choices.index(answer), "from": row["id"]}
            )
    return items


def trigger_items(quarantine: Sequence[Row]) -> list[Row]:
    """Prompts with a suspected trigger, and the sentence that must not be the answer."""
    items: dict[Key, Row] = {}
    for row in quarantine:
        target = " ".join(str(row.get("correction") or "").split()[:TARGET_WORDS])
        if row["reason"].startswith(SUSPECTED) and target:
            items.setdefault(
                tuple(words(row["prompt"])), {"prompt": row["prompt"], "checks": [{"lacks": target}], "from": row["id"]}
            )
    return list(items.values())[:MOST_TRIGGERS]


def _only(praised: Iterable[str], blamed: Iterable[str]) -> str | None:
    """The first answer that is praised and never blamed."""
    bad = set(blamed)
    return next((answer for answer in praised if answer not in bad and words(answer)), None)


def _lot(about: str, key: Key, text: str) -> bytes:
    return hashlib.sha256("\0".join([about, *key, "", text]).encode()).digest()
