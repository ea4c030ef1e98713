"""Cross-entropy of a linear head without its logits matrix.

Enters: hidden states, a head's weight, labels. Leaves: nats a token, and gradients computed on the way.
Refuses: heads that are more than one matrix (scaled or capped logits, biases).

The idea is that of cut cross-entropy (Wijmans et al. 2024) and Liger's fused loss, in plain torch operations: rows are
taken a few at a time, and their gradient is made while their logits are in the cache, so that nothing is computed
twice. torch's own `linear_cross_entropy` is as fast in float32, but returns a bfloat16 loss of three digits under
bfloat16 (docs/design/0012-training-speed.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from transformers.modeling_outputs import CausalLMOutput

from fmops.adapters.learnt_rows import finish_learnt_rows, learnt_only

IGNORED = -100
WITHOUT_LOGITS = "_fmops_learns_without_logits"
"""Marks a model that `learn_without_logits` changed."""
CHUNK_BYTES = 2**26
"""Logits held at a time: fewer rows would starve the matrix multiplication."""
LONGEST_CHUNK = 1024
CACHED_ELEMENTS = 2**18
"""Logits turned into slopes at a time: few enough to stay in the processor's cache, and in memory already touched."""
CACHED_WORDS = 4096
"""Rows of the head's weight whose bfloat16 gradient is added up at a time."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Nats a row; the weight's gradient is right when every row's loss is weighed alike (a sum or a mean)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        nats = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(rows) if needs_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
        size = min(len(rows), max(64, min(LONGEST_CHUNK, CHUNK_BYTES // (dtype.itemsize * len(weight)))))
        buffer = rows.new_empty(size, len(weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                logits = torch.mm(rows[part], matrix.T, out=buffer[: len(rows[part])])
                nats[part] = _slopes_in_place(logits, labels[part, None])
                if grad_hidden is not None:
                    torch.mm(logits, matrix, out=grad_hidden[part])
                if grad_weight is not None:
                    _add_outer(grad_weight, logits, rows[part], first=start == 0)
        ctx.gradients = grad_hidden, grad_weight
        ctx.dtypes = hidden.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (each,) = weights  # [rows]
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass; compute the loss again")
        # They are scaled where they lie, so they are there once.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.dtypes[0]).mul_(each[:, None])
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(each[0]).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None


def _add_outer(total: torch.Tensor, slopes: torch.Tensor, rows: torch.Tensor, *, first: bool) -> None:
    """Add `slopes`ᵀ · `rows` to the float32 `total`, or make it that where it is the `first` part.

    Shapes: total (vocabulary, hidden size), slopes (rows, vocabulary), rows (rows, hidden size).
    """
    if slopes.dtype == torch.float32:
        torch.addmm(total, slopes.T, rows, beta=0 if first else 1, out=total)
        return
    size = CACHED_WORDS if total.device.type == "cpu" else len(total)
    for start in range(0, len(total), size):
        part = slice(start, start + size)
        product = slopes[:, part].T @ rows
        if first:
            total[part] = product
        else:
            total[part] += product


def _slopes_in_place(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats a row; the logits' place is taken by the slope of those: probabilities, minus one at the label.

    Shapes: logits (rows, vocabulary), labels (rows, 1); result (rows). The one is taken off before anything is rounded.
    """
    # A GPU would wait for the start of each small operation.
    few = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    nats = []
    for block, wanted in zip(torch.split(logits, few), torch.split(labels, few), strict=True):
        logs = torch.log_softmax(block, dim=-1, dtype=torch.float32)
        nats.append(-logs.gather(1, wanted)[:, 0])
        block.copy_(logs.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32)))
    return torch.cat(nats)


def total_nats(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods of `labels`; rows labelled −100 are passed over.

    Shapes: hidden (rows, hidden size), weight (vocabulary, hidden size), labels (rows).
    """
    learnt = (labels != IGNORED).nonzero()[:, 0]
    if not len(learnt):
        # A differentiable zero: the micro-batch takes part in the step without moving it, the head's weight, too, for
        # which other processes may wait.
        return hidden.sum() * 0.0 + weight[:1].sum() * 0.0
    if len(learnt) < len(labels):
        hidden, labels = hidden.index_select(0, learnt), labels.index_select(0, learnt)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient would be made all the same
    nats: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return nats.sum()


def token_nats(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row's label, shape (rows); what follows may weigh rows as it likes."""
    if weight.requires_grad and torch.is_grad_enabled():
        return cross_entropy(linear(hidden, weight).float(), labels, reduction="none")
    nats: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return nats


def learn_without_logits(model: Any, *, note: Callable[[str], None]) -> bool:
    """Let `model(labels=…)` return a loss and no logits, where its head allows that. Returns whether it does.

    Called on the bare model, before PEFT or a trainer wraps it. Without labels its forward is what it was.
    """
    if not has_plain_head(model):
        note(f"{type(model).__name__} has more than a matrix as its head: training computes its logits, slower")
        return False
    plain = model.forward
    finish_learnt_rows(model)

    @functools.wraps(type(model).forward)
    def forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        following = labels[:, 1:] if shift_labels is None else shift_labels
        if len(labels) == 1:
            places = (following[0] != IGNORED).nonzero()[:, 0]
            kwargs |= learnt_only(model, places, tokens=labels.shape[1])
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, : following.shape[1]]
        nats = total_nats(hidden.flatten(0, 1), model.get_output_embeddings().weight, following.flatten())
        counted = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=nats / torch.as_tensor(counted, device=nats.device).clamp(min=1))

    model.forward = forward
    setattr(model, WITHOUT_LOGITS, True)
    return True


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are its last hidden states times its head's weight: tried on a few tokens."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or not hasattr(head, "weight"):
        return False
    ids = torch.arange(1, 5, device=head.weight.device)[None] % len(head.weight)
    training = model.training
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return bool(torch.allclose(linear(hidden, head.weight), logits, rtol=1e-4, atol=1e-4))
