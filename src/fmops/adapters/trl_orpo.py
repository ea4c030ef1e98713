"""Odds-ratio preference optimisation (Hong, Lee and Thorne 2024): no reference, the chosen answer is learnt as well.

Enters: a model folder, preference pairs as tokens. Leaves: a trained model folder, its curve, held-out preferences.
Refuses: what `trainer` refuses: steps that are not finite, resume states that are not whole.

TRL 1.16 keeps its ORPOTrainer among the experimental ones: it reads text instead of tokens, computes the prompt once an
answer and keeps all logits. So TRL's DPOTrainer, which is stable and shares prompts here, is given ORPO's loss.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from fmops.adapters import trl_dpo

NEAREST_TO_CERTAIN = -1e-6
"""Mean log-probability at which an answer's odds are cut off: at 0 they are infinite."""


class OrpoTrainer(trl_dpo.DpoTrainer):
    """TRL's DPOTrainer with the loss of ORPO."""

    # Told to compute it beforehand, TRL loads no second model; nothing is computed then, either.
    refers = False

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """There is no reference."""
        self._share_prefixes()
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> torch.Tensor:
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        scores = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        ).log_probs
        means = scores.sum(dim=1) / mask[:, 1:].sum(dim=1)
        return orpo_loss(*means.chunk(2), weight=self.beta)


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Mean over pairs of −log p(chosen) − weight × log σ(log odds ratio), equation 6 of the paper.

    `chosen`, `rejected`: [pairs] mean log-probability of an answer's tokens. Each pair weighs the same, as in the
    paper; TRL's takes the first term's mean over the tokens of a batch, prompts included.
    """
    odds = log_odds(chosen) - log_odds(rejected)
    return (-chosen - weight * logsigmoid(odds)).mean()


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log p − log(1 − p), of p = exp(mean)."""
    mean = mean.float().clamp(max=NEAREST_TO_CERTAIN)
    return mean - torch.log(-torch.expm1(mean))


train = functools.partial(trl_dpo.train, kind=OrpoTrainer)
