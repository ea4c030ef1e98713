"""How much of a prompt is about something else: the share of its words that the reference's prompts lack.

Enters: texts. Leaves: hashed words, and shares between 0 and 1.
Refuses: nothing. It knows words, not meanings; those are watched beside it (`meaning.py`).

A distance to the reference's mean was tried before: it moves when a known topic is asked about more often, as it is
every evening, and hardly when new names come in questions of a known form.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from zlib import crc32

SLOTS = 16_384
"""Words are remembered by so many hashes. At 5,000 known words one new word in four looks known."""
_WORD = re.compile(r"[^\W\d_]{4,}")
"""Short words are mostly function words; they say nothing about a topic."""


def words_of(text: str) -> frozenset[int]:
    """Hashes of a text's words; empty when it has none."""
    return frozenset(crc32(word.encode()) % SLOTS for word in _WORD.findall(text.lower()))


def novelty(words: Collection[int], known: Collection[int]) -> float:
    """The share of a text's words that are not known; 1 shares no word."""
    return sum(word not in known for word in words) / len(words) if words else 1.0
