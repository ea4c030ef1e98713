"""One token from logits.

Enters: logits of one position, and how to choose. Leaves: a token, its log-probability, the likeliest alternatives.
Refuses: nothing; ranges are checked where a request enters.
"""

from __future__ import annotations

import torch

from fmops.deployment.serving.engine import Generation


def choose(
    logits: torch.Tensor, generation: Generation, random: torch.Generator
) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """The next token from `logits` (vocabulary,), its log-probability, and the likeliest alternatives."""
    logprobs = torch.log_softmax(logits, dim=-1)
    if generation.temperature == 0:
        token = int(logprobs.argmax())
    else:
        probabilities = torch.softmax(logits / generation.temperature, dim=-1)
        token = int(torch.multinomial(_nucleus(probabilities, generation.top_p), 1, generator=random))
    values, ids = logprobs.topk(generation.top_logprobs) if generation.top_logprobs else (logprobs[:0], logprobs[:0])
    top = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return token, float(logprobs[token]), top


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest likeliest tokens that hold `top_p` of the mass (Holtzman et al. 2020)."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities)
    inside = order[before < top_p]
    kept[inside] = probabilities[inside]
    return kept
