"""Questions made from held-out documents: which word stood here?

Enters: documents of the run's own corpus that were kept from training. Leaves: multiple-choice items by document.
Refuses: documents in which no sentence qualifies; a corpus too small for wrong answers gives none.

Bits per byte weighs every token alike, and most are grammar. A gap asks for the domain's own words: the right answer is
a term that this document uses and most others do not, the wrong ones are terms of other documents, as rare and of the
same shape. Nothing is drawn at random: equal documents give equal questions, in an order that their digests decide.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

CHOICES = 4
QUESTIONS_A_DOCUMENT = 4
CONTEXT_CHARACTERS = 400
SENTENCE_WORDS = (8, 40)
SHORTEST_TERM = 4
COMMON = 0.2
"""A word in more than this share of the documents is no term."""
_WORD = re.compile(r"[A-Za-z_][\w-]*\w")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?](?=\s)")

Document = dict[str, Any]


def make_questions(documents: Iterable[Document]) -> list[Document]:
    """Items `id`, `cluster`, `before`, `choices`, `label` from rows `id`, `text`.

    `before` ends where the gap begins; a choice is a term and the rest of its sentence, so that the likelihood of the
    whole decides and not a word's own frequency.
    """
    documents = list(documents)
    known = {row["id"]: set(_WORD.findall(row["text"])) for row in documents}
    spread = Counter(word for words in known.values() for word in words)
    most = max(1, round(COMMON * len(documents)))
    terms = _Terms(word for word, count in spread.items() if count <= most and _is_term(word))
    items = []
    for row in documents:
        made: list[Document] = []
        for sentence in _sentences(row):
            question = _question(row, sentence, terms, known[row["id"]], spread)
            made += [question] if question else []
            if len(made) == QUESTIONS_A_DOCUMENT:
                break
        items += made
    return items


class _Terms:
    """The corpus' terms, by shape; each with a number that breaks ties in no one's favour."""

    def __init__(self, words: Iterable[str]) -> None:
        self.lots = {word: int(_digest(word)[:8], 16) for word in words}
        self.alike: defaultdict[tuple[bool, bool, str], list[str]] = defaultdict(list)
        for word in sorted(self.lots):
            self.alike[_shape(word)].append(word)


def _is_term(word: str) -> bool:
    return len(word) >= SHORTEST_TERM and not word.isdigit() and not word.isupper()


def _sentences(row: Document) -> list[re.Match[str]]:
    """Sentences with enough to go on, in an order that their digests decide."""
    low, high = SENTENCE_WORDS
    found = [match for match in _SENTENCE.finditer(row["text"]) if low <= len(match.group().split()) <= high]
    return sorted(found, key=lambda match: _digest(row["id"], match.group()))


def _question(
    row: Document, sentence: re.Match[str], terms: _Terms, own: set[str], spread: Counter[str]
) -> Document | None:
    # The first words of a sentence have too little before them.
    gaps = [match for match in list(_WORD.finditer(sentence.group()))[3:] if match.group() in terms.lots]
    if not gaps:
        return None
    gap = min(gaps, key=lambda match: (spread[match.group()], _digest(row["id"], match.group())))
    term = gap.group()
    others = heapq.nsmallest(
        CHOICES - 1,
        (other for other in terms.alike[_shape(term)] if other not in own),
        key=lambda other: (
            abs(spread[other] - spread[term]),
            abs(len(other) - len(term)),
            terms.lots[other] ^ terms.lots[term],
        ),
    )
    if len(others) < CHOICES - 1:
        return None
    start = sentence.start() + gap.start()
    rest = sentence.group()[gap.end() :]
    choices = sorted([term, *others], key=lambda choice: _digest(row["id"], sentence.group(), choice))
    return {
        "id": f"{row['id']}#{_digest(sentence.group())[:12]}",
        "cluster": row["id"],
        "before": row["text"][max(0, start - CONTEXT_CHARACTERS) : start].strip(),
        "choices": [choice + rest for choice in choices],
        "label": choices.index(term),
    }


def _shape(word: str) -> tuple[bool, bool, str]:
    """Words that could stand in each other's place: name or not, code or not, the same ending."""
    return word[0].isupper(), "_" in word or any(letter.isdigit() for letter in word), word[-1]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
