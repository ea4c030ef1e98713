"""Greedy generation for many prompts in continuous batches: a finished answer's place goes to the next prompt at once.

Enters: prompts that a `TreeReader` reads, what ends an answer. Leaves: the tokens of each answer, as they finish.
Refuses: nothing; what is asked for is checked where requests enter.

Every decoding step has the same number of rows, filled or idle, and each row attends over a cache of its own: an
answer takes the same arithmetic beside any others, so a resumed evaluation gives the same text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fmops.adapters.slot_attention import SlotCache
from fmops.adapters.tree_reader import TreeReader

ROWS = 32
"""Rows of a decoding step, at most. A step costs about as much as 25 rows before the first one is counted."""


@dataclass(eq=False)
class Answer:
    """One answer under way."""

    request: int
    step: int
    cache: SlotCache
    tokens: list[int] = field(default_factory=list)


def generate(
    reader: TreeReader,
    next_step: Callable[[], tuple[int, set[int]] | None],
    is_done: Callable[[list[int]], bool],
    *,
    new_tokens: int,
) -> Iterator[Answer]:
    """Continue prompts until there are no more; yields finished answers.

    `next_step` hands out a step's index and those of its requests that are wanted.
    `is_done` sees an answer's tokens after each one; `new_tokens` bounds them.
    """
    rows = min(ROWS, -(-sum(len(step.spans) for step in reader.steps) // 8) * 8)
    slots: list[Answer | None] = [None] * rows
    waiting: deque[Answer] = deque()
    more = True
    while True:
        while more and len(waiting) < slots.count(None):
            work = next_step()
            more = work is not None
            if work is not None:
                waiting.extend(_prompted(reader, *work, new_tokens))
        for slot, running in enumerate(slots):
            while running is None and waiting:
                running = waiting.popleft()
                if _ended(running, is_done, new_tokens):
                    yield running
                    running = None
            slots[slot] = running
        if not any(slots):
            if not more:
                return
            continue
        for running, token in zip(slots, _advance(reader, slots), strict=True):
            if running:
                running.tokens.append(token)
        for slot, running in enumerate(slots):
            if running and _ended(running, is_done, new_tokens):
                slots[slot] = None
                yield running


def _ended(answer: Answer, is_done: Callable[[list[int]], bool], new_tokens: int) -> bool:
    return is_done(answer.tokens) or len(answer.tokens) == new_tokens


def _prompted(reader: TreeReader, index: int, wanted: set[int], new_tokens: int) -> Iterator[Answer]:
    """Read a step's prompts; each becomes an answer of one token with a cache of its own."""
    step = reader.steps[index]
    kept = sorted({span.places[-1] for span in step.spans})
    first = dict(zip(kept, reader.read(index, kept).argmax(-1).tolist(), strict=True))
    for span in step.spans:
        if span.request not in wanted:
            continue
        place = span.places[-1]
        room = step.start + step.depths[place] + 1 + new_tokens
        yield Answer(span.request, index, reader.branch(index, place, room), [first[place]])


@torch.inference_mode()
def _advance(reader: TreeReader, slots: list[Answer | None]) -> list[int]:
    """One more token for each answer; idle rows give any."""
    tokens = torch.tensor([[answer.tokens[-1] if answer else 0] for answer in slots])
    positions = torch.tensor([[answer.cache.length if answer else 0] for answer in slots])
    caches = [answer.cache if answer else None for answer in slots]
    output = reader.model(
        input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, slots=caches
    )  # fmt: skip
    for cache in caches:
        if cache:
            cache.length += 1
    chosen: list[int] = output.logits[:, -1].argmax(-1).tolist()
    return chosen
