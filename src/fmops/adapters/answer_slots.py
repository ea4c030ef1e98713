"""Generation for many prompts in continuous batches: a finished answer's place goes to the next prompt at once.

Enters: prompts that a `TreeReader` reads, how tokens are chosen, what ends an answer. Leaves: the tokens of each
answer, as they finish.
Refuses: nothing; what is asked for is checked where requests enter.

A matrix product of four rows or more computes each of them alike (MKL, measured; see docs/log.md), and so does
`pool_attention`: an answer takes the same arithmetic in any company, so a resumed evaluation gives its text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fmops.adapters.pool_attention import Pool
from fmops.adapters.slot_attention import SlotCache
from fmops.adapters.tree_reader import TreeReader

ROWS = 64
"""Answers of a decoding step, at most: a row costs 17 µs of a 1536 × 576 product there, 26 beside eight, 50 alone."""
FULL_ROWS = 4
"""Steps have a multiple of so many rows. Fewer than four take other kernels, which round differently."""
POOL_TOKENS = 1 << 17
"""Room for keys and values, over all rows: 64 answers of 2,048 tokens, prompts included, or fewer and longer ones."""


Choose = Callable[[torch.Tensor, Sequence[tuple[int, int]]], list[int]]
"""Tokens from logits (rows, vocabulary), each row with its request and how many tokens its answer has so far."""


def likeliest(logits: torch.Tensor, _: Sequence[tuple[int, int]]) -> list[int]:
    """Greedy decoding."""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


@dataclass(eq=False)
class Answer:
    """One answer under way."""

    request: int
    step: int
    prompt: SlotCache
    tokens: list[int] = field(default_factory=list)


def generate(
    reader: TreeReader,
    next_step: Callable[[], tuple[int, set[int]] | None],
    is_done: Callable[[list[int]], bool],
    choose: Choose = likeliest,
    *,
    new_tokens: int,
) -> Iterator[Answer]:
    """Continue prompts until there are no more; yields finished answers.

    `next_step` hands out a step's index and those of its requests that are wanted.
    `is_done` sees an answer's tokens after each one; `new_tokens` bounds them.
    """
    room = max(step.start + max(step.depths) + 1 for step in reader.steps) + new_tokens
    rows = max(FULL_ROWS, min(ROWS, POOL_TOKENS // room) // FULL_ROWS * FULL_ROWS)
    pool = Pool(rows, room)
    slots: list[Answer | None] = [None] * rows
    waiting: deque[Answer] = deque()
    more = True
    while more or waiting or any(slots):
        while more and len(waiting) < slots.count(None):
            work = next_step()
            more = work is not None
            if work is not None:
                waiting.extend(_prompted(reader, *work, choose))
        for row in range(rows):
            if slots[row] is None and waiting:
                admitted = waiting.popleft()
                slots[row] = admitted
                pool.put(row, admitted.prompt)
        for row, answer in enumerate(slots):
            if answer and _ended(answer, is_done, new_tokens):
                slots[row], pool.lengths[row] = None, 0
                yield answer
        if (any(slots) and not (more or waiting)) or all(slots):
            _advance(reader, pool, slots, choose)


def _ended(answer: Answer, is_done: Callable[[list[int]], bool], new_tokens: int) -> bool:
    return is_done(answer.tokens) or len(answer.tokens) == new_tokens


def _prompted(reader: TreeReader, index: int, wanted: set[int], choose: Choose) -> Iterator[Answer]:
    """Read a step's prompts; each becomes an answer of one token with a cache of its own."""
    step = reader.steps[index]
    ends = step.ends()
    kept = sorted({span.places[-1] for span in step.spans})
    row = {place: number for number, place in enumerate(kept)}
    spans = [span for span in step.spans if span.request in wanted]
    logits = reader.read(index, kept)
    first = choose(logits[[row[span.places[-1]] for span in spans]], [(span.request, 0) for span in spans])
    for span, token in zip(spans, first, strict=True):
        yield Answer(span.request, index, reader.branch(step.start, ends, span.places[-1]), [token])


@torch.inference_mode()
def _advance(reader: TreeReader, pool: Pool, slots: list[Answer | None], choose: Choose) -> None:
    """One more token for each answer. Answers move to the first rows, so that no more rows are computed than needed."""
    last = len(slots) - 1
    for row in range(len(slots)):
        while last > row and slots[last] is None:
            last -= 1
        if slots[row] is None and last > row:
            pool.move(last, row)
            slots[row], slots[last] = slots[last], None
    running = [answer for answer in slots if answer]
    used = -(-len(running) // FULL_ROWS) * FULL_ROWS
    pool.begin(used)
    idle = used - len(running)
    tokens = torch.tensor([[answer.tokens[-1]] for answer in running] + [[0]] * idle)
    positions = torch.tensor([[length] for length in pool.lengths[:used]])
    output = reader.model(
        input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, pool=pool
    )  # fmt: skip
    pool.end()
    places = [(answer.request, len(answer.tokens)) for answer in running]
    for answer, token in zip(running, choose(output.logits[: len(running), -1], places), strict=True):
        answer.tokens.append(token)
