"""Votes and odds ratios on shared, unpadded batches give the loss and the gradients of the plain path, to 1e-5."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig, KTOConfig, KTOTrainer

from fmops.adapters.document_attention import attend_by_document
from fmops.adapters.model_files import load_model, load_tokenizer
from fmops.adapters.schedule import Schedule, arguments
from fmops.adapters.trl_kto import KtoTrainer, balance, held_out_votes, rows
from fmops.adapters.trl_orpo import OrpoTrainer, log_odds, orpo_loss
from fmops.errors import FmopsError
from fmops.finetuning.preferences import Vote

VOTES = [
    Vote((5, 6, 7, 8), (9, 10, 11), True),
    Vote((5, 6, 7), (21, 22), False),
    Vote((40, 41, 42), (43,), True),
    Vote((50,), (51, 52, 53, 54), False),
]
PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [12, 13]},
    {"prompt_ids": [20], "chosen_ids": [21, 22, 23, 24], "rejected_ids": [21, 22, 30]},
]


def options(folder, **more):
    common = arguments(
        work=folder, steps=1, accumulate=1, schedule=Schedule(1e-3, 0.0, 0.0), dtype=torch.float32, seed=0
    )
    return {**common, "gradient_checkpointing": False, "max_length": None, "per_device_train_batch_size": 4, **more}


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_equal(found, wanted):
    assert abs(found[0] - wanted[0]) < 1e-5
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() < 1e-5, name


def test_votes_give_trls_loss_and_gradients(tiny_model, tmp_path):
    batch = [{**row, "ref_logps": -9.0 - n, "ref_KL_logps": -30.0} for n, row in enumerate(rows(VOTES, micro=4))]
    plain = type("Plain", (KTOTrainer,), {"_prepare_dataset": KtoTrainer._prepare_dataset})
    found = []
    for kind in (plain, KtoTrainer):
        model = load_model(tiny_model)
        given = {}
        if kind is KtoTrainer:
            attend_by_document(model, note=pytest.fail)
            given = {"note": pytest.fail}
        trainer = kind(
            model=model,
            ref_model=load_model(tiny_model),
            args=KTOConfig(**options(tmp_path, beta=0.5)),
            train_dataset=Dataset.from_list(batch),
            processing_class=load_tokenizer(tiny_model),
            **given,
        )
        trainer.precompute_ref_logps = True
        found.append(loss_and_gradients(trainer, batch))
    assert_equal(found[1], found[0])


def test_each_vote_is_given_the_answer_of_the_one_before_inside_its_batch():
    answers = [list(vote.answer) for vote in VOTES]
    for micro, places in ((4, (3, 0, 1, 2)), (2, (1, 0, 3, 2))):
        borrowed = [row["KL_completion_ids"] for row in rows(VOTES, micro=micro)]
        assert borrowed == [answers[place] for place in places]


@pytest.mark.parametrize("shares", [False, True])
def test_odds_ratios_are_those_of_the_full_logits(shares, tiny_model, tmp_path):
    model = load_model(tiny_model)
    if shares:
        attend_by_document(model, note=pytest.fail)
    trainer = OrpoTrainer(
        note=pytest.fail if shares else lambda text: None,
        model=model,
        args=DPOConfig(**options(tmp_path, beta=0.3, precompute_ref_log_probs=True)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer(tiny_model),
    )
    found = loss_and_gradients(trainer, PAIRS)
    plain = load_model(tiny_model)
    means = {
        key: torch.stack([mean_log_prob(plain, pair["prompt_ids"], pair[key]) for pair in PAIRS])
        for key in ("chosen_ids", "rejected_ids")
    }
    loss = orpo_loss(means["chosen_ids"], means["rejected_ids"], weight=0.3)
    loss.backward()
    assert_equal(found, (float(loss.detach()), {name: p.grad for name, p in plain.named_parameters()}))


def mean_log_prob(model, prompt, answer):
    """By the plain model: no batch, no padding, all logits."""
    ids = torch.tensor([prompt + answer])
    scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return scores[torch.arange(len(answer)), torch.tensor(answer)].mean()


def test_the_odds_ratio_is_that_of_trls_own_trainer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    chosen, rejected = torch.tensor([-0.2, -1.5, -4.0]), torch.tensor([-1.0, -0.3, -4.0])
    theirs = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    wanted = ORPOTrainer.odds_ratio_loss(theirs, chosen, rejected)[0]
    assert torch.allclose(0.3 * logsigmoid(log_odds(chosen) - log_odds(rejected)), wanted, atol=1e-6)
    assert torch.isfinite(log_odds(torch.tensor([0.0, -1e-9, -80.0]))).all()


def test_both_kinds_of_votes_weigh_the_same_in_all():
    assert balance(30, 40) == (1.0, 3.0)
    assert balance(10, 40) == (3.0, 1.0)
    for liked, said in ((40, "up"), (0, "down")):
        with pytest.raises(FmopsError, match=f"all 40 votes are thumbs {said}: kto learns from the difference"):
            balance(liked, 40)


def test_votes_are_measured_by_how_far_the_liked_rose_above_the_others():
    measured = held_out_votes([1.0, 0.0, 0.0, -1.0], [True, True, False, False])
    assert measured["vote_accuracy"] == (1 + 1 + 0.5 + 1) / 4
    assert measured["reward_margin"] == 1.0
    assert measured["reward_margin_standard_error"] == pytest.approx((0.5 / 2 + 0.5 / 2) ** 0.5)
    assert held_out_votes([1.0], [True]) == {"held_out_votes": 1.0}
    assert held_out_votes([], []) == {}
