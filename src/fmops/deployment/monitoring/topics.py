"""How far a text is from the usual topics: hashed words against the reference's mean.

Enters: texts. Leaves: a centroid, and distances between 0 and 1.
Refuses: nothing. It knows words, not meanings; an embedding model could take its place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from zlib import crc32

SLOTS = 512
_WORD = re.compile(r"[^\W\d_]{4,}")
"""Short words are mostly function words; they say nothing about a topic."""


def words_of(text: str) -> dict[int, float]:
    """Slots of a text's words with weights 1 + log(count), of length 1; empty when it has none."""
    counts = Counter(crc32(word.encode()) % SLOTS for word in _WORD.findall(text.lower()))
    weights = {slot: 1 + math.log(count) for slot, count in counts.items()}
    size = math.sqrt(math.fsum(weight * weight for weight in weights.values()))
    return {slot: weight / size for slot, weight in weights.items()}


def distance(words: Mapping[int, float], centroid: Mapping[int, float]) -> float:
    """1 − cosine of a text and the sum of the reference's texts; 1 shares no word with them."""
    size = math.sqrt(math.fsum(weight * weight for weight in centroid.values()))
    if not words or not size:
        return 1.0
    return 1 - math.fsum(weight * centroid.get(slot, 0.0) for slot, weight in words.items()) / size
