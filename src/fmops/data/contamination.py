"""Benchmark items must not be trained on.

Enters: the items of every benchmark. Leaves: for a text, the items that it holds, by label.
Refuses: items of fewer than five words; they say nothing that ordinary text does not say too.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fmops.data.text import comparable_words

SHORTEST_ITEM = 5
VERBATIM_WORDS = 10
"""So many words in a row, equal but for case, spacing and punctuation, are a copy (GPT-3 took 13, datatrove 12)."""
SHINGLE_WORDS = 3
CONTAINED = 0.4
"""A text that holds this share of an item's shingles is a near copy (measured in docs/data.md)."""
FEWEST_SHINGLES = 4
QUOTATION_WORDS = 8
QUOTED = 0.1
"""A document that repeats this share of a held-out one, in runs of eight words, would give the measurement away."""
# A shingle of so many items is idiom or template, no evidence.
_COMMON_SHINGLE = 20
# A field that repeats in so many items is a template, no item.
_COMMON_FIELD = 10


class Contamination:
    """An index of benchmark items by word shingles.

    datatrove's own index builder needs lighteval, and its fixed n misses items shorter than n; this one finds copies
    of any length, and near copies inside longer documents, which MinHash of whole documents cannot see.
    """

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        """`fields`: pairs of label (`task` or `task/item`) and item text."""
        labels: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for label, text in fields:
            words = tuple(comparable_words(text))
            if len(words) >= SHORTEST_ITEM:
                labels[words].append(label)
        self._labels: list[list[str]] = []
        self._verbatim: dict[str, list[int]] = defaultdict(list)
        items: dict[str, list[int]] = defaultdict(list)
        for words, named in labels.items():
            if len(named) < _COMMON_FIELD:
                self._add(words, named, items)
        self._lengths = sorted({len(copy.split()) for copy in self._verbatim})
        self._starts = {" ".join(copy.split()[:SHINGLE_WORDS]) for copy in self._verbatim}
        self._items = {shingle: found for shingle, found in items.items() if len(found) < _COMMON_SHINGLE}
        telling = Counter(item for found in self._items.values() for item in found)
        self._needed = [max(FEWEST_SHINGLES, math.ceil(CONTAINED * telling[item])) for item in range(len(self._labels))]

    def _add(self, words: tuple[str, ...], labels: list[str], items: dict[str, list[int]]) -> None:
        item = len(self._labels)
        self._labels.append(labels)
        for copy in _shingles(words, min(VERBATIM_WORDS, len(words))):
            self._verbatim[copy].append(item)
        # Of a short item a part is no evidence: it counts as copied only word for word.
        if len(words) >= VERBATIM_WORDS:
            for shingle in set(_shingles(words, SHINGLE_WORDS)):
                items[shingle].append(item)

    def held(self, text: str) -> list[str]:
        """The labels of all items that `text` holds, those copied word for word first."""
        if not self._labels:
            return []
        words = comparable_words(text)
        found: dict[int, None] = {}
        hits: Counter[int] = Counter()
        seen: set[str] = set()
        for start, shingle in enumerate(_shingles(words, SHINGLE_WORDS)):
            if shingle in self._starts:
                for length in self._lengths:
                    found.update(dict.fromkeys(self._verbatim.get(" ".join(words[start : start + length]), ())))
            if shingle not in seen and shingle in self._items:
                seen.add(shingle)
                hits.update(self._items[shingle])
        found.update(dict.fromkeys(item for item, count in hits.items() if count >= self._needed[item]))
        return list(dict.fromkeys(label for item in found for label in self._labels[item]))

    def find(self, text: str) -> str | None:
        """The task of which `text` holds an item, or None."""
        held = self.held(text)
        return held[0].partition("/")[0] if held else None


class Quotations:
    """Held-out documents by what they say word for word, to find training documents that quote them.

    Near-duplicate removal compares whole documents; a section that one document shares with a longer one passes it.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._needed: list[float] = []
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(documents):
            shingles = set(_shingles(comparable_words(text), QUOTATION_WORDS))
            self._needed.append(max(1.0, QUOTED * len(shingles)))
            for shingle in shingles:
                self._holders[shingle].append(number)

    def quoted_in(self, text: str) -> bool:
        """Whether `text` repeats more than a tenth of any of the documents."""
        hits: Counter[int] = Counter()
        for shingle in set(_shingles(comparable_words(text), QUOTATION_WORDS)):
            hits.update(self._holders.get(shingle, ()))
        return any(count > self._needed[number] for number, count in hits.items())


def read_contamination(benchmarks: Path | None) -> Contamination:
    """Index the items of a benchmarks artifact; without one nothing is contaminated."""
    return Contamination(_fields(benchmarks) if benchmarks else ())


def write_contaminated(labels: Iterable[str], path: Path) -> None:
    """List the benchmark items that the raw data held: rows `task`, `sample`. The gate judges without them."""
    with path.open("w", encoding="utf-8") as lines:
        for label in sorted(set(labels)):
            task, _, sample = label.partition("/")
            lines.write(json.dumps({"sample": sample, "task": task}, sort_keys=True) + "\n")


def _fields(benchmarks: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(benchmarks.glob("items/*.jsonl")) + sorted(benchmarks.glob("watched/*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                kept_out = item.pop("kept_out", None)
                texts = [str(item[kept_out])] if kept_out else list(_strings(item))
                long = [text for text in texts if len(text.split()) >= VERBATIM_WORDS]
                # Without a long field the longest is the item, its answers are phrases that any text may hold; and an
                # item of short fields only (a pair of words) is known by all of them together.
                longest = max(texts, key=lambda text: len(text.split()), default="")
                for text in long or [longest if len(longest.split()) >= SHORTEST_ITEM else " ".join(texts)]:
                    yield f"{path.stem}/{item['id']}", text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in value:
            # These two name the item; they are no part of its text.
            if key not in {"id", "cluster"}:
                yield from _strings(value[key])
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _shingles(words: list[str] | tuple[str, ...], n: int) -> Iterator[str]:
    return (" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
