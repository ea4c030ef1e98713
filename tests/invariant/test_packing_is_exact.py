"""Documents that share a training block never see each other, through every path that trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmops.adapters.held_out import total_loss
from fmops.adapters.model_files import load_model
from fmops.adapters.packing import IGNORED, Block, collate, labels_of, pack, plan_training


def _piece(size: int, *, seed: int, learnt: list[bool] | None = None) -> Block:
    ids = np.random.default_rng(seed).integers(3, 2000, size).astype(np.int32)
    return Block(ids, (size,), None if learnt is None else np.asarray(learnt, dtype=bool))


PIECES = [_piece(17, seed=1), _piece(40, seed=2), _piece(5, seed=3), _piece(2, seed=4)]


def test_logits_of_packed_documents_equal_those_of_each_document_alone(tiny_model):
    model = load_model(tiny_model).eval()
    (block,) = pack(PIECES, block_tokens=64)
    batch = collate([block])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits[0]
        alone = torch.cat(
            [model(input_ids=torch.from_numpy(p.input_ids.astype(np.int64))[None]).logits[0] for p in PIECES]
        )
    assert (packed - alone).abs().max() < 1e-5


def test_a_mask_or_a_cache_would_leak_which_is_why_a_batch_has_neither(tiny_model):
    """Guards the guard: were this to pass without `use_cache=False`, the collator's care would be untested."""
    model = load_model(tiny_model).eval()
    batch = collate(pack(PIECES, block_tokens=64))
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    batch.pop("labels")
    with torch.no_grad():
        right = model(**batch).logits
        leaking = model(**{**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).logits
    assert (right - leaking).abs().max() > 1e-3


def test_no_document_is_asked_to_predict_the_next_one():
    (block,) = pack(PIECES, block_tokens=64)
    starts = np.cumsum((0, *block.lengths[:-1]))
    assert (labels_of(block)[starts] == IGNORED).all()
    assert (labels_of(block) != IGNORED).sum() == len(block.input_ids) - len(PIECES)


@pytest.mark.parametrize("path", ["pretraining", "instruction tuning"])
def test_loss_and_gradients_of_a_packed_step_equal_the_unpacked_ones(path, tiny_model, tmp_path):
    """One step over a packed block = the token-weighted mean over its documents, to 1e-5."""
    trainer = _trainer(path, tiny_model, tmp_path)
    block = pack(PIECES, block_tokens=64)[0]
    batch = collate([block])
    learnt = (batch["labels"][..., 1:] != IGNORED).sum()
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=learnt)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    model = load_model(tiny_model)
    total = torch.zeros(())
    for piece in PIECES:
        ids = torch.from_numpy(piece.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (total / learnt).backward()
    assert abs(float(loss) - float(total / learnt)) < 1e-5
    for name, parameter in model.named_parameters():
        assert (packed[name] - parameter.grad).abs().max() < 1e-5, name


def _trainer(path, tiny_model, tmp_path):
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import SFTConfig

    from fmops.adapters.model_files import load_tokenizer
    from fmops.adapters.schedule import Schedule, arguments
    from fmops.adapters.transformers_pretrain import PretrainTrainer
    from fmops.adapters.trl_sft import SftTrainer

    common = arguments(
        work=tmp_path, steps=1, accumulate=1, schedule=Schedule(1e-3, 0.0, 0.0), dtype=torch.float32, seed=0
    )
    model = load_model(tiny_model)
    if path == "pretraining":
        return PretrainTrainer(model=model, args=TrainingArguments(**common), data_collator=collate)
    return SftTrainer(
        model=model,
        args=SFTConfig(
            **common,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        train_dataset=Dataset.from_dict({"place": [0]}),
        data_collator=collate,
        processing_class=load_tokenizer(tiny_model),
    )


def test_a_step_weighs_tokens_not_blocks(tiny_model, tmp_path):
    """Gradient accumulation over a long and a short block = one batch of both (mean of means would differ)."""
    from transformers import TrainingArguments

    from fmops.adapters.packing import PlannedBlocks
    from fmops.adapters.schedule import Schedule, arguments
    from fmops.adapters.trainer import Watch, run
    from fmops.adapters.transformers_pretrain import PretrainTrainer
    from fmops.stage import StageContext

    blocks = [PIECES[1], PIECES[2]]
    sizes = [40, 5]
    after = {}
    for accumulate in (2, 1):
        plan = plan_training(sizes, tokens=45, batch_tokens=45, seed=0)
        merged = blocks if accumulate == 2 else pack(blocks, block_tokens=64)
        if accumulate == 1:
            plan = plan_training([45], tokens=45, batch_tokens=45, seed=0)
        work = tmp_path / str(accumulate)
        work.mkdir()
        trainer = PretrainTrainer(
            model=load_model(tiny_model),
            args=TrainingArguments(
                **arguments(
                    work=work,
                    steps=1,
                    accumulate=accumulate,
                    schedule=Schedule(1e-3, 0.0, 0.0),
                    dtype=torch.float32,
                    seed=0,
                )
            ),
            train_dataset=PlannedBlocks(merged, plan),
            data_collator=collate,
        )
        import io

        watch = Watch(
            plan=plan,
            context=StageContext(stream=io.StringIO()),
            evaluate=lambda _: {},
            evaluate_at=frozenset(),
            save_at=frozenset(),
        )
        run(trainer, watch, work=work)
        after[accumulate] = watch.curve[-1]["loss"]
    assert abs(after[1] - after[2]) < 1e-5


def test_held_out_loss_counts_each_learnt_token_once(tiny_model):
    model = load_model(tiny_model)
    mixed = _piece(12, seed=9, learnt=[False] * 6 + [True] * 6)
    packed = total_loss(model, pack([mixed, PIECES[0]], block_tokens=64), dtype=torch.float32)
    alone = [total_loss(model, [piece], dtype=torch.float32) for piece in (mixed, PIECES[0])]
    assert packed[1] == 6 + 16 == sum(tokens for _, tokens in alone)
    assert abs(packed[0] - sum(nats for nats, _ in alone)) < 1e-3
