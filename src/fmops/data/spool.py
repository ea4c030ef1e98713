"""Documents on disk between reading and packing, with a few bytes of each in memory.

Enters: the groups that the document pipeline wrote. Leaves: any document by number; which are repeated or held out.
Refuses: nothing; memory grows by 30 bytes a document, whatever its length.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import shutil
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fmops.data.text import opening
from fmops.redaction import redact

INDEX = struct.Struct("<QQQI")
"""Of a kept document: offset and bytes in the group's file, characters, number of its corpus."""
EXAMPLES = 3
HELD_OUT_DOCUMENTS = 200
HELD_OUT_CHARACTERS = 400_000
"""A domain: measured several times during training, so bounded."""
_TRAINED, _DROPPED, _HELD_OUT = 0, 1, 2


@dataclass
class Ledger:
    """What was dropped, by step, with a few examples, redacted."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)
    """Labels of the benchmark items that were found, whatever held them."""

    def add(self, step: str, example: str) -> None:
        self.counts[step] += 1
        kept = self.examples.setdefault(step, [])
        if len(kept) < EXAMPLES:
            kept.append(redact(example)[0])

    def unreadable(self) -> str | None:
        """What a person must be told of files and rows that could not be read; None when all could."""
        if not (count := self.counts["unreadable"]):
            return None
        return f"{count} files or rows could not be read and are left out; the first: {self.examples['unreadable'][0]}"


class Spool:
    """Documents by number, in reading order."""

    def __init__(self, folder: Path, *, groups: int, corpora: list[str]) -> None:
        self.corpora = corpora
        self.ledger = Ledger()
        self.redactions: Counter[str] = Counter()
        self._folder, self._groups = folder, groups
        self._offsets, self._bytes, self._characters = array("Q"), array("Q"), array("Q")
        self._corpus, self._group = array("H"), array("I")
        for group in range(groups):
            self._load(group)
        self._state = bytearray(len(self._offsets))

    def _load(self, group: int) -> None:
        base = self._folder / f"{group:05d}"
        for offset, size, characters, corpus in INDEX.iter_unpack(base.with_suffix(".index").read_bytes()):
            self._offsets.append(offset)
            self._bytes.append(size)
            self._characters.append(characters)
            self._corpus.append(corpus)
            self._group.append(group)
        report = json.loads(base.with_suffix(".json").read_bytes())
        self.redactions.update(report["redactions"])
        self.ledger.counts.update(report["dropped"])
        self.ledger.items.update(report["items"])
        for step, examples in report["examples"].items():
            kept = self.ledger.examples.setdefault(step, [])
            kept.extend(examples[: EXAMPLES - len(kept)])

    def __len__(self) -> int:
        return len(self._state)

    def row(self, document: int) -> dict[str, Any]:
        """`id`, `sha256` and `text`."""
        # Opened anew each time: a corpus may have more groups than a process may have open files.
        with (self._folder / f"{self._group[document]:05d}.jsonl").open("rb") as file:
            file.seek(self._offsets[document])
            row: dict[str, Any] = json.loads(file.read(self._bytes[document]))
        return row

    def corpus(self, document: int) -> str:
        """The name of the document's corpus."""
        return self.corpora[self._corpus[document]]

    def count(self, corpus: str) -> int:
        """Documents of a corpus to train on."""
        return sum(1 for _ in self._trained(corpus))

    def characters(self, corpus: str) -> int:
        """Characters of a corpus to train on."""
        return sum(self._characters[document] for document in self._trained(corpus))

    def shuffled(self, corpus: str, *, seed: str) -> array[int]:
        """A corpus' training documents in an order that the seed decides."""
        order = array("Q", self._trained(corpus))
        Random(f"{corpus}/{seed}").shuffle(order)
        return order

    def mark_duplicates(self, *, threshold: float) -> None:
        """Keep the first of equal documents and of near-duplicates, over all corpora, and note the rest."""
        from fmops.adapters.minhash import find_duplicates

        exact, near = find_duplicates(self._signatures(), threshold=threshold)
        for document in range(len(self._state)):
            for step, firsts in (("exact-duplicate", exact), ("near-duplicate", near)):
                first = int(firsts[document])
                if first != document:
                    self._state[document] = _DROPPED
                    self._note_duplicate(step, document, first)
                    break

    def _note_duplicate(self, step: str, document: int, first: int) -> None:
        if len(self.ledger.examples.get(step, ())) < EXAMPLES:
            row = self.row(document)
            self.ledger.add(step, f"{row['id']} repeats {self.row(first)['id']}: {opening(row['text'])}")
        else:
            self.ledger.counts[step] += 1

    def drop(self, document: int, step: str, example: str) -> None:
        """Take one more document out, and count it."""
        self._state[document] = _DROPPED
        self.ledger.add(step, example)

    def mark_held_out(self, domains: dict[str, list[str]], *, share: float, seed: int) -> dict[str, list[int]]:
        """Take a seeded share of each domain's documents out of training.

        A document's content decides, so that a document stays on its side when others come or go; near-duplicates
        are gone already, so none of them is on the other side. A domain of two documents or more holds out at least
        one, of four or more at least two, which an error needs; no corpus loses its last.
        """
        left = {corpus: self.count(corpus) for corpus in self.corpora}
        chosen: dict[str, list[int]] = {}
        for domain, corpora in domains.items():
            candidates = heapq.nsmallest(HELD_OUT_DOCUMENTS, self._lots(set(corpora), seed=seed))
            fewest = 2 if sum(left[corpus] for corpus in corpora) >= 4 else 1
            chosen[domain] = []
            characters = 0
            for lot, document in candidates:
                size = self._characters[document]
                too_long = bool(chosen[domain]) and characters + size > HELD_OUT_CHARACTERS
                if left[self.corpus(document)] < 2 or too_long:
                    continue
                if lot >= share and len(chosen[domain]) >= fewest:
                    break
                chosen[domain].append(document)
                characters += size
                left[self.corpus(document)] -= 1
                self._state[document] = _HELD_OUT
            chosen[domain].sort()
        return chosen

    def _lots(self, corpora: set[str], *, seed: int) -> Iterator[tuple[float, int]]:
        """A number in [0, 1) and the document, for each that could be held out."""
        from fmops.adapters.minhash import KEY_BYTES, RECORD_BYTES

        with self._signatures().open("rb") as file:
            for document in range(len(self._state)):
                key = file.read(RECORD_BYTES)[:KEY_BYTES]
                if self._state[document] == _TRAINED and self.corpus(document) in corpora:
                    lot = hashlib.sha256(b"%d/" % seed + key).digest()
                    yield int.from_bytes(lot[:8], "big") / 2**64, document

    def _trained(self, corpus: str) -> Iterator[int]:
        number = self.corpora.index(corpus)
        return (
            document
            for document, state in enumerate(self._state)
            if state == _TRAINED and self._corpus[document] == number
        )

    def _signatures(self) -> Path:
        """All groups' signatures in one file, in document order."""
        joined = self._folder / "signatures"
        if not joined.is_file() or joined.stat().st_size == 0:
            temporary = joined.with_suffix(".part")
            with temporary.open("wb") as out:
                for group in range(self._groups):
                    with (self._folder / f"{group:05d}.signatures").open("rb") as part:
                        shutil.copyfileobj(part, out)
            temporary.replace(joined)
        return joined
