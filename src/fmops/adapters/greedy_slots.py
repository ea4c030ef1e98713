"""Greedy generation for many prompts in continuous batches: a finished answer's place goes to the next prompt at once.

Enters: prompts that a `TreeReader` reads, what ends an answer. Leaves: the tokens of each answer, as they finish.
Refuses: nothing; what is asked for is checked where requests enter.

Each row attends over a cache of its own, and a matrix product computes a row alike beside four others or sixty (MKL,
measured; see docs/log.md): an answer takes the same arithmetic in any company, so a resumed evaluation gives its text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fmops.adapters.slot_attention import SlotCache
from fmops.adapters.tree_reader import TreeReader

ROWS = 64
"""Answers of a decoding step, at most: a row costs 17 µs of a 1536 × 576 product there, 26 beside eight, 50 alone."""
FULL_ROWS = 4
"""Steps have a multiple of so many rows. Fewer than four take other kernels, which round differently."""


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
    running: list[Answer] = []
    waiting: deque[Answer] = deque()
    more = True
    while more or running or waiting:
        while more and len(running) + len(waiting) < ROWS:
            work = next_step()
            more = work is not None
            if work is not None:
                waiting.extend(_prompted(reader, *work, new_tokens))
        while waiting and len(running) < ROWS:
            running.append(waiting.popleft())
        done = [answer for answer in running if _ended(answer, is_done, new_tokens)]
        running = [answer for answer in running if answer not in done]
        yield from done
        if running and (len(running) == ROWS or not (more or waiting)):
            for answer, token in zip(running, _advance(reader, running), strict=True):
                answer.tokens.append(token)


def _ended(answer: Answer, is_done: Callable[[list[int]], bool], new_tokens: int) -> bool:
    return is_done(answer.tokens) or len(answer.tokens) == new_tokens


def _prompted(reader: TreeReader, index: int, wanted: set[int], new_tokens: int) -> Iterator[Answer]:
    """Read a step's prompts; each becomes an answer of one token with a cache of its own."""
    step = reader.steps[index]
    ends = step.ends()
    kept = sorted({span.places[-1] for span in step.spans})
    first = dict(zip(kept, reader.read(index, kept).argmax(-1).tolist(), strict=True))
    for span in step.spans:
        if span.request not in wanted:
            continue
        place = span.places[-1]
        room = step.start + step.depths[place] + 1 + new_tokens
        yield Answer(span.request, index, reader.branch(step.start, ends, place, room=room), [first[place]])


@torch.inference_mode()
def _advance(reader: TreeReader, running: list[Answer]) -> list[int]:
    """One more token for each answer."""
    idle = -len(running) % FULL_ROWS
    tokens = torch.tensor([[answer.tokens[-1]] for answer in running] + [[0]] * idle)
    positions = torch.tensor([[answer.cache.length] for answer in running] + [[0]] * idle)
    slots = [*(answer.cache for answer in running), *[None] * idle]
    output = reader.model(
        input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, slots=slots
    )  # fmt: skip
    for answer in running:
        answer.cache.length += 1
    chosen: list[int] = output.logits[: len(running), -1].argmax(-1).tolist()
    return chosen
