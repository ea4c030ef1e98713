"""The last layer's feed-forward part at learnt tokens only.

Enters: a model, which tokens a loss reads. Leaves: their last hidden states, those of the others unfinished.
Refuses: nothing; a model whose last layer is built otherwise runs whole.

Behind the last attention no token looks at another, so what a prompt's tokens would become there reaches no loss and
no gradient. It is a thirtieth of a model of thirty layers, and a tenth of one of four.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

MARK = "_fmops_finishes_learnt_rows"


def finish_learnt_rows(model: Any) -> bool:
    """Let `model.base_model(…, learnt=places)` finish only those tokens. Returns whether the model allows it.

    `places` has shape [learnt] and counts tokens of a batch of one row; without it the forward is what it was. Tried
    on a few tokens, as a layer may do more than to add its feed-forward part.
    """
    layer = next(reversed(getattr(model.base_model, "layers", None) or [None]))
    whole = getattr(getattr(layer, "mlp", None), "forward", None)
    if whole is None or getattr(model, MARK, False):
        return whole is not None
    plain = layer.forward

    @functools.wraps(plain)
    def forward(*args: Any, learnt: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if learnt is None:
            return plain(*args, **kwargs)

        def few(rows: torch.Tensor) -> torch.Tensor:
            done: torch.Tensor = whole(rows.index_select(1, learnt))
            return done.new_zeros(rows.shape).index_copy(1, learnt, done)

        layer.mlp.forward = few
        try:
            return plain(*args, **kwargs)
        finally:
            layer.mlp.forward = whole

    layer.forward = forward
    if _finishes_alike(model):
        setattr(model, MARK, True)
        return True
    layer.forward = plain
    return False


def learnt_only(model: Any, learnt: torch.Tensor, *, tokens: int) -> dict[str, torch.Tensor]:
    """The argument that spares the other tokens of a row of `tokens`, where `model` knows it and there are both kinds.

    A row with nothing to learn is read whole: every weight takes part in the step, for which other processes may wait.
    """
    return {"learnt": learnt} if getattr(model, MARK, False) and 0 < len(learnt) < tokens else {}


@torch.no_grad()
def _finishes_alike(model: Any) -> bool:
    """Whether learnt tokens come out the same, tried on a few."""
    some = next(model.parameters())
    ids = torch.arange(1, 7, device=some.device)[None] % model.get_input_embeddings().weight.shape[0]
    places = torch.tensor([1, 4], device=some.device)
    training = model.training
    model.eval()
    try:
        wanted, found = (
            model.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state[0, places]
            for more in ({}, {"learnt": places})
        )
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        model.train(training)
    return bool(torch.allclose(found, wanted, rtol=1e-4, atol=1e-4))
