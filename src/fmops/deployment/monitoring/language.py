"""Which language a text is in, where a script or a handful of function words can tell.

Enters: text. Leaves: a language, a script, or None when it cannot be told cheaply.
Refuses: to guess from little; short texts and mixed ones have no language here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

MIN_WORDS = 12
SAMPLE_CHARACTERS = 800

_WORDS = {
    "en": "the and of to is in that it for with you this are was have not be on can an or as from which they",
    "de": "der die und das ist nicht ein eine zu den mit von sich auf für dem des im auch es wird sie ich",
    "fr": "le la les et est des une du dans que pour pas qui sur vous avec ce il au par plus sont je",
    "es": "el los las y es una que en por para con no del se su como más pero lo sus al esta yo",
    "it": "il di che è la per una non con sono del della gli si più come anche nel questo io lo",
    "pt": "o os as e é uma que em para com não do da se por mais como mas dos na ao eu um",
    "nl": "de het een en van is dat niet op te zijn voor met die er aan ook als maar ik om",
}
_LANGUAGES_OF: dict[str, tuple[str, ...]] = {}
for _language, _listed in _WORDS.items():
    for _word in _listed.split():
        _LANGUAGES_OF[_word] = (*_LANGUAGES_OF.get(_word, ()), _language)
_WORD = re.compile(r"[^\W\d_]+")
_EXPECTS_ANOTHER = re.compile(
    r"(?i)\b(?:translat\w*|übersetz\w*|tradu\w*|vertaal\w*|in (?:english|german|french|spanish|italian|portuguese|"
    r"dutch|russian|chinese|japanese|korean|arabic|greek|hindi|hebrew)|auf (?:deutsch|englisch)|en (?:français|inglés)"
    r"|how do you say)\b"
)


def expects_another_language(prompt: str) -> bool:
    """Whether the prompt asks for a translation or names a language: then no answer is in the wrong one."""
    return bool(_EXPECTS_ANOTHER.search(prompt))


def language(text: str) -> str | None:
    """An ISO 639-1 code for seven languages in Latin script, a script's name for others, or None.

    A Latin text needs `MIN_WORDS` words, an eighth of them function words of one language, and twice as many as of
    any other.
    """
    sample = text[:SAMPLE_CHARACTERS]
    script = _script(sample)
    if script != "LATIN":
        return script
    words = _WORD.findall(sample.lower())
    if len(words) < MIN_WORDS:
        return None
    counts = Counter(name for word in words for name in _LANGUAGES_OF.get(word, ()))
    ranked = counts.most_common(2)
    if not ranked or ranked[0][1] * 8 < len(words):
        return None
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] >= 2 * ranked[1][1] else None


def _script(text: str) -> str | None:
    """The script of three quarters of the letters; kana and Han count together."""
    if text.isascii():
        return "LATIN"
    # Letters repeat: each kind is looked up once.
    counts: Counter[str] = Counter()
    for sign, times in Counter(text).items():
        if sign.isalpha():
            name = unicodedata.name(sign, "").partition(" ")[0]
            counts["CJK" if name in ("HIRAGANA", "KATAKANA") else name] += times
    if not counts:
        return None
    script, most = counts.most_common(1)[0]
    return script if most * 4 >= counts.total() * 3 and counts.total() >= 4 else None
