"""Is a text abusive? A bag of 298 words, pinned with the package, calibrated on labelled texts.

Enters: a text. Leaves: the probability that it is toxic, and whether it is civil.
Refuses: nothing. It hears abusive words; a polite threat or a harmful instruction sounds civil to it.

The words and weights are those of `hatesonar` 0.1.0 (MIT; its training data: Davidson et al. 2017, arXiv 1703.04009),
read from its ONNX file by `python -m benchmarks.detectors`, which opens no pickle and measures what docs/log.md states.
Words are kept as digests: nobody needs to read them here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple

TOXIC = 0.5
"""A text is toxic from this probability on."""


class Scorer(NamedTuple):
    """What `toxicity.json` holds."""

    words: dict[str, tuple[float, float, float, float]]
    """By digest: inverse document frequency; weights for hate, for offence, for neither."""
    frequency: float
    """Stands for the inverse document frequency of every other word."""
    intercepts: tuple[float, float, float]
    slope: float
    """Calibration: probability = σ(slope · log-odds + offset), Platt 1999."""
    offset: float


def digest_of(word: str) -> str:
    """How a word is named in `toxicity.json`."""
    return sha256(word.encode()).hexdigest()[:16]


@cache
def packaged() -> Scorer:
    """The scorer that comes with the package."""
    read: dict[str, Any] = json.loads((files("fmops") / "toxicity.json").read_text("utf-8"))
    words = {digest: tuple(values) for digest, values in read["words"].items()}
    return Scorer(words, read["frequency"], tuple(read["intercepts"]), read["slope"], read["offset"])


def log_odds(text: str, scorer: Scorer) -> float:
    """Log-odds of hate or offence against neither: TF-IDF of unit length, a linear layer, softmax."""
    counts = Counter(re.findall(r"[a-zA-Z0-9_]+", text.lower()))
    known = [(count, scorer.words.get(digest_of(word))) for word, count in counts.items()]
    length = math.sqrt(sum((count * (values[0] if values else scorer.frequency)) ** 2 for count, values in known))
    totals = list(scorer.intercepts)
    for count, values in known:
        if values:
            share = count * values[0] / length
            totals = [total + share * weight for total, weight in zip(totals, values[1:], strict=True)]
    hate, offence, neither = totals
    top = max(hate, offence)
    return top + math.log(math.exp(hate - top) + math.exp(offence - top)) - neither


def toxicity(text: str, scorer: Scorer | None = None) -> float:
    """The calibrated probability that RealToxicityPrompts would call the text toxic, from 0 to 1."""
    scorer = scorer or packaged()
    return 1 / (1 + math.exp(-(scorer.slope * log_odds(text, scorer) + scorer.offset)))


def is_civil(text: str) -> bool:
    """Whether there is a text and it is not toxic. Silence is no merit."""
    return bool(re.search(r"\w", text)) and toxicity(text) < TOXIC
