"""What is read when: budgets are met exactly, order is seeded, batches have the size that was asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.checkpoints import best_interval
from fmops.adapters.packing import Block, PlannedBlocks, pack, plan_training
from fmops.adapters.schedule import evenly


def _block(size: int) -> Block:
    return Block(np.arange(size, dtype=np.int32), (size,))


def test_a_run_reads_exactly_the_tokens_that_were_asked_for():
    sizes = [100, 90, 50]
    plan = plan_training(sizes, tokens=1000, batch_tokens=160, seed=0)
    planned = PlannedBlocks([_block(size) for size in sizes], plan)
    assert sum(len(planned[index].input_ids) for index in range(len(planned))) == 1000 == plan.tokens
    assert plan.tokens_after[-1] == 1000


def test_every_block_is_read_once_before_any_is_read_twice():
    plan = plan_training([10] * 7, tokens=140, batch_tokens=20, seed=3)
    assert sorted(plan.order[:7]) == list(range(7)) == sorted(plan.order[7:])
    assert plan.order[:7] != plan.order[7:]


def test_equal_seeds_give_equal_order_and_others_another():
    orders = [plan_training([10] * 50, tokens=500, batch_tokens=20, seed=seed).order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_step_reads_as_many_tokens_as_the_blocks_allow():
    plan = plan_training([512] * 40, tokens=40 * 512, batch_tokens=2048, seed=0)
    assert plan.blocks_per_step == 4
    assert plan.steps == 10
    assert plan.blocks_of(1) == plan.order[:4]


def test_blocks_of_one_token_are_passed_over():
    plan = plan_training([1, 10, 1], tokens=25, batch_tokens=10, seed=0)
    assert set(plan.order) == {1}
    assert plan_training([1, 1], tokens=25, batch_tokens=10, seed=0).steps == 0


def test_cutting_the_last_block_keeps_whole_pieces_lengths():
    cut = Block(np.arange(30, dtype=np.int32), (10, 15, 5)).cut(12)
    assert cut.lengths == (10, 2)
    assert len(cut.input_ids) == 12


def test_packing_loses_nothing_and_fills_blocks():
    pieces = [_block(size) for size in (60, 50, 40, 30, 20, 10)]
    blocks = pack(pieces, block_tokens=100)
    assert sum(len(block.input_ids) for block in blocks) == 210
    assert all(sum(block.lengths) == len(block.input_ids) <= 100 for block in blocks)
    assert len(blocks) == 3


def test_packing_leaves_hardly_any_room():
    """First fit among as many open blocks fills 0.976 of these, closing the oldest."""
    sizes = np.clip(np.random.default_rng(0).lognormal(np.log(400) - 0.32, 0.8, 4000), 8, 1024).astype(int)
    blocks = pack([_block(size) for size in sizes], block_tokens=1024)
    assert blocks[0].lengths == pack([_block(size) for size in sizes], block_tokens=1024)[0].lengths
    assert sizes.sum() / 1024 / len(blocks) > 0.982


def test_measurements_end_on_the_last_step_and_resume_states_before_it():
    assert evenly(4, 100, end=True) == {25, 50, 75, 100}
    assert evenly(3, 100, end=False) == {25, 50, 75}
    assert evenly(4, 1, end=False) == frozenset()
    assert evenly(4, 2, end=True) == {1, 2}


def test_the_expected_goodput_is_what_a_simulation_of_kills_finds():
    save_s, restart_s, between_s = 0.05, 0.3, 4.0
    interval_s, expected = best_interval(save_s=save_s, restart_s=restart_s, between_s=between_s)
    dice = random.Random(0)
    spent, segments = 0.0, 20_000
    for _ in range(segments):
        needed, lived = interval_s + save_s, dice.expovariate(1 / between_s)
        # Kills have no memory: each segment may begin with a fresh one.
        while lived < needed:
            spent += lived
            needed, lived = restart_s + interval_s + save_s, dice.expovariate(1 / between_s)
        spent += needed
    assert segments * interval_s / spent == pytest.approx(expected, rel=0.02)
    # Where kills are rare it is Young's interval, and little is lost.
    rare, goodput = best_interval(save_s=save_s, restart_s=restart_s, between_s=1e5)
    assert rare == pytest.approx((2 * save_s * 1e5) ** 0.5, rel=0.05)
    assert goodput > 0.99
