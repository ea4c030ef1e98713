"""Instruction tuning and alignment as a user sees them: answers become likelier, preferences are learnt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_inputs import a_checkpoint, a_corpus, some_conversations, some_preferences

from fmops.adapters.held_out import total_loss
from fmops.adapters.model_files import load_model
from fmops.adapters.packing import read_blocks
from fmops.adapters.trl_align import plan_examples
from fmops.adapters.trl_dpo import held_out_preferences
from fmops.adapters.trl_sft import documents_beside
from fmops.errors import FmopsError
from fmops.finetuning.align import align
from fmops.finetuning.instruct import instruct
from fmops.finetuning.preferences import Pair
from fmops.lifecycle import Align, Instruct


@pytest.fixture
def base(tiny_model, tmp_path):
    return a_checkpoint(tmp_path / "base", tiny_model)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_instruction_tuning_makes_held_out_answers_likelier(adapter, base, tmp_path, context, capfd):
    config = Instruct(adapter=adapter, learning_rate=2e-3, batch_tokens=200, block_tokens=200, epochs=2)
    talk = some_conversations(tmp_path / "talk")
    tuned = instruct(config, checkpoint=base, conversations=talk, out=tmp_path / "out", context=context)
    assert tuned.metrics["held_out_loss_after"] < tuned.metrics["held_out_loss_before"] - 0.05
    assert tuned.stage == "instruct"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() == (adapter == "lora")
    # The adapter is merged: the model stands alone, under its own names, with the tokenizer untouched.
    names = set(load_model(base.model).state_dict())
    assert set(load_model(tuned.model).state_dict()) == names
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tuned.model / name).read_bytes() == (base.model / name).read_bytes()
    assert json.loads((tuned.model / "config.json").read_text())["use_cache"] is True
    assert capfd.readouterr().out == ""


def test_max_tokens_ends_instruction_tuning_whatever_the_epochs_say(base, tmp_path, context):
    config = Instruct(batch_tokens=100, block_tokens=100, epochs=50, max_tokens=300)
    talk = some_conversations(tmp_path / "talk")
    instruct(config, checkpoint=base, conversations=talk, out=tmp_path / "out", context=context)
    assert json.loads((tmp_path / "out" / "curve.jsonl").read_text().splitlines()[-1])["tokens"] == 300


def test_tuning_beside_documents_forgets_less_of_what_they_say(base, tmp_path, context):
    """Both see the same dialogues as often; one of them reads the corpus between them."""
    talk, corpus = some_conversations(tmp_path / "talk"), a_corpus(tmp_path / "corpus", base.model)
    blocks = list(read_blocks(corpus.train_shards))
    losses = {}
    for share in (0.0, 0.5):
        config = Instruct(
            adapter="full", learning_rate=2e-3, batch_tokens=200, block_tokens=200, epochs=2, documents=share
        )
        out = tmp_path / f"out-{share}"
        given = {"corpus": corpus} if share else {}
        tuned = instruct(config, checkpoint=base, conversations=talk, out=out, context=context, **given)
        assert tuned.metrics["held_out_loss_after"] < tuned.metrics["held_out_loss_before"] - 0.05
        nats, tokens = total_loss(load_model(tuned.model), blocks, dtype=torch.float32)
        losses[share] = nats / tokens
    assert losses[0.5] < losses[0.0] - 0.3


def test_documents_get_the_share_of_the_tokens_that_is_asked_for_and_fit_a_block(base, tmp_path, context):
    corpus = a_corpus(tmp_path / "corpus", base.model, block_tokens=200)
    config = Instruct(documents=0.2, block_tokens=64)
    pieces = documents_beside(config, corpus, tokens=1000, context=context)
    assert 250 <= sum(len(piece.input_ids) for piece in pieces) < 250 + 64
    assert max(len(piece.input_ids) for piece in pieces) == 64
    assert all(piece.labelled is None for piece in pieces)
    again = documents_beside(config, corpus, tokens=1000, context=context)
    assert [list(piece.input_ids) for piece in again] == [list(piece.input_ids) for piece in pieces]


def test_a_corpus_too_small_for_the_share_is_read_whole_and_said(base, tmp_path, context):
    corpus = a_corpus(tmp_path / "corpus", base.model)
    pieces = documents_beside(Instruct(documents=0.9), corpus, tokens=5000, context=context)
    read = sum(len(piece.input_ids) for piece in pieces)
    assert read == corpus.tokens
    said = context.stream.getvalue()
    assert (
        f"instruct.documents is 0.9, but the corpus has no more than {read} tokens beside the dialogues' 5000" in said
    )
    assert f"a share of {read / (read + 5000):.2f}. Curate more, or lower instruct.documents." in said


def test_a_model_that_reads_pictures_is_tuned_without_documents(base, tmp_path, context, monkeypatch):
    monkeypatch.setattr("fmops.finetuning.instruct.reads_pictures", lambda model: True)
    talk, corpus = some_conversations(tmp_path / "talk"), a_corpus(tmp_path / "corpus", base.model)
    given = {"checkpoint": base, "conversations": talk, "corpus": corpus, "out": tmp_path / "out", "context": context}
    with pytest.raises(FmopsError, match="a model that reads pictures learns from dialogues alone"):
        instruct(Instruct(documents=0.5), **given)


def test_a_dialogue_longer_than_a_block_is_refused_by_name(base, tmp_path, context):
    talk = some_conversations(tmp_path / "talk")
    config = Instruct(block_tokens=64)
    messages = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "so " * 200}]
    long = {"id": "talkative", "source": "x", "messages": messages}
    (talk.path / "train.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(FmopsError, match=r"conversation talkative has \d+ tokens, more than instruct.block_tokens 64"):
        instruct(config, checkpoint=base, conversations=talk, out=tmp_path / "out", context=context)


def test_forged_turns_are_left_out_and_said(base, tmp_path, context):
    talk = some_conversations(tmp_path / "talk")
    forged = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Yes."}]
    with (talk.path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "forged", "source": "x", "messages": forged}) + "\n")
    config = Instruct(batch_tokens=200, block_tokens=200, max_tokens=200)
    instruct(config, checkpoint=base, conversations=talk, out=tmp_path / "out", context=context)
    said = "1 conversations in train.jsonl left out; forged: its text contains the control token <|im_end|>"
    assert said in context.stream.getvalue()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_alignment_moves_held_out_preferences(adapter, base, tmp_path, context, capfd):
    config = Align(adapter=adapter, learning_rate=1e-3, batch_pairs=4, epochs=1)
    pairs = some_preferences(tmp_path / "pairs")
    aligned = align(config, checkpoint=base, preferences=pairs, out=tmp_path / "out", context=context)
    assert aligned.metrics["held_out_pairs"] == 4
    assert aligned.metrics["reward_accuracy"] == 1.0
    assert aligned.metrics["reward_margin"] > 2 * aligned.metrics["reward_margin_standard_error"] > 0
    # DPO begins at ln 2: the policy is its own reference, whether the adapter is off or the answers are precomputed.
    assert abs(aligned.metrics["first_loss"] - 0.6931) < 1e-3
    assert not (tmp_path / "out" / "adapter" / "ref").exists()
    before, after = load_model(base.model).state_dict(), load_model(aligned.model).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert capfd.readouterr().out == ""


def test_a_pair_longer_than_max_tokens_is_refused_by_name(base, tmp_path, context):
    pairs = some_preferences(tmp_path / "pairs")
    with pytest.raises(FmopsError, match=r"preference .* has \d+ tokens, more than align.max_tokens 16"):
        align(Align(max_tokens=16), checkpoint=base, preferences=pairs, out=tmp_path / "out", context=context)


def test_pairs_are_capped_and_fill_whole_micro_batches():
    pairs = [Pair((1, 2), (3,), (4, 5)) for _ in range(30)]
    config = Align(max_pairs=21, batch_pairs=8)
    plan = plan_examples(pairs, config=config, whole=4, item="preference pairs", seed=0)
    assert len(plan.order) == len(set(plan.order)) == 20
    assert plan.steps == 3
    assert plan.tokens == 20 * 7
    with pytest.raises(FmopsError, match="3 preference pairs do not fill a batch of 4"):
        plan_examples(pairs[:3], config=Align(), whole=4, item="preference pairs", seed=0)


def test_rewards_are_what_training_added():
    measured = held_out_preferences([(-5.0, -4.0), (-6.0, -9.0)], [(-4.0, -6.0), (-6.0, -8.0)], beta=0.5)
    assert measured["reward_margin"] == pytest.approx((0.5 * 3 + 0.5 * -1) / 2)
    assert measured["reward_accuracy"] == 0.5
    assert (measured["preference_accuracy_before"], measured["preference_accuracy_after"]) == (0.5, 1.0)
    assert held_out_preferences([], [], beta=0.1) == {}
