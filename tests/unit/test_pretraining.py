"""Continued pretraining as a user sees it: losses fall, forgetting is bounded, nothing infinite is ever applied."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_inputs import a_checkpoint, a_corpus
from training_run import digests

from fmops.adapters import trainer
from fmops.adapters.model_files import load_model
from fmops.errors import FmopsError, Terminated
from fmops.lifecycle import Pretrain
from fmops.pretraining.pretrain import pretrain, within_ceiling


@pytest.fixture
def corpus(tiny_model, tmp_path):
    return a_corpus(tmp_path / "corpus", tiny_model)


@pytest.fixture
def base(tiny_model, tmp_path):
    return a_checkpoint(tmp_path / "base", tiny_model)


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_training_lowers_the_held_out_loss_and_says_by_how_much(tuning, base, corpus, tmp_path, context):
    config = Pretrain(tokens=2000, batch_tokens=256, learning_rate=2e-3, tuning=tuning, evaluations=2)
    trained = pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert trained.metrics["new_bits_per_byte_after"] < trained.metrics["new_bits_per_byte_before"] - 0.02
    assert trained.licence == base.licence
    assert 0 < trained.trained_tokens < 2000
    rows = curve(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["tokens"] == 2000
    assert sum("new_bits_per_byte" in row for row in rows) == 3
    assert (tmp_path / "out" / "adapter").exists() == (tuning == "lora")
    load_model(trained.model)


def test_only_model_files_are_left_and_they_name_no_path(base, corpus, tmp_path, context):
    config = Pretrain(tokens=300, batch_tokens=256, tuning="lora", evaluations=1)
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and ".work" not in p.parts]
    assert not [p.name for p in left if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert not [p.name for p in left if p.suffix in {".json", ".jsonl"} and str(tmp_path) in p.read_text()]


def test_training_stops_at_the_ceiling_and_keeps_the_weights_before_it(base, corpus, tmp_path, context):
    # A rate so high that both domains get worse at once.
    config = Pretrain(
        tokens=1000, batch_tokens=128, learning_rate=0.9, warmup=0.01, decay=0.01, old_domain_ceiling=0.01
    )
    trained = pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert trained.metrics["stopped_at_ceiling"] == 1
    assert trained.metrics["old_bits_per_byte_after"] - trained.metrics["old_bits_per_byte_before"] <= 0.01
    assert "above the ceiling of 0.01" in context.stream.getvalue()
    before, after = load_model(base.model).state_dict(), load_model(trained.model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trained.trained_tokens == 0


def test_at_the_ceiling_it_can_go_back_and_on_at_half_the_rate(base, corpus, tmp_path, context, monkeypatch):
    # Twice its loss on the old domain rises above the ceiling; told to leave in between, it ends with the same bytes.
    config = Pretrain(
        tokens=1600, batch_tokens=128, learning_rate=0.04, warmup=0.01, decay=0.01, evaluations=8, checkpoints=8,
        old_domain_ceiling=0.02, on_ceiling="adjust",
    )  # fmt: skip
    trained = pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "whole", context=context)
    rows = curve(tmp_path / "whole")
    halved = [int(row["step"]) for row in rows if "rate_halved" in row]
    assert trained.metrics["rate_halved"] == len(halved) >= 1
    assert trained.metrics["old_bits_per_byte_after"] - trained.metrics["old_bits_per_byte_before"] <= 0.02
    said = f"step {halved[0]} is above the old domain's ceiling: back to the weights of step {halved[0] - 1}, and on at"
    assert said in context.stream.getvalue()
    real = trainer.Watch.on_step_end

    def interrupted(self, args, state, *given, **named):
        if state.global_step == halved[0] + 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, args, state, *given, **named)

    monkeypatch.setattr(trainer.Watch, "on_step_end", interrupted)
    with pytest.raises(Terminated):
        pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "cut", context=context)
    monkeypatch.undo()
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "cut", context=context)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_the_ceiling_is_a_rise_over_the_start():
    start = {"old_bits_per_byte": 1.0}
    assert within_ceiling(start, {"old_bits_per_byte": 1.02}, ceiling=0.021)
    assert within_ceiling(start, {"old_bits_per_byte": 0.5}, ceiling=0.021)
    assert not within_ceiling(start, {"old_bits_per_byte": 1.03}, ceiling=0.021)
    assert not within_ceiling(start, {"old_bits_per_byte": float("nan")}, ceiling=0.021)


def test_a_ceiling_without_an_old_domain_is_refused(base, corpus, tmp_path, context):
    blind = corpus.model_copy(update={"held_out_old": 0})
    config = Pretrain(tokens=300, old_domain_ceiling=0.1)
    with pytest.raises(FmopsError, match="holds out no document of an old domain"):
        pretrain(config, checkpoint=base, corpus=blind, out=tmp_path / "out", context=context)


def test_auto_precision_is_measured_once_a_machine_and_then_kept(tmp_path, context, monkeypatch):
    from fmops.adapters import model_files

    monkeypatch.setenv("FMOPS_CACHE", str(tmp_path / "cache"))
    context.precision = "auto"
    seconds = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(model_files, "_gemm_seconds", lambda dtype: seconds[dtype])
    assert model_files.choose_precision(context, work=tmp_path) == torch.bfloat16
    note = json.loads(context.stream.getvalue())["text"]
    assert note == "training in bfloat16: bfloat16 multiplies 3.0× as fast as float32 here"
    # A busy moment must not change the arithmetic of a run under way, nor of the next one.
    seconds[torch.bfloat16] = 30.0
    assert model_files.choose_precision(context, work=tmp_path) == torch.bfloat16
    assert model_files.choose_precision(context, work=tmp_path / "next") == torch.bfloat16
    assert context.environment == {"precision": "bfloat16"}
    context.precision = "half"
    with pytest.raises(FmopsError, match="unknown precision 'half'"):
        model_files.choose_precision(context, work=tmp_path)


def test_bfloat16_trains_and_leaves_float32_weights(base, corpus, tmp_path, context):
    context.precision = "bfloat16"
    config = Pretrain(tokens=600, batch_tokens=128, learning_rate=1e-3, evaluations=1)
    trained = pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert {value.dtype for value in load_model(trained.model).state_dict().values()} == {torch.float32}
    assert json.loads((trained.model / "config.json").read_text())["dtype"] == "float32"
    assert trained.metrics["last_loss"] < trained.metrics["first_loss"]


def test_reports_are_json_lines_and_nothing_else_reaches_standard_output(base, corpus, tmp_path, context, capfd):
    config = Pretrain(tokens=300, batch_tokens=128, evaluations=1)
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert capfd.readouterr().out == ""
    events = [json.loads(line) for line in context.stream.getvalue().splitlines()]
    assert {event["event"] for event in events} >= {"metrics", "progress"}
    last = [event["shown"] for event in events if event["event"] == "progress"][-1]
    assert set(last) == {"tokens_per_s", "mfu", "loss", "new_bits_per_byte", "old_bits_per_byte"}
    assert 0 < last["mfu"] < 2
    assert 0 < context.cost["mfu"] < 2


def measured(monkeypatch, values: list[float]) -> None:
    """Held-out losses are these, one measurement after the other."""
    from fmops.adapters import transformers_pretrain

    given = iter(values)
    monkeypatch.setattr(
        transformers_pretrain, "held_out_losses", lambda *_, **__: lambda model: {"new_bits_per_byte": next(given)}
    )


def weights_after(tokens: int, base, corpus, out: Path, context) -> dict[str, torch.Tensor]:
    """Of a run that read the first `tokens` tokens of a longer one at a constant rate."""
    config = Pretrain(tokens=tokens, batch_tokens=128, warmup=1e-6, decay=1e-6)
    return load_model(pretrain(config, checkpoint=base, corpus=corpus, out=out, context=context).model).state_dict()


def test_the_best_weights_are_kept_and_training_stops_when_it_got_no_better(
    base, corpus, tmp_path, context, monkeypatch
):
    wanted = weights_after(256, base, corpus, tmp_path / "two", context)
    measured(monkeypatch, [3.0, 2.9, 2.5, 2.6, 2.5, 2.0])
    config = Pretrain(tokens=1024, batch_tokens=128, warmup=1e-6, decay=1e-6, evaluations=8, keep="best", patience=2)
    trained = pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert curve(tmp_path / "out")[-1]["step"] == 4
    assert trained.metrics["new_bits_per_byte_after"] == 2.5
    assert trained.trained_tokens < 256
    assert "stopped at step 4, it got no better: the weights of step 2 are kept" in context.stream.getvalue()
    found = load_model(trained.model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_best_weights_come_back_after_a_kill(base, corpus, tmp_path, context, monkeypatch):
    config = Pretrain(tokens=1024, batch_tokens=128, evaluations=8, checkpoints=8, keep="best")
    measured(monkeypatch, [3.0, 2.9, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1])
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "whole", context=context)
    measured(monkeypatch, [3.0, 2.9, 2.5, 2.6, 2.7])
    with pytest.raises(StopIteration):
        pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    measured(monkeypatch, [2.8, 2.9, 3.0, 3.1])
    pretrain(config, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_best_is_not_asked_for_where_nothing_is_held_out(base, corpus, tmp_path, context):
    config = Pretrain(tokens=300, batch_tokens=256, keep="best", metric="old_bits_per_byte")
    with pytest.raises(FmopsError, match=r"best by old_bits_per_byte.*no document of that domain"):
        pretrain(
            config,
            checkpoint=base,
            corpus=corpus.model_copy(update={"held_out_old": 0}),
            out=tmp_path / "out",
            context=context,
        )
