"""Pieces of documents into training blocks, and corpora into one mixture.

Enters: streams of token ids, weights. Leaves: a stream in the wanted shares; blocks of at most `block_tokens`.
Refuses: weights that cannot be met.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fmops.errors import FmopsError

OPEN_BLOCKS = 64
# A document cut to its first few tokens teaches nothing.
SHORTEST_PIECE = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one: `ids` are int32; `lap` counts the passes over its corpus, from 0."""

    corpus: str
    document: int
    lap: int
    ids: array[int]


@dataclass(frozen=True)
class Stream:
    """One corpus on its way into the mixture. `pieces` never ends: the corpus, shuffled anew each lap."""

    weight: float
    pieces: Iterator[Piece]
    whole: bool
    """Whether every document is wanted at least once when no number of tokens is given; else it fills its share."""


def cut(ids: array[int], *, longest: int) -> Iterator[array[int]]:
    """Consecutive parts of at most `longest` tokens."""
    for start in range(0, len(ids), longest):
        yield ids[start : start + longest]


def shares(weights: dict[str, float | None], sizes: dict[str, int]) -> dict[str, float]:
    """Weights that sum to one: those that are left out share what the others leave, by size.

    Raises:
        FmopsError: nothing is left for a corpus without a weight.
    """
    given = sum(weight for weight in weights.values() if weight)
    free = [name for name, weight in weights.items() if weight is None]
    left = 1 - given
    if free and left <= 1e-9:
        raise FmopsError(f"the given weights sum to 1 and leave nothing for {', '.join(free)}. Give each a weight.")
    total = sum(sizes[name] for name in free)
    resolved = {
        name: weight if weight is not None else left * (sizes[name] / total if total else 1 / len(free))
        for name, weight in weights.items()
    }
    whole = sum(resolved.values())
    return {name: weight / whole for name, weight in resolved.items()}


def mix(streams: dict[str, Stream], *, tokens: int | None) -> Iterator[Piece]:
    """Interleave the streams so that every stretch, and the whole to the token, holds the shares.

    With `tokens`, exactly so many come out, and small corpora repeat. Without, all `whole` streams come out at least
    once, and the others fill their shares.
    """
    quota = _quotas(streams, tokens) if tokens is not None else None
    done = dict.fromkeys(streams, 0)
    waiting = {name: next(stream.pieces) for name, stream in streams.items()}
    while True:
        if quota is None and all(waiting[name].lap for name, stream in streams.items() if stream.whole):
            quota = _quotas(
                streams, round(max(done[name] / stream.weight for name, stream in streams.items() if stream.whole))
            )
        open_ = [name for name in streams if quota is None or done[name] < quota[name]]
        if not open_:
            return
        # The piece whose middle is due first: errors stay within half a piece all along.
        name = min(open_, key=lambda name: (done[name] + len(waiting[name].ids) / 2) / streams[name].weight)
        piece = waiting[name]
        if quota is not None and done[name] + len(piece.ids) > quota[name]:
            piece = replace(piece, ids=piece.ids[: quota[name] - done[name]])
        done[name] += len(piece.ids)
        yield piece
        waiting[name] = next(streams[name].pieces)


def _quotas(streams: dict[str, Stream], tokens: int) -> dict[str, int]:
    quota = {name: round(stream.weight * tokens) for name, stream in streams.items()}
    # Rounding must not lose a token of the total.
    heaviest = max(streams, key=lambda name: streams[name].weight)
    quota[heaviest] += tokens - sum(quota.values())
    return quota


def pack(pieces: Iterable[Piece], *, block_tokens: int) -> Iterator[list[Piece]]:
    """Put each piece where it leaves the least room, among a window of open blocks; full blocks come out."""
    opened: list[tuple[int, list[Piece]]] = []
    for piece in pieces:
        fitting = [number for number, (room, _) in enumerate(opened) if room >= len(piece.ids)]
        best = min(fitting, key=lambda number: opened[number][0], default=None)
        room, block = opened.pop(best) if best is not None else (block_tokens, [])
        room -= len(piece.ids)
        block.append(piece)
        if room < SHORTEST_PIECE:
            yield block
            continue
        opened.append((room, block))
        if len(opened) > OPEN_BLOCKS:
            fullest = min(range(len(opened)), key=lambda number: opened[number][0])
            yield opened.pop(fullest)[1]
    yield from (block for _, block in opened)
