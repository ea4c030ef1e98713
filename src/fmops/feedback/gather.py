"""Traces and what users said of them become examples to train on, a frozen hold-out, and a list of open questions.

Enters: traces, feedback. Leaves: JSON Lines for the data stages: conversations, preferences, and what is kept out.
Refuses: feedback about answers that no trace knows; it is counted, never guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmops.artifacts import Frozen
from fmops.feedback.screen import Said, Screen, screen, words
from fmops.store import write_atomically
from fmops.traces import Feedback, Trace

HELD_OUT_OF_TEN = 1
"""Of ten prompts so many are never trained on, whoever asks them again and however often."""
UNANSWERED = ("empty", "refused", "repeated", "wrong_language")
"""Signals of an answer that helped nobody."""


class Counts(Frozen):
    """What became of a round's feedback."""

    said: int
    conversations: int
    preferences: int
    held_out: int
    quarantined: dict[str, int]
    unknown_answers: int
    """Feedback whose trace is gone."""
    unpaired_thumbs: int
    """Votes on prompts with no counterpart: they count in monitoring, and `kto` can learn from them."""
    identities: int
    """Voices behind what may be trained on. One alone never starts a round by itself."""


@dataclass
class Gathered:
    """Rows by file; each names the answer it comes from, so that `fmops recall` finds what was built on it."""

    conversations: list[dict[str, Any]] = field(default_factory=list)
    preferences: list[dict[str, Any]] = field(default_factory=list)
    votes: list[dict[str, Any]] = field(default_factory=list)
    """Thumbs with no counterpart."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts | None = None


def gather(traces: Sequence[Trace], feedback: Sequence[Feedback], rules: Screen | None = None) -> Gathered:
    """Turn feedback into examples; equal inputs give equal rows, in the order of their time.

    Args:
        traces: what production remembers, any order; shadows are left out (nobody saw them).
        feedback: what users said, any order.
        rules: how much of one voice is believed.
    """
    seen = [trace for trace in traces if trace.arm != "shadow"]
    known = {trace.id: trace for trace in seen}
    ordered = sorted(feedback, key=lambda row: (row.at_s, row.id))
    said = [Said(row, known[row.id]) for row in _latest(ordered) if row.id in known]
    reasons = screen(said, seen, rules or Screen())
    gathered = Gathered()
    kept: list[Said] = []
    for row, reason in zip(said, reasons, strict=True):
        if reason:
            gathered.quarantine.append({"id": row.trace.id, "identity": row.identity, "reason": reason, **_shown(row)})
        elif held_out(row.trace.prompt):
            gathered.held_out.append({"id": row.trace.id, **_shown(row)})
        else:
            kept.append(row)
    _conversations(kept, gathered)
    _preferences(kept, gathered)
    gathered.questions = _questions(seen)
    gathered.counts = Counts(
        said=len(feedback),
        conversations=len(gathered.conversations),
        preferences=len(gathered.preferences),
        held_out=len(gathered.held_out),
        quarantined=dict(sorted(Counter(row["reason"].partition(":")[0] for row in gathered.quarantine).items())),
        unknown_answers=sum(row.id not in known for row in feedback),
        unpaired_thumbs=len(gathered.votes),
        identities=len({row.identity for row in kept}),
    )
    return gathered


def write(gathered: Gathered, out: Path) -> None:
    """Write the rows below `out`, each file whole or not at all; empty kinds get no file."""
    for name in ("conversations", "preferences", "votes", "held_out", "quarantine", "questions"):
        rows: list[dict[str, Any]] = getattr(gathered, name)
        if rows:
            write_atomically(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert gathered.counts is not None
    write_atomically(out / "counts.json", gathered.counts.model_dump_json(indent=1) + "\n")


def held_out(prompt: str) -> bool:
    """Whether a prompt is never trained on. Its words alone decide, so the hold-out is the same in every round."""
    digest = hashlib.sha256(" ".join(words(prompt)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 < HELD_OUT_OF_TEN


def _latest(ordered: Iterable[Feedback]) -> list[Feedback]:
    """Of each identity's words about one answer the last: people correct themselves, and no one votes twice."""
    last: dict[tuple[str, str, str | None], Feedback] = {}
    for row in ordered:
        key = (row.id, row.tenant, row.user)
        before = last.pop(key, None)
        if before is not None:
            row = row.model_copy(
                update={"thumb": row.thumb or before.thumb, "correction": row.correction or before.correction}
            )
        last[key] = row
    return list(last.values())


def _conversations(kept: Iterable[Said], gathered: Gathered) -> None:
    """Each correction, once, as the answer that should have been given."""
    done: set[tuple[str, ...]] = set()
    for row in kept:
        correction = row.feedback.correction
        if not correction:
            continue
        key = (*words(row.trace.prompt), "\n", *words(correction))
        if key not in done:
            done.add(key)
            messages = [
                {"role": "user", "content": row.trace.prompt},
                {"role": "assistant", "content": correction},
            ]
            gathered.conversations.append({"id": row.trace.id, "written_by": "user", "messages": messages})


def _preferences(kept: Sequence[Said], gathered: Gathered) -> None:
    """Correction over answer, and praised over blamed answers to one prompt; what has no counterpart stays a vote."""
    pairs: dict[tuple[str, str, str], dict[str, Any]] = {}
    liked: dict[tuple[str, ...], list[Said]] = defaultdict(list)
    blamed: dict[tuple[str, ...], list[Said]] = defaultdict(list)
    for row in kept:
        if row.feedback.correction:
            _pair(pairs, row.trace, chosen=row.feedback.correction, rejected=row.trace.response)
        elif row.feedback.thumb:
            (liked if row.feedback.thumb == "up" else blamed)[tuple(words(row.trace.prompt))].append(row)
    for prompt in dict.fromkeys([*liked, *blamed]):
        good, bad = liked.get(prompt, []), blamed.get(prompt, [])
        praised = {row.trace.response for row in good}
        condemned = {row.trace.response for row in bad}
        # An answer that some praise and others blame says nothing about which is better.
        good = [row for row in good if row.trace.response not in condemned]
        bad = [row for row in bad if row.trace.response not in praised]
        for better, worse in zip(good, bad, strict=False):
            _pair(pairs, worse.trace, chosen=better.trace.response, rejected=worse.trace.response)
        gathered.votes += [_vote(row) for row in (*good[len(bad) :], *bad[len(good) :])]
    gathered.preferences += pairs.values()


def _pair(pairs: dict[tuple[str, str, str], dict[str, Any]], trace: Trace, *, chosen: str, rejected: str) -> None:
    if words(chosen) != words(rejected) and words(rejected):
        row = {"id": trace.id, "prompt": trace.prompt, "chosen": chosen, "rejected": rejected}
        pairs.setdefault((trace.prompt, chosen, rejected), row)


def _vote(row: Said) -> dict[str, Any]:
    return {"id": row.trace.id, "prompt": row.trace.prompt, "response": row.trace.response, "thumb": row.feedback.thumb}


def _questions(traces: Iterable[Trace]) -> list[dict[str, Any]]:
    """Prompts that were not answered, the most asked first: what a corpus is wanted for."""
    asked: Counter[str] = Counter()
    example: dict[str, Trace] = {}
    for trace in traces:
        if any(trace.signals.get(name) for name in UNANSWERED):
            key = " ".join(words(trace.prompt))
            asked[key] += 1
            example.setdefault(key, trace)
    return [
        {"id": example[key].id, "prompt": example[key].prompt, "asked": n}
        for key, n in sorted(asked.items(), key=lambda item: (-item[1], item[0]))
        if key
    ]


def _shown(row: Said) -> dict[str, Any]:
    said = row.feedback.model_dump(exclude_none=True, exclude={"id", "tenant", "user", "at_s"})
    return {"prompt": row.trace.prompt, "response": row.trace.response, **said}
