"""Attention for tokens that form a tree behind a stem: each sees the stem, its own ancestors and itself.

Enters: one step of `prefix_tree`, the cache of its stem. Leaves: what each token attends to, in one pass of the model.
Refuses: attention that is more than causal or sliding-window softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fmops.adapters.pool_attention import Pool
from fmops.adapters.prefix_tree import Step
from fmops.adapters.slot_attention import SlotCache, refuse_unsupported

ATTENTION = "fmops-tree"
ROWS = 64
"""Queries of one attention call: they skip the keys that come after the last of them."""


@dataclass(frozen=True)
class _Rows:
    """Neighbouring queries and the keys that any of them sees."""

    queries: slice
    keys: slice
    hidden: torch.Tensor
    """Added to the scores, shape (queries, keys): 0 where seen, minus infinity elsewhere."""


@dataclass(frozen=True, eq=False)
class Tree:
    """A step laid out for attention, and the cache that holds its stem; its own keys go behind."""

    cache: SlotCache
    start: int = 0
    """Tokens on the stem."""
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Of every key in the text that it belongs to: the stem's, then the step's own."""
    rows: list[_Rows] = field(default_factory=list)
    _within: dict[int, list[_Rows]] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, cache: SlotCache) -> Tree:
        length = len(step.tokens)
        place = torch.arange(length)
        ends = torch.tensor(step.ends())
        seen = (place[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
        roots = [index for index, depth in enumerate(step.depths) if depth == 0]
        positions = torch.cat([torch.arange(step.start), torch.tensor(step.depths) + step.start])
        tree = cls(cache, step.start, positions)
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            # Without a stem, the trees before the first query's own are nobody's business here.
            low = 0 if step.start else max(root for root in roots if root <= begin)
            own = torch.zeros(end - begin, end - low).masked_fill_(~seen[begin:end, low:end], -torch.inf)
            hidden = torch.cat([torch.zeros(end - begin, step.start), own], dim=1) if step.start else own
            tree.rows.append(_Rows(slice(begin, end), slice(low, step.start + end), hidden))
        return tree

    def within(self, window: int | None) -> list[_Rows]:
        """The rows where each token sees the newest `window` tokens of its text, itself among them; None: all."""
        if not window or int(self.positions.max()) < window:
            return self.rows
        if window not in self._within:
            self._within[window] = [self._cut(rows, window) for rows in self.rows]
        return self._within[window]

    def _cut(self, rows: _Rows, window: int) -> _Rows:
        own = self.positions[self.start :][rows.queries]
        far = own[:, None] - self.positions[None, rows.keys] >= window
        hidden = rows.hidden.masked_fill(far, -torch.inf)
        # Keys before the first that anybody sees are not read.
        first = int((hidden == 0).any(0).nonzero()[0, 0])
        return _Rows(rows.queries, slice(rows.keys.start + first, rows.keys.stop), hidden[:, first:])


def register() -> str:
    """Make the attention known to Transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    pool: Pool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The signature is that of Transformers' `AttentionInterface`; with a tree, a batch is one row.

    Shapes: query (1, heads, length, head size), key and value (1, key heads, length, head size); result
    (1, length, heads, head size).
    """
    refuse_unsupported(options)
    window = options.get("sliding_window")
    if pool is not None:
        # Answers under way, a row each.
        return pool.attend(module.layer_idx, query, key, value, scaling, window).transpose(1, 2), None
    if tree is None:
        raise ValueError(f"the attention {ATTENTION!r} needs the step that the tokens belong to, or a pool of answers")
    keys, values = tree.cache.extend(module.layer_idx, key, value)
    result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for rows in tree.within(window):
        attended = scaled_dot_product_attention(
            query[:, :, rows.queries], keys[:, :, rows.keys], values[:, :, rows.keys],
            attn_mask=rows.hidden, scale=scaling, enable_gqa=True,
        )  # fmt: skip
        result[:, rows.queries] = attended.transpose(1, 2)
    return result, None
