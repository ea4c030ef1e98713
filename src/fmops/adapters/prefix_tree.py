"""The order in which token sequences with common beginnings are read, so that each beginning is read once.

Enters: what each request reads, and from which position on its next tokens are scored. Leaves: steps of a few hundred
tokens, each a tree that hangs off a stem read before. Refuses: nothing; lengths are checked where requests enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

KEPT_TOKENS = 16
"""Fewer common tokens than this are read again with each pack: a pass of their own costs about as much as 25."""


@dataclass(frozen=True)
class Read:
    """What one request reads. The model's output at `first` and every later position is scored."""

    tokens: tuple[int, ...]
    first: int


@dataclass
class Span:
    """Positions of one request that are scored in one step."""

    request: int
    offset: int
    """How many of the request's scored positions come before, in other steps."""
    places: list[int]
    """Indices into the step's tokens."""


@dataclass
class Step:
    """Tokens of one forward pass: a tree in depth-first order, behind the tokens of its ancestors."""

    parent: int | None
    """The step before it on its stem. A step that is a parent holds one line of tokens, no branches."""
    start: int
    """Tokens on the stem: all ancestors' together."""
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Of each token within the step; its position is `start` more."""
    spans: list[Span] = field(default_factory=list)

    def ends(self) -> list[int]:
        """Where each token's subtree ends: token i sees token j if j <= i < ends[j]."""
        ends = [0] * len(self.tokens)
        open_tokens: list[int] = []
        for place, depth in enumerate(self.depths):
            while len(open_tokens) > depth:
                ends[open_tokens.pop()] = place
            open_tokens.append(place)
        for place in open_tokens:
            ends[place] = len(self.tokens)
        return ends


def plan(reads: Sequence[Read], pack_tokens: int) -> list[Step]:
    """Steps of about `pack_tokens` tokens, parents before children; a function of the reads alone.

    One request, or requests with a common beginning, may fill a step up to twice as long: to cut them would mean to
    read that beginning twice or to spend a pass on it.
    """
    return _Planner(reads, pack_tokens).steps if reads else []


class _Planner:
    """Walks the sorted reads as a tree; `first` and `last` bound ranges of the sorted order, both inclusive."""

    def __init__(self, reads: Sequence[Read], pack_tokens: int) -> None:
        self.reads = reads
        self.pack_tokens = pack_tokens
        self.order = sorted(range(len(reads)), key=lambda request: (reads[request].tokens, request))
        self.sorted = [reads[request].tokens for request in self.order]
        self.common = [0, *(_common(a, b) for a, b in pairwise(self.sorted))]
        self.sums = [0]
        for tokens, common in zip(self.sorted, self.common, strict=True):
            self.sums.append(self.sums[-1] + len(tokens) - common)
        self.steps: list[Step] = []
        stems: list[tuple[int, int, int, int | None]] = [(0, len(self.order) - 1, 0, None)]
        while stems:
            first, last, depth, parent = stems.pop()
            stems += reversed(self._grow(first, last, depth, parent))

    def _grow(self, first: int, last: int, depth: int, parent: int | None) -> list[tuple[int, int, int, int | None]]:
        """Lay out all that hangs off one stem; returns the longer stems that begin here."""
        units: list[tuple[int, int]] = []
        stems: list[tuple[int, int, int]] = []
        ranges = [(first, last)]
        while ranges:
            first, last = ranges.pop()
            shared = min(self.common[first + 1 : last + 1], default=len(self.sorted[first]))
            size = self._size(first, last, depth)
            keeps = first == last or shared - depth >= KEPT_TOKENS
            if size == 0:
                continue
            if keeps and size <= 2 * self.pack_tokens:
                units.append((first, last))
            elif keeps:
                stems.append((first, last, shared))
            else:
                cuts = [place for place in range(first + 1, last + 1) if self.common[place] == shared]
                bounds = [first, *cuts, last + 1]
                ranges += [(begin, end - 1) for begin, end in reversed(list(pairwise(bounds)))]
        self._pack(units, depth, parent)
        return [(begin, end, shared, self._line(begin, end, (depth, shared), parent)) for begin, end, shared in stems]

    def _size(self, first: int, last: int, depth: int) -> int:
        """Tokens of a range that lie deeper than `depth`."""
        return len(self.sorted[first]) - depth + self.sums[last + 1] - self.sums[first + 1]

    def _line(self, first: int, last: int, span: tuple[int, int], parent: int | None) -> int | None:
        """Steps for the tokens that a range shares, in equal pieces; returns the last one."""
        begin, end = span
        pieces = -(-(end - begin) // self.pack_tokens)
        bounds = [begin + (end - begin) * piece // pieces for piece in range(pieces + 1)]
        for start, stop in pairwise(bounds):
            step = Step(parent, start, list(self.sorted[first][start:stop]), list(range(stop - start)))
            path = list(range(stop - start))
            step.spans = [span for place in range(first, last + 1) for span in self._spans(place, start, path)]
            parent = len(self.steps)
            self.steps.append(step)
        return parent

    def _pack(self, units: list[tuple[int, int]], depth: int, parent: int | None) -> None:
        """Fill steps with units in their order; neighbours in a step share what they have in common there."""
        step = Step(parent, depth)
        before: int | None = None
        path: list[int] = []
        for first, last in units:
            common = self._known(before, first, depth)
            if step.tokens and len(step.tokens) + self._size(first, last, depth) - common > self.pack_tokens:
                self.steps.append(step)
                step, before = Step(parent, depth), None
            for place in range(first, last + 1):
                tokens = self.sorted[place]
                known = self._known(before, place, depth)
                new = len(tokens) - depth - known
                path = [*path[:known], *range(len(step.tokens), len(step.tokens) + new)]
                step.tokens += tokens[depth + known :]
                step.depths += range(known, known + new)
                step.spans += self._spans(place, depth, path)
                before = place
        if step.tokens:
            self.steps.append(step)

    def _known(self, before: int | None, place: int, depth: int) -> int:
        """Tokens beyond `depth` that a read shares with one before it: the least that any two between them share."""
        return 0 if before is None else min(self.common[before + 1 : place + 1]) - depth

    def _spans(self, place: int, start: int, path: list[int]) -> list[Span]:
        """What is scored of one request where its positions from `start` on lie at `path`."""
        request = self.order[place]
        read = self.reads[request]
        begin, end = max(read.first, start), min(len(read.tokens), start + len(path))
        return [Span(request, begin - read.first, path[begin - start : end - start])] if begin < end else []


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences share at their beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
