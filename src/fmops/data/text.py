"""Text as curation sees it: normalised, keyed by content, cut into words.

Enters: raw text. Leaves: clean text, a content key, comparable words.
Refuses: nothing.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_TRAILING = re.compile(r"[ \t\f\v]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")
# Control characters carry no text; tab and line feed do.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]")
_WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """Unicode NFC, `\\n` line ends, no trailing blanks, no control characters, at most two empty lines in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text))
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")


def comparable_words(text: str) -> list[str]:
    """Lower-case words without punctuation and accents, so that case, spacing and marks make no difference."""
    if not text.isascii():
        text = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return _WORD.findall(text.lower())


def content_key(words: list[str]) -> bytes:
    """32 bytes that are equal for texts with equal comparable words."""
    return hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()


def opening(text: str, *, characters: int = 160) -> str:
    """The first characters, on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"
