"""Documents that share a training block never see each other, through every path that trains."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fmops.adapters.document_attention import ATTENTION, attend_by_document, keeps_documents_apart
from fmops.adapters.held_out import held_out_losses, total_loss
from fmops.adapters.linear_loss import learn_without_logits
from fmops.adapters.model_files import load_model
from fmops.adapters.packing import IGNORED, Block, collate, labels_of, pack, plan_training, read_blocks


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


SHAPES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mamba": {"state_size": 8},
    "lfm2": {"num_key_value_heads": 2, "intermediate_size": 64, "layer_types": ["conv", "full_attention"]},
}
SEES = "looks from one document of a packed row into the next: each is read in a row of its own, slower"


def _small(kind: str, tiny_model: Path, out: Path) -> Path:
    """A small random model of another architecture, with the tiny model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_model, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    common = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **common, **SHAPES[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("kind", "apart"), [("llama", True), ("gpt2", True), ("opt", False), ("mamba", False), ("lfm2", False)]
)
def test_a_model_whose_documents_would_see_each_other_is_found_out(kind, apart, tiny_model, tmp_path):
    model, said = load_model(_small(kind, tiny_model, tmp_path / kind)), []
    assert attend_by_document(model, note=said.append) == (kind == "llama")
    assert keeps_documents_apart(model) is apart
    rows = []
    for seed in (1, 5):
        batch = collate(pack([_piece(17, seed=seed), PIECES[1]], block_tokens=64))
        del batch["labels"]
        with torch.no_grad():
            rows.append(model.eval()(**batch).logits[0, 17:])
    assert bool((rows[0] - rows[1]).abs().max() < 1e-6) is apart
    assert [note.endswith(SEES) for note in said] == ([not apart] if kind != "llama" else [])


def test_attention_by_document_is_taken_back_where_another_layer_mixes_tokens(tiny_model):
    model, said = load_model(tiny_model), []
    model.base_model.layers[0].mlp.register_forward_hook(lambda *call: call[-1] + call[-1].cumsum(dim=1))
    assert not attend_by_document(model, note=said.append)
    assert model.config._attn_implementation == "sdpa" != ATTENTION
    assert said == [f"LlamaForCausalLM {SEES}"]


@pytest.mark.parametrize("kind", ["llama", "mamba", "opt"])
@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_stage_learns_each_document_as_if_it_were_alone(stage, kind, tiny_model, tmp_path):
    """The first step's loss, over all documents at once, and the held-out loss before it."""
    from training_inputs import a_corpus

    from fmops.adapters import transformers_pretrain, trl_sft
    from fmops.finetuning.dialogue import Encoded
    from fmops.lifecycle import Instruct, Pretrain
    from fmops.stage import StageContext

    source = _small(kind, tiny_model, tmp_path / "model")
    context, out = StageContext(seed=3, stream=io.StringIO(), precision="float32"), tmp_path / "out"
    out.mkdir()
    if stage == "pretrain":
        corpus = a_corpus(tmp_path / "corpus", source)
        blocks = read_blocks(corpus.train_shards)
        cut = [np.split(block.input_ids, np.cumsum(block.lengths)[:-1]) for block in blocks]
        pieces = [Block(ids, (len(ids),)) for row in cut for ids in row]
        config = Pretrain(tokens=sum(blocks.sizes()), batch_tokens=10**6)
        result = transformers_pretrain.train(
            config, source=source, corpus=corpus, out=out, keep=None, context=context
        )  # fmt: skip
        wanted = held_out_losses(corpus, source, dtype=torch.float32)(load_model(source))["new_bits_per_byte"]
        found = result.curve[0]["new_bits_per_byte"]
    else:
        pieces = [_piece(size, seed=size, learnt=[False] * 4 + [True] * (size - 4)) for size in range(20, 32)]
        dialogues = [Encoded(tuple(map(int, p.input_ids)), tuple(map(bool, p.labelled))) for p in pieces]
        config = Instruct(batch_tokens=10**6, block_tokens=128, adapter="full", epochs=1)
        result = trl_sft.train(
            config, source=source, dialogues=dialogues, held_out=dialogues[:4], out=out, context=context
        )
        nats, learnt = total_loss(load_model(source), pieces[:4], dtype=torch.float32)
        wanted, found = nats / learnt, result.curve[0]["held_out_loss"]
    assert found == pytest.approx(wanted, abs=1e-5)
    nats, learnt = total_loss(load_model(source), pieces, dtype=torch.float32)
    assert result.curve[1]["loss"] == pytest.approx(nats / learnt, abs=1e-5)
    assert (SEES in context.stream.getvalue()) == (kind != "llama")


def test_held_out_documents_are_read_alone(tiny_model, tmp_path):
    """Twice the same document is twice its loss, whatever the architecture."""
    from training_inputs import a_corpus

    from fmops.adapters.held_out import read_held_out
    from fmops.adapters.model_files import load_tokenizer

    source = _small("mamba", tiny_model, tmp_path / "model")
    path = a_corpus(tmp_path / "corpus", source).path / "held_out" / "new.jsonl"
    line, model, tokenizer = path.read_text().splitlines()[0], load_model(source), load_tokenizer(source)
    scores = []
    for times in (1, 2):
        path.write_text(f"{line}\n" * times)
        text = read_held_out(path, tokenizer, block_tokens=512)
        scores.append(text.bits_per_byte(model, dtype=torch.float32))
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_held_out_loss_without_logits_is_that_of_the_logits(precision, tiny_model, monkeypatch):
    mixed = _piece(12, seed=9, learnt=[False] * 6 + [True] * 6)
    plain, fast = load_model(tiny_model), load_model(tiny_model)
    learn_without_logits(fast, note=pytest.fail)
    wanted = total_loss(plain, [mixed, *PIECES], dtype=precision)
    monkeypatch.setattr("fmops.adapters.held_out.CHUNK_BYTES", 7 * 4 * 2048)
    chunked = total_loss(plain, [mixed, *PIECES], dtype=precision)
    heads: list[object] = []
    fast.get_output_embeddings().register_forward_hook(lambda *call: heads.append(call))
    found = total_loss(fast, [mixed, *PIECES], dtype=precision)
    assert heads == []
    assert found[1] == wanted[1] == chunked[1]
    assert math.isclose(found[0], wanted[0], rel_tol=1e-5)
    assert math.isclose(chunked[0], wanted[0], rel_tol=1e-5)
    assert all(parameter.grad is None for parameter in fast.parameters())
