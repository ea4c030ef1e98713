"""Attention in which every row of a batch keeps a cache of its own.

Enters: queries, keys and values of several requests, and each request's cache. Leaves: what each row attends to.
Refuses: attention that is more than causal or sliding-window softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fmops.errors import FmopsError

ATTENTION = "fmops-slots"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that there is no arithmetic for here."""


@dataclass(eq=False)
class SlotCache:
    """Keys and values of one request; memory is taken as it is written to."""

    room: int
    """Most tokens it will hold."""
    length: int = 0
    """Tokens held; the caller moves it after each forward pass, when every layer has stored its part."""
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, shape (1, key heads, room, head size)."""
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values behind the old ones; return all of them as views."""
        if layer not in self.keys:
            self.keys[layer] = key.new_empty(1, key.shape[1], self.room, key.shape[3])
            self.values[layer] = value.new_empty(1, value.shape[1], self.room, value.shape[3])
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def register() -> str:
    """Make the attention known to Transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    slots: Sequence[SlotCache | None] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each row over its own cache: the signature is that of Transformers' `AttentionInterface`.

    Shapes: query (rows, heads, length, head size), key and value (rows, key heads, length, head size);
    result (rows, length, heads, head size). A row without a cache is idle and yields zeros.
    """
    refuse_unsupported(options)
    result = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for row, cache in enumerate(slots):
        if cache:
            keys, values = cache.extend(module.layer_idx, key[row : row + 1], value[row : row + 1])
            one = query[row : row + 1]
            attended = (_last if one.shape[2] == 1 else _piece)(
                one, keys, values, scaling, options.get("sliding_window")
            )
            result[row] = attended[0].transpose(0, 1)
    return result, None


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Refuse a model whose attention asks for more than is computed here.

    Raises:
        FmopsError: names what it asks for.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if asked:
        raise FmopsError(f"this model's attention needs {', '.join(asked)}, which this engine does not compute.")


def _last(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One query position over all keys; heads that share keys are laid side by side as positions."""
    if window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    shared = query.view(1, keys.shape[1], query.shape[1] // keys.shape[1], query.shape[3])
    attended = scaled_dot_product_attention(shared, keys, values, scale=scaling)
    return attended.reshape(1, query.shape[1], 1, values.shape[3])


def _piece(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """A piece of a prompt: position i of the piece sees every earlier position, within the window."""
    length, past = query.shape[2], keys.shape[2] - query.shape[2]
    if not past and not (window and window < length):
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
    mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    if window:
        mask = mask.triu(past - window + 1)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
