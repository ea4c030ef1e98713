"""Attention inside each document of a packed row, without a mask.

Enters: queries, keys and values of one row of documents, the documents' lengths. Leaves: what each token attends to.
Refuses: attention that is more than causal softmax, rows whose documents it cannot tell apart.

A dense mask makes a row of n documents cost n times the attention of its documents: measured 7 times slower than this
for 12 documents of 140 tokens on a CPU. On a GPU the same rows go to torch's variable-length flash attention in half
precision, and to SDPA, a document at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fmops.adapters.model_files import evaluating
from fmops.adapters.packing import Block, collate, on_device
from fmops.errors import FmopsError

ATTENTION = "fmops-documents"
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")
"""Arguments of attention that there is no arithmetic for here."""
LONG = 256
"""Tokens from which a CPU's bfloat16 attention is as fast as float32's; at 64 its backward takes 2.7 times as long."""
SEEN = 1e-5
"""Change of a document's logits, as a share of the largest, from which it has seen the one before: random weights of
the architectures that do give 1e-4 to 1, of those that do not 0."""

Document = tuple[int, ...]
"""Lengths of a shared prefix and of the branches behind it; a plain document is a prefix alone."""


def attend_by_document(model: Any, *, note: Callable[[str], None]) -> bool:
    """Give `model` this attention where it is exact, and say so where it is not. Returns whether it did."""
    name = type(model).__name__
    if attends_everywhere(model.config) and model._supports_attention_backend:
        before = model.config._attn_implementation
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        if keeps_documents_apart(model):
            return True
        model.set_attn_implementation(before)
    if keeps_documents_apart(model):
        note(f"{name} attends by more than causal softmax: packed rows keep their dense mask, slower")
    else:
        note(f"{name} looks from one document of a packed row into the next: each is read in a row of its own, slower")
    return False


def keeps_documents_apart(model: Any) -> bool:
    """Whether a document's logits are the same whatever stands before it in a packed row: tried on two short ones.

    Recurrent and convolutional layers run through the whole row, and so does attention that makes a mask of its own.
    """
    vocabulary, length, found = len(model.get_input_embeddings().weight), 10, []
    with evaluating(model, dtype=torch.float32) as device:
        for start in (3, 3 + 2 * length):
            ids = np.array([*range(start, start + length), *range(3 + length, 3 + 2 * length)]) % vocabulary
            row = on_device(collate([Block(ids.astype(np.int32), (length, length))]), device)
            del row["labels"]
            found.append(model(**row).logits[0, length:])
    return bool((found[0] - found[1]).abs().max() <= SEEN * found[0].abs().max())


def attends_everywhere(config: Any) -> bool:
    """Whether every layer is plain full attention with rotary positions."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return kinds == {"full_attention"} and not window and bool(rotary)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Sequence[Document] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The signature is that of Transformers' `AttentionInterface`; `documents` is an argument of the model's forward.

    Shapes: query (1, heads, tokens, head size), key and value (1, key heads, tokens, head size); result (1, tokens,
    heads, head size). Without `documents` they are read from `position_ids`, which begin at 0 in each.

    Raises:
        FmopsError: the arguments ask for attention of another kind.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if asked or dropout or attention_mask is not None or query.shape[2] != key.shape[2]:
        what = ", ".join(asked) or "dropout, a mask or a cache"
        raise FmopsError(f"attention by document computes no {what}. Load the model with attn_implementation='sdpa'.")
    if query.shape[0] > 1:
        rows = []
        for index in range(len(query)):
            part = slice(index, index + 1)
            positions = _row(options.get("position_ids"), index)
            rows.append(attend(module, query[part], key[part], value[part], None, scaling, position_ids=positions)[0])
        return torch.cat(rows), None
    if documents is None:
        documents = documents_of(options.get("position_ids"), tokens=query.shape[2])
    if takes_varlen(query.device.type, value.dtype, documents):
        return _varlen(query, key, value, [document[0] for document in documents], scaling), None
    sizes = [sum(document) for document in documents]
    parts = zip(documents, *(torch.split(x, sizes, 2) for x in (query, key, value)), strict=True)
    return torch.cat([_one(document, q, k, v, scaling) for document, q, k, v in parts], dim=1), None


def takes_varlen(device: str, dtype: torch.dtype, documents: Sequence[Document]) -> bool:
    """Whether a row goes to torch's variable-length attention: plain documents in half precision on a GPU."""
    plain = all(len(document) == 1 for document in documents)
    return device == "cuda" and dtype in (torch.float16, torch.bfloat16) and plain


def documents_of(position_ids: torch.Tensor | None, *, tokens: int) -> tuple[Document, ...]:
    """The plain documents of a row, by the places where its positions begin again at 0."""
    if position_ids is None:
        return ((tokens,),)
    row = position_ids[0]
    starts = (row == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], len(row)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    expected = torch.cat([torch.arange(length, device=row.device) for length in lengths]) if lengths else row[:0]
    if not torch.equal(row, expected):
        raise FmopsError(
            f"positions of a packed row must begin at 0 in each document and rise by one, not {row[:8].tolist()}…"
        )
    return tuple((length,) for length in lengths)


def _row(position_ids: torch.Tensor | None, index: int) -> torch.Tensor | None:
    if position_ids is None or len(position_ids) == 1:
        return position_ids
    return position_ids[index : index + 1]


def _one(
    document: Document, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """(1, tokens, heads, head size) of one document: each branch sees the prefix and itself."""
    prefix, *branches = document
    if len(branches) < 2:
        return _causal(query, key, value, scaling)
    end = prefix + branches[0]
    found = [_causal(query[:, :, :end], key[:, :, :end], value[:, :, :end], scaling)]
    for length in branches[1:]:
        start, end = end, end + length
        k, v = (torch.cat([x[:, :, :prefix], x[:, :, start:end]], dim=2) for x in (key, value))
        found.append(_causal(query[:, :, start:end], k, v, scaling))
    return torch.cat(found, dim=1)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """(1, queries, heads, head size); the queries are the last of the keys' tokens."""
    # Under autocast the positions have made queries and keys float32; values are what the layer computes in.
    device, dtype = query.device.type, value.dtype
    rows, keys = query.shape[2], key.shape[2]
    inside = torch.float32 if device == "cpu" and keys < LONG else dtype
    seen = query.new_ones(rows, keys, dtype=torch.bool).tril(keys - rows) if rows < keys else None
    with torch.autocast(device, enabled=False):
        found = scaled_dot_product_attention(
            query.to(inside), key.to(inside), value.to(inside),
            attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True,
        )  # fmt: skip
    return found.to(dtype).transpose(1, 2)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float | None
) -> torch.Tensor:
    """The same by torch's flash attention over cumulative lengths; for GPUs."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    # One dtype for all, that of the values: see `_causal`.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    longest = max(lengths)
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    found: torch.Tensor = out[None]
    return found
