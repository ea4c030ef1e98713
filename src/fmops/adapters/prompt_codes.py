"""A prompt's meaning in a few bits, by the input embeddings of the release that serves: no model runs.

Enters: a release's model folder; prompts. Leaves: codes, of which prompts of like meaning share many bits.
Refuses: a folder without a tokenizer.json, or without embeddings in safetensors as 16- or 32-bit floats.

A prompt is the mean of its tokens' embeddings, frequent tokens weighted down, common directions removed (smooth
inverse frequency: Arora, Liang & Ma 2017; Mu & Viswanath 2018). The code is on which side of random planes it lies:
the share of bits in which two codes differ is their angle over π (Charikar 2002).
"""

from __future__ import annotations

from hashlib import shake_256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fmops.errors import FmopsError
from fmops.integrity import safetensors_header

BITS = 256
COMMON = 3
"""Directions that the embeddings of all tokens share; they say how frequent a token is, not what it means."""
SAMPLE = 1000
"""Tokens, spread over the vocabulary, that say what is common."""
RARE = 1e-3
"""A token of this probability weighs half as much as the rarest (a of Arora et al.)."""
FIRST_RANK = 10
"""Zipf's law, with the id as rank: tokenizers number their tokens roughly by frequency, after some special ones."""
NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""What models call their input embeddings, at the end."""
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class PromptCodes:
    """One release's way to put prompts into codes. The embeddings stay on disk, mapped; only rows in use are read."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer and what is common to all tokens.

        Raises:
            FmopsError: the folder lacks something; says what.
        """
        if not (folder / "tokenizer.json").is_file():
            raise FmopsError(f"{folder} has no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise FmopsError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        self._table, self._halved = _embeddings(folder)
        size, width = self._table.shape
        rows = self._rows(np.linspace(0, size - 1, min(size, SAMPLE)).astype(int))
        self._mean = rows.mean(axis=0)
        common = np.linalg.svd(rows - self._mean, full_matrices=False)[2][:COMMON]
        # Signs from a digest: the same planes for ever, whatever becomes of NumPy's generators.
        digest = np.frombuffer(shake_256(b"fmops prompt codes").digest(width * BITS // 8), np.uint8)
        planes = np.unpackbits(digest).reshape(width, BITS).astype(np.float32) * 2 - 1
        self._planes = planes - common.T @ (common @ planes)

    def __call__(self, text: str) -> str:
        """The code of a prompt, `BITS` bits in hexadecimal; empty when it has no token."""
        ids = np.unique(np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=int))
        ids = ids[ids < len(self._table)]
        if not ids.size:
            return ""
        probability = 1 / ((ids + FIRST_RANK) * np.log(len(self._table)))
        weights = RARE / (RARE + probability)
        mean = weights @ (self._rows(ids) - self._mean) / weights.sum()
        return np.packbits(mean @ self._planes > 0).tobytes().hex()

    def _rows(self, ids: Any) -> Any:
        rows = self._table[ids]
        return (rows.astype("<u4") << 16).view("<f4") if self._halved else rows.astype(np.float32)


def _embeddings(folder: Path) -> tuple[Any, bool]:
    """The matrix of input embeddings, a row a token, mapped; and whether its numbers are the upper halves of floats.

    The library reads no bfloat16 into NumPy, and other numbers only whole; so the file is mapped by its header.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            tensors, start = safetensors_header(file)
        for name in sorted(tensors, key=len):
            if name.endswith(NAMES):
                entry = tensors[name]
                if entry["dtype"] not in DTYPES:
                    raise FmopsError(f"{path}: {name} is {entry['dtype']}, and {', '.join(DTYPES)} can be read")
                at = start + entry["data_offsets"][0]
                table = np.memmap(path, DTYPES[entry["dtype"]], "r", at, tuple(entry["shape"]))
                return table, entry["dtype"] == "BF16"
    raise FmopsError(f"{folder} holds no safetensors with {' or '.join(NAMES)}")
