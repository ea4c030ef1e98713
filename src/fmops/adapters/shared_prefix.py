"""Preference batches in which the prompt is computed once for both answers.

Enters: TRL's padded batch of chosen and rejected rows. Leaves: the log-probabilities that TRL's fused head would give.
Refuses: nothing; where the model's attention or head is not plain, TRL's own batch goes through unchanged.

Each pair becomes one document with two branches: the tokens that both rows begin with, then each row's rest, at the
positions that it has alone. No token is padding, an answer's last token is predicted but never read, and the head runs
on answers only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from fmops.adapters.document_attention import ATTENTION, Document
from fmops.adapters.learnt_rows import finish_learnt_rows, learnt_only
from fmops.adapters.linear_loss import IGNORED, has_plain_head, token_nats


@dataclass(frozen=True)
class SharedBatch:
    """Rows of a preference batch as one row of branching documents."""

    input_ids: torch.Tensor
    """[1, tokens]"""
    position_ids: torch.Tensor
    """[1, tokens]"""
    documents: tuple[Document, ...]
    places: torch.Tensor
    """[learnt] which token's hidden state predicts each learnt label."""
    rows: torch.Tensor
    """[learnt] the row of the padded batch that the label belongs to."""
    columns: torch.Tensor
    """[learnt] its column among the shifted labels."""


def share(input_ids: torch.Tensor, lengths: list[int], labels: torch.Tensor) -> SharedBatch:
    """Lay out rows [2 × pairs, width], the chosen ones first, padded on the right; labels are −100 where not learnt."""
    rows, wanted = input_ids.tolist(), labels.tolist()
    half = len(rows) // 2
    ids: list[int] = []
    positions: list[int] = []
    documents: list[Document] = []
    learnt: list[tuple[int, int, int]] = []
    for pair in range(half):
        both = (pair, pair + half)
        texts = [rows[row][: lengths[row]] for row in both]
        prefix = _common(*texts)
        start = len(ids)
        ids += texts[0][:prefix]
        positions += range(prefix)
        ends = []
        for row, text in zip(both, texts, strict=True):
            begin = len(ids)
            ids += text[prefix:-1]
            positions += range(prefix, len(text) - 1)
            ends.append(len(text) - 1 - prefix)
            learnt += [
                (start + column if column < prefix else begin + column - prefix, row, column)
                for column in range(len(text) - 1)
                if wanted[row][column + 1] != IGNORED
            ]
        documents.append((prefix, *ends))
    device = input_ids.device
    places, owners, columns = torch.tensor(learnt, device=device).reshape(-1, 3).T
    return SharedBatch(
        torch.tensor([ids], device=device), torch.tensor([positions], device=device), tuple(documents),
        places, owners, columns,
    )  # fmt: skip


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two texts begin with alike; at least one of each is left, to be predicted."""
    longest = min(len(left), len(right)) - 1
    return next((index for index in range(longest) if left[index] != right[index]), longest)


def share_prefixes(model: Any, *, note: Callable[[str], None]) -> bool:
    """Give TRL's `model(fused_lm_head=True)` this way of computing; `model` is bare and attends by document."""
    if model.config._attn_implementation != ATTENTION or not has_plain_head(model):
        note(f"{type(model).__name__} is not plain enough to share prompts: each answer reads its own, slower")
        return False
    trl_forward = model.forward
    finish_learnt_rows(model)

    @functools.wraps(type(model).forward)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or args or kwargs.get("attention_mask") is None or len(kwargs["input_ids"]) % 2:
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _score(model, kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])

    model.forward = forward
    return True


def _score(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    batch = share(input_ids, mask.sum(dim=1).tolist(), labels)
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        documents=batch.documents,
        use_cache=False,
        **learnt_only(model, torch.unique(batch.places), tokens=batch.input_ids.shape[1]),
    ).last_hidden_state[0]
    wanted = labels[batch.rows, batch.columns + 1]
    nats = token_nats(hidden.index_select(0, batch.places), model.get_output_embeddings().weight, wanted)
    shape = (len(input_ids), input_ids.shape[1] - 1)
    scores = nats.new_zeros(shape).index_put((batch.rows, batch.columns), -nats)
    # TRL reads these for its log, which is off here; they are not measured, and say so.
    unknown = torch.full(shape, torch.nan, device=scores.device)
    return FusedCausalLMOutput(
        log_probs=scores,
        entropy=unknown,
        mean_logits=unknown,
        is_top1=torch.zeros(shape, dtype=torch.bool, device=scores.device),
        label_mask=labels[:, 1:] != IGNORED,
    )
