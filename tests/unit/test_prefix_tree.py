"""The order of reading: every scored position once, in its own context, and common beginnings read once."""

from __future__ import annotations

import random

import pytest

from fmops.adapters.prefix_tree import Read, Step, plan


def reads_with_common_beginnings(seed: int) -> list[Read]:
    """Up to 30 requests over three tokens, so that many begin alike, repeat, or begin another one."""
    rng = random.Random(seed)
    stems = [tuple(rng.randint(0, 2) for _ in range(rng.randint(0, 60))) for _ in range(4)]
    reads = []
    for _ in range(rng.randint(1, 30)):
        stem = rng.choice(stems)[: rng.randint(0, 60)]
        tokens = stem + tuple(rng.randint(0, 2) for _ in range(rng.randint(1, 60)))
        reads.append(Read(tokens, rng.randrange(len(tokens))))
    return reads


def stem_of(steps: list[Step], step: Step) -> tuple[int, ...]:
    if step.parent is None:
        return ()
    parent = steps[step.parent]
    assert parent.depths == list(range(len(parent.tokens)))  # a line: no branches
    return stem_of(steps, parent) + tuple(parent.tokens)


@pytest.mark.parametrize("pack_tokens", [1, 4, 16, 64])
def test_every_position_is_scored_once_and_sees_its_own_request_alone(pack_tokens):
    for seed in range(100):
        reads = reads_with_common_beginnings(seed)
        steps = plan(reads, pack_tokens)
        scored: list[list[int]] = [[] for _ in reads]
        for step in steps:
            stem, ends = stem_of(steps, step), step.ends()
            assert len(stem) == step.start
            for span in step.spans:
                read = reads[span.request]
                for number, place in enumerate(span.places, start=span.offset):
                    seen = stem + tuple(step.tokens[other] for other in range(place + 1) if place < ends[other])
                    assert seen == read.tokens[: read.first + number + 1]
                    assert step.start + step.depths[place] == read.first + number
                    scored[span.request].append(read.first + number)
        assert all(
            sorted(places) == list(range(read.first, len(read.tokens)))
            for places, read in zip(scored, reads, strict=True)
        )


@pytest.mark.parametrize("pack_tokens", [16, 64])
def test_no_step_is_more_than_twice_as_long_as_asked(pack_tokens):
    reads = [read for seed in range(20) for read in reads_with_common_beginnings(seed)]
    assert max(len(step.tokens) for step in plan(reads, pack_tokens)) <= 2 * pack_tokens


def test_the_order_of_requests_does_not_change_what_is_read():
    reads = reads_with_common_beginnings(3)
    steps, reversed_steps = plan(reads, 32), plan(reads[::-1], 32)
    assert [step.tokens for step in steps] == [step.tokens for step in reversed_steps]


def test_a_stem_is_read_once_and_packs_are_full():
    rng = random.Random(0)
    shared = tuple(rng.randrange(1000) for _ in range(500))
    questions = [tuple(rng.randrange(1000) for _ in range(20)) for _ in range(100)]
    answers = [tuple(rng.randrange(1000) for _ in range(4)) for _ in range(400)]
    reads = [Read((*shared, *questions[n // 4], *answers[n]), 519) for n in range(400)]
    steps = plan(reads, 256)
    each_once = 500 + 100 * 20 + 400 * 4
    assert 0.99 * each_once < sum(len(step.tokens) for step in steps) <= each_once
    assert len(steps) <= 2 + 3600 / (256 - 36) + 1


def test_requests_that_begin_each_other_are_planned_without_deep_recursion():
    tokens = tuple(range(3000))
    steps = plan([Read(tokens[:length], length - 1) for length in range(1, 3000)], 256)
    assert sum(len(step.tokens) for step in steps) < 2 * 3000


def test_nothing_asked_is_nothing_read():
    assert plan([], 256) == []
