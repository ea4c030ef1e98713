"""Token sequences as packed blocks, their order, and the batches that a model sees.

Enters: blocks (token ids, lengths of the pieces inside, labels). Leaves: an ordered training plan, batches.
Refuses: nothing silently: what does not fit a block is the caller's to refuse.

Attention never crosses pieces because a batch has `position_ids` that restart at every piece, no attention mask, and
`use_cache=False`: `document_attention` splits the row there, and where a model cannot use that, only then does
Transformers build a block-diagonal mask (`find_packed_sequence_indices`). Some architectures have other ways from token
to token; `keeps_documents_apart` finds those out, and they get one piece a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED = -100
OPEN_BLOCKS = 32
MICRO_TOKENS = 1024
"""Tokens that go through the model together: with these, what a micro-batch costs beside its tokens is 2 or 3 % (adding
135 million gradients takes 0.1 s, its tokens 10); more would only take more memory."""


@dataclass(frozen=True)
class Block:
    """One training sequence: several pieces, one after the other."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    lengths: tuple[int, ...]
    """Tokens of each piece, in order."""
    labelled: NDArray[np.bool_] | None = None
    """[tokens] True where the token is to be learnt; None means every token."""

    def cut(self, tokens: int) -> Block:
        """The first `tokens` tokens."""
        lengths, left = [], tokens
        for length in self.lengths:
            lengths.append(min(length, left))
            left -= lengths[-1]
            if left == 0:
                break
        return Block(self.input_ids[:tokens], tuple(lengths), None if self.labelled is None else self.labelled[:tokens])


_NOTHING = Block(np.zeros(2, dtype=np.int32), (2,), np.zeros(2, dtype=bool))


def labels_of(block: Block) -> NDArray[np.int64]:
    """[tokens] the ids to predict, −100 where nothing is learnt: unlabelled tokens, and each piece's first token.

    Models shift labels by one, so a first token's label would ask the piece before to predict it.
    """
    labels = block.input_ids.astype(np.int64)
    if block.labelled is not None:
        labels[~block.labelled] = IGNORED
    starts = np.cumsum((0, *block.lengths[:-1]))
    labels[starts] = IGNORED
    return labels


def positions_of(lengths: Sequence[int]) -> NDArray[np.int64]:
    """[tokens] positions that restart at every piece."""
    return np.concatenate([np.arange(length) for length in lengths])


def collate(blocks: Sequence[Block]) -> dict[str, Any]:
    """One row of all blocks' pieces. Leaves `input_ids`, `position_ids`, `labels`, each [1, tokens], and no mask.

    Of no blocks it is a row with nothing to learn: a process without a share of a step takes part in it all the same.
    """
    blocks = blocks or [_NOTHING]
    lengths = [length for block in blocks for length in block.lengths]
    return {
        "input_ids": torch.from_numpy(np.concatenate([block.input_ids for block in blocks]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions_of(lengths))[None],
        "labels": torch.from_numpy(np.concatenate([labels_of(block) for block in blocks]))[None],
        "use_cache": False,
    }


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch with its tensors on `device`; what else it says of its rows stays."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def pack(pieces: Sequence[Block], *, block_tokens: int) -> list[Block]:
    """Put pieces into blocks of at most `block_tokens` tokens, each where it leaves the least room.

    Of `OPEN_BLOCKS` open ones the fullest is closed when none has room.
    """
    open_blocks: list[list[Block]] = []
    room: list[int] = []
    done: list[Block] = []
    for piece in pieces:
        size = len(piece.input_ids)
        place = min((i for i, free in enumerate(room) if free >= size), key=room.__getitem__, default=None)
        if place is None:
            if len(open_blocks) == OPEN_BLOCKS:
                fullest = room.index(min(room))
                done.append(_joined(open_blocks.pop(fullest)))
                room.pop(fullest)
            open_blocks.append([])
            room.append(block_tokens)
            place = len(room) - 1
        open_blocks[place].append(piece)
        room[place] -= size
    return done + [_joined(block) for block in open_blocks]


def _joined(pieces: Sequence[Block]) -> Block:
    labelled = [
        np.ones(len(piece.input_ids), dtype=bool) if piece.labelled is None else piece.labelled for piece in pieces
    ]
    return Block(
        np.concatenate([piece.input_ids for piece in pieces]),
        tuple(length for piece in pieces for length in piece.lengths),
        np.concatenate(labelled),
    )


def read_blocks(shards: Sequence[Path]) -> BlockFile:
    """The blocks of parquet shards (columns `input_ids`, `lengths`), read in shard order."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.concat_tables([parquet.read_table(shard, columns=["input_ids", "lengths"]) for shard in shards])
    return BlockFile(table)


class BlockFile(Sequence[Block]):
    """Blocks in an Arrow table: four bytes a token, made into arrays one at a time."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._ids = table.column("input_ids")
        self._lengths = table.column("lengths")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        ids = self._ids[index].values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        return Block(ids, tuple(self._lengths[index].as_py()))

    def apart(self) -> BlockFile:
        """The same tokens, one piece a block."""
        import pyarrow as pa

        parts = []
        for batch in self._table.select(["input_ids", "lengths"]).to_batches():
            ids, lengths = (column.flatten() for column in batch.columns)
            ends = np.cumsum((0, *lengths.to_pylist()), dtype=np.int32)
            ones = np.arange(len(lengths) + 1, dtype=np.int32)
            columns = [pa.ListArray.from_arrays(ends, ids), pa.ListArray.from_arrays(ones, lengths)]
            parts.append(pa.record_batch(columns, names=batch.schema.names))
        return BlockFile(pa.Table.from_batches(parts))

    def sizes(self) -> list[int]:
        """Tokens of each block."""
        import pyarrow.compute as compute

        return [int(size) for size in compute.list_value_length(self._ids).to_pylist()]


@dataclass(frozen=True)
class Plan:
    """Which block is read when. `order` and `steps` cover the whole run; a resumed run skips into it."""

    order: tuple[int, ...]
    """Block indices, epoch after epoch, each epoch in its own seeded order."""
    last_tokens: int
    """Tokens kept of the last block, so that the run ends on its token budget exactly."""
    blocks_per_step: int
    tokens: int
    """Tokens the whole run reads."""
    tokens_after: tuple[int, ...]
    """Tokens read after each optimizer step."""
    item: str = "training blocks"
    """What `order` counts, for messages."""

    @property
    def steps(self) -> int:
        return len(self.tokens_after)

    def blocks_of(self, step: int) -> tuple[int, ...]:
        """Blocks that optimizer step `step` (counted from 1) reads."""
        return self.order[(step - 1) * self.blocks_per_step : step * self.blocks_per_step]


def plan_training(sizes: Sequence[int], *, tokens: int, batch_tokens: int, seed: int) -> Plan:
    """Read blocks in seeded order, over as many epochs as it takes, until `tokens` tokens are read.

    A step reads a fixed number of blocks, as near to `batch_tokens` as their mean size allows.
    """
    order: list[int] = []
    reads: list[int] = []
    left = tokens
    for index in _endless_order(sizes, seed):
        read = min(sizes[index], left)
        # One lone token teaches nothing: it has no predecessor to be predicted from.
        if read < 2:
            break
        order.append(index)
        reads.append(read)
        left -= read
    per_step = max(1, round(batch_tokens * len(sizes) / max(1, sum(sizes))))
    after = np.cumsum(reads)
    ends = [min(end, len(reads)) - 1 for end in range(per_step, len(reads) + per_step, per_step)]
    return Plan(
        order=tuple(order),
        last_tokens=reads[-1] if reads else 0,
        blocks_per_step=per_step,
        tokens=int(after[-1]) if reads else 0,
        tokens_after=tuple(int(after[end]) for end in ends),
    )


def micro_batch(plan: Plan, sizes: Sequence[int], *, processes: int = 1) -> int:
    """Blocks that share a row of the model, at most `MICRO_TOKENS` tokens of the largest; a step divides by it.

    It depends on the blocks and the processes alone: which sums are rounded together must not depend on the memory at
    hand. Each process gets one where there are enough blocks.
    """
    largest = max(sizes)
    most = max(1, plan.blocks_per_step // processes)
    parts = (part for part in range(1, most + 1) if plan.blocks_per_step % part == 0)
    return max(part for part in parts if part == 1 or part * largest <= MICRO_TOKENS)


def deal(plan: Plan, *, micro: int, rank: int, world: int) -> list[list[int]]:
    """Places in the plan's order that one of `world` processes reads: a list for each of its micro-batches.

    A step's micro-batches are those of one process, dealt in turn. Where they do not come out even the last ones are
    empty: every process has equally many in a step.
    """
    dealt: list[list[int]] = []
    for first in range(0, len(plan.order), plan.blocks_per_step):
        last = min(first + plan.blocks_per_step, len(plan.order))
        batches = [list(range(start, min(start + micro, last))) for start in range(first, last, micro)]
        mine = batches[rank::world]
        dealt += mine + [[] for _ in range(-(-len(batches) // world) - len(mine))]
    return dealt


def _endless_order(sizes: Sequence[int], seed: int) -> Iterator[int]:
    """Indices of blocks of two tokens and more, epoch after epoch; each epoch is a permutation of its own."""
    usable = [index for index, size in enumerate(sizes) if size >= 2]
    epoch = 0
    while usable:
        indices = list(usable)
        random.Random(f"{seed} epoch {epoch}").shuffle(indices)
        yield from indices
        epoch += 1


class PlannedBlocks(torch.utils.data.Dataset[Block]):
    """The plan's blocks in reading order, as the trainer's data set."""

    def __init__(self, blocks: Sequence[Block], plan: Plan) -> None:
        self._blocks = blocks
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan.order)

    def __getitem__(self, index: int) -> Block:
        if index >= len(self):
            raise IndexError(index)
        block = self._blocks[self._plan.order[index]]
        return block.cut(self._plan.last_tokens) if index == len(self) - 1 else block

    def learnt(self, index: int) -> int:
        """Tokens of a place that carry loss."""
        return int((labels_of(self[index]) >= 0).sum())
