"""Loss on text and dialogues that training never sees.

Enters: a model, documents, each read in a row of its own, dialogues. Leaves: bits per byte, nats per token.
Refuses: to disturb training: same arithmetic, no gradients, the mode it found is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fmops.adapters.linear_loss import CHUNK_BYTES, WITHOUT_LOGITS
from fmops.adapters.model_files import evaluating, load_tokenizer
from fmops.adapters.packing import IGNORED, Block, collate, on_device, pack
from fmops.artifacts import Corpus
from fmops.integrity import read_lines

DOMAIN_TOKENS = 2048
"""Held-out tokens scored a domain and measurement: a few seconds on a laptop, since they are scored many times."""
DIALOGUE_TOKENS = 4096
"""Held-out dialogues scored before and after, in tokens."""
DOCUMENT_TOKENS = 256
"""Tokens scored of one document, so that several documents are heard."""


class Dialogue(Protocol):
    """Token ids, and which of them are learnt."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def learnt(self) -> tuple[bool, ...]: ...


D = TypeVar("D", bound=Dialogue)


@dataclass(frozen=True)
class HeldOutText:
    """Openings of held-out documents, and the bytes that their predicted tokens stand for."""

    documents: tuple[Block, ...]
    predicted_bytes: int

    def bits_per_byte(self, model: Any, *, dtype: torch.dtype) -> float:
        """Comparable between tokenizers, as a loss per token is not (Gao et al. 2020, section 3.1)."""
        nats, _ = total_loss(model, self.documents, dtype=dtype)
        return nats / math.log(2) / self.predicted_bytes


def read_held_out(path: Path, tokenizer: Any, *, block_tokens: int) -> HeldOutText | None:
    """The first `DOMAIN_TOKENS` tokens of documents in a JSON Lines file (key `text`); None when there are none."""
    pieces: list[Block] = []
    predicted_bytes, left = 0, DOMAIN_TOKENS
    for row in read_lines(path) if path.is_file() else []:
        text = row["text"]
        encoded = tokenizer(text[: DOCUMENT_TOKENS * 16], add_special_tokens=False, return_offsets_mapping=True)
        size = min(len(encoded["input_ids"]), DOCUMENT_TOKENS, block_tokens, left)
        if size < 2:
            continue
        pieces.append(Block(np.asarray(encoded["input_ids"][:size], dtype=np.int32), (size,)))
        offsets = encoded["offset_mapping"]
        # The first token has no predecessor to be predicted from, so its bytes do not count.
        predicted_bytes += len(text[offsets[1][0] : offsets[size - 1][1]].encode())
        left -= size
    return HeldOutText(tuple(pieces), predicted_bytes) if pieces else None


def held_out_losses(corpus: Corpus, source: Path, *, dtype: torch.dtype) -> Callable[[Any], dict[str, float]]:
    """Measures bits per byte on the new and, where the corpus knows one, on the old domain."""
    tokenizer = load_tokenizer(source)
    domains = {
        name: read_held_out(
            corpus.path / "held_out" / f"{name}.jsonl", tokenizer, block_tokens=max(2, corpus.block_tokens)
        )
        for name in ("new", "old")
    }
    texts = {name: text for name, text in domains.items() if text is not None}

    def measure(model: Any) -> dict[str, float]:
        return {f"{name}_bits_per_byte": text.bits_per_byte(model, dtype=dtype) for name, text in texts.items()}

    return measure


def piece_of(dialogue: Dialogue) -> Block:
    """A dialogue as a piece to pack."""
    ids = np.asarray(dialogue.ids, dtype=np.int32)
    return Block(ids, (len(ids),), np.asarray(dialogue.learnt, dtype=bool))


def first_dialogues(dialogues: Sequence[D]) -> list[D]:
    """At least one, and no more than `DIALOGUE_TOKENS` tokens hold."""
    chosen: list[D] = []
    tokens = 0
    for dialogue in dialogues:
        tokens += len(dialogue.ids)
        if chosen and tokens > DIALOGUE_TOKENS:
            break
        chosen.append(dialogue)
    return chosen


def held_out_loss(
    dialogues: Sequence[Dialogue], *, dtype: torch.dtype, block_tokens: int | None = None
) -> Callable[[Any], dict[str, float]]:
    """Measures nats a learnt token on the first held-out dialogues: together in blocks, or (None) a row each.

    Dialogues are short. A row each, 43 of some 25 tokens took 26 of 57 CPU seconds of instruction tuning.
    """
    pieces = [piece_of(dialogue) for dialogue in first_dialogues(dialogues)]
    if block_tokens is not None:
        pieces = pack(pieces, block_tokens=block_tokens)

    def measure(model: Any) -> dict[str, float]:
        if not pieces:
            return {}
        nats, counted = total_loss(model, pieces, dtype=dtype)
        return {"held_out_loss": nats / max(1, counted)}

    return measure


def total_loss(model: Any, documents: Sequence[Block], *, dtype: torch.dtype) -> tuple[float, int]:
    """Negative log-likelihood of all labelled tokens, in nats, and how many there are."""
    return summed_nats(model, (collate([document]) for document in documents), dtype=dtype)


def summed_nats(model: Any, batches: Iterable[dict[str, Any]], *, dtype: torch.dtype) -> tuple[float, int]:
    """The same of batches of one row, with `labels`; at most one logits matrix is held, none where the model can."""
    nats, tokens = 0.0, 0
    with evaluating(model, dtype=dtype) as device:
        for batch in batches:
            row = on_device(batch, device)
            learnt = (row["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
            tokens += len(learnt)
            if not len(learnt):
                continue
            if getattr(model, WITHOUT_LOGITS, False):
                nats += float(model(**row, num_items_in_batch=1).loss)
                continue
            following = row.pop("labels")[0, 1:]
            logits = model(**row).logits[0]
            for part in learnt.split(max(1, CHUNK_BYTES // (4 * logits.shape[-1]))):
                nats += float(cross_entropy(logits[part].float(), following[part], reduction="sum"))
    return nats, tokens
