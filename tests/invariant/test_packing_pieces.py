"""Mixing and packing lose no token, make none, and hold the shares, for any sizes and weights."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmops.data.pack import OPEN_BLOCKS, Piece, Stream, cut, mix, pack, shares
from fmops.errors import FmopsError

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def laps(corpus: str, sizes: list[int], *, longest: int) -> Iterator[Piece]:
    for lap in count():
        for document, size in enumerate(sizes):
            for part in cut(array("i", range(size)), longest=longest):
                yield Piece(corpus, document, lap, part)


def streams(sizes: dict[str, list[int]], weights: dict[str, float], *, longest: int = 128) -> dict[str, Stream]:
    return {
        name: Stream(weights[name], laps(name, sizes[name], longest=longest), whole=name != "old") for name in sizes
    }


@settings(max_examples=150, deadline=None)
@given(new=lengths, old=lengths, weight=st.floats(0.05, 0.95), tokens=st.integers(200, 20_000))
def test_the_mixture_has_exactly_the_tokens_and_the_share(
    new: list[int], old: list[int], weight: float, tokens: int
) -> None:
    mixture = list(mix(streams({"new": new, "old": old}, {"new": 1 - weight, "old": weight}), tokens=tokens))
    by_corpus = Counter[str]()
    for piece in mixture:
        by_corpus[piece.corpus] += len(piece.ids)
        # At every moment each corpus is within a piece of its share.
        done = by_corpus.total()
        assert abs(by_corpus["old"] - weight * done) <= 128 + 1
    assert by_corpus.total() == tokens
    assert abs(by_corpus["old"] - weight * tokens) <= 1


@settings(max_examples=100, deadline=None)
@given(new=lengths, more=lengths, old=lengths, weight=st.floats(0.05, 0.6))
def test_without_a_budget_every_new_document_comes_out_whole(
    new: list[int], more: list[int], old: list[int], weight: float
) -> None:
    sizes = {"new": new, "more": more, "old": old}
    total = sum(new) + sum(more)
    weights = {name: (1 - weight) * sum(sizes[name]) / total for name in ("new", "more")} | {"old": weight}
    first_lap = Counter[tuple[str, int]]()
    by_corpus = Counter[str]()
    for piece in mix(streams(sizes, weights), tokens=None):
        by_corpus[piece.corpus] += len(piece.ids)
        if piece.lap == 0:
            first_lap[piece.corpus, piece.document] += len(piece.ids)
    for name in ("new", "more"):
        assert [first_lap[name, document] for document in range(len(sizes[name]))] == sizes[name]
    # The end is known when the last new document is out; by then the old corpus may be half a piece ahead.
    assert abs(by_corpus["old"] - weight * by_corpus.total()) <= 128 / 2 + 2


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=400))
def test_packing_keeps_every_piece_whole_once_and_within_the_block(sizes: list[int]) -> None:
    pieces = [Piece("new", document, 0, array("i", range(size))) for document, size in enumerate(sizes)]
    packed = list(pack(iter(pieces), block_tokens=64))
    assert all(0 < sum(len(piece.ids) for piece in block) <= 64 for block in packed)
    found = sorted((piece for block in packed for piece in block), key=lambda piece: piece.document)
    assert found == pieces
    # Two half-empty blocks would have been one, but for the window.
    half_empty = sum(sum(len(piece.ids) for piece in block) <= 32 for block in packed)
    assert half_empty <= 1 + len(packed) // OPEN_BLOCKS


def test_packing_reads_no_further_ahead_than_its_window() -> None:
    taken = 0

    def endless() -> Iterator[Piece]:
        nonlocal taken
        for taken in count(1):
            yield Piece("new", taken, 0, array("i", [0] * 40))

    list(islice(pack(endless(), block_tokens=64), 10))
    assert taken <= OPEN_BLOCKS + 11


def test_weights_left_out_share_the_rest_by_size() -> None:
    assert shares({"a": None, "b": None, "old": 0.2}, {"a": 300, "b": 100, "old": 9}) == pytest.approx(
        {"a": 0.6, "b": 0.2, "old": 0.2}
    )
    assert shares({"only": None}, {"only": 5}) == {"only": 1.0}
    with pytest.raises(FmopsError, match="sum to 1 and leave nothing for c"):
        shares({"a": 0.5, "b": 0.5, "c": None}, {"a": 1, "b": 1, "c": 1})
