"""Sampled tokens that depend on seed, item, repeat and place alone: in any company, after a kill, for either model.

Enters: logits of one position of several answers, how they are warped, each answer's key. Leaves: a token for each.
Refuses: settings that are no numbers of their range.

The Gumbel-max trick (Gumbel 1954; Maddison, Tarlow & Minka 2014): the largest of log p + noise is a draw from p. The
noise of a token is a hash (SplitMix64: Steele, Lea & Flood 2014) of the answer's key, the place and the token's id, so
nothing is drawn in an order. Two models that are asked the same share it (common random numbers): where they nearly
agree they say the same, and their paired difference has less noise than that of independent draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fmops.errors import FmopsError

TOP_K = 50
"""Transformers' own, where a task names none. 0 is all tokens."""
METHOD = "gumbel-splitmix64"
"""Part of the protocol of an evaluation that samples."""
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 < value <= 100, "above 0, to 100"),
    "top_k": (lambda value: value >= 0 and value == int(value), "a whole number, 0 for all tokens"),
    "top_p": (lambda value: 0 < value <= 1, "above 0, to 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
}


@dataclass(frozen=True)
class Sampling:
    """How logits become probabilities: Transformers' warpers in its order."""

    temperature: float
    top_k: int = TOP_K
    top_p: float = 1.0
    min_p: float | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Sampling | None:
        """Read normalised `generation_kwargs`; None for greedy decoding.

        A model's `generation_config.json` is not read: both models of a comparison are asked alike.

        Raises:
            FmopsError: a setting out of its range, or sampling without a temperature.
        """
        if not options.get("do_sample"):
            return None
        given = {name: options[name] for name in _RANGES if options.get(name) is not None}
        for name, value in given.items():
            fits, told = _RANGES[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                remedy = " For greedy decoding say do_sample: false." if name == "temperature" else ""
                raise FmopsError(f"generation_kwargs: {name} is {value!r}; it is {told}.{remedy}")
        if "temperature" not in given:
            raise FmopsError(f"generation_kwargs {options}: do_sample needs a temperature, such as temperature: 0.7.")
        return cls(
            float(given["temperature"]),
            top_k=int(given.get("top_k", TOP_K)),
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given["min_p"]) if "min_p" in given else None,
        )

    def warp(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Warped logits (rows, kept) and the token of each (None: all of them, in order).

        `logits` (rows, vocabulary). Tokens outside the `top_k` are left out first, so that the rest is cheap.
        """
        scores = TemperatureLogitsWarper(self.temperature)(None, logits.float())
        tokens = None
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            # Equals of the least one are kept, too, as Transformers keeps them.
            scores, tokens = scores.topk(int((scores >= least).sum(-1).max()))
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        if self.min_p is not None:
            scores = MinPLogitsWarper(self.min_p)(None, scores)
        return tokens, scores

    def choose(self, logits: torch.Tensor, keys: Sequence[str], places: Sequence[int]) -> list[int]:
        """A token for each row of `logits` (rows, vocabulary): the place-th one of the answer of that key."""
        tokens, scores = self.warp(logits)
        ids = np.arange(logits.shape[-1])[None] if tokens is None else tokens.numpy()
        noisy = scores.double().numpy() + noise(keys, places, ids)
        best = noisy.argmax(-1)
        return [int(ids[row if len(ids) > 1 else 0, column]) for row, column in enumerate(best)]


def noise(keys: Sequence[str], places: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise of tokens (rows or 1, kept), by the key and the place of each row; shape (rows, kept)."""
    starts = [sha256(f"{key}/{place}".encode()).digest()[:8] for key, place in zip(keys, places, strict=True)]
    state = np.frombuffer(b"".join(starts), dtype="<u8")[:, None]
    mixed = state + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64)
    gumbel: np.ndarray = -np.log(-np.log((uniform + 0.5) * 2.0**-53))
    return gumbel


def answer_key(seed: int, text: str, repeat: int) -> str:
    """The key of one answer: the evaluation's seed, the item's text, which of its repeats it is."""
    item = sha256(text.encode()).hexdigest()
    return sha256(f"{seed}/{item}/{repeat}".encode()).hexdigest()
