"""torchtitan as a framework of pretraining: what it is told, what comes back, what is refused before it starts."""

from __future__ import annotations

import json
import os
import stat
import sys

import pytest
import torch
from training_inputs import a_checkpoint, a_corpus
from training_run import digests

from fmops.adapters import titan_pretrain
from fmops.adapters.model_files import load_model
from fmops.adapters.packing import plan_training
from fmops.errors import FmopsError, OutOfMemory, StageFailed
from fmops.lifecycle import Lifecycle, Pretrain
from fmops.pretraining.pretrain import pretrain
from fmops.stage import StageContext

TOKENS = 2300
real = pytest.mark.skipif(
    "FMOPS_TORCHTITAN" not in os.environ, reason="FMOPS_TORCHTITAN names no torchrun: see pretraining/torchtitan"
)


def config(**given) -> Pretrain:
    settings = {"framework": "torchtitan", "tokens": TOKENS, "batch_tokens": 384, "learning_rate": 1e-3}
    return Pretrain.model_validate({**settings, "checkpoints": 3, **given})


def curve(out):
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


@pytest.fixture
def corpus(tiny_model, tmp_path):
    return a_corpus(tmp_path / "corpus", tiny_model)


@pytest.fixture
def base(tiny_model, tmp_path):
    return a_checkpoint(tmp_path / "base", tiny_model)


@pytest.fixture
def spec():
    data = {"corpora": {"docs": {"source": "docs/*.txt"}, "old": {"source": "old.jsonl", "role": "replay"}}}
    return {"name": "mine", "base": "base", "data": data, "pretrain": {"framework": "torchtitan", "tokens": 9}}


def test_another_framework_makes_another_model(base, corpus):
    assert config().model_dump() != Pretrain(**{**config().model_dump(), "framework": "transformers"}).model_dump()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tuning": "lora"}, "has no tuning lora"),
        ({"keep": "best"}, "has no keep best"),
        ({"on_ceiling": "adjust"}, "has no on_ceiling adjust. Drop it, or set framework to transformers"),
    ],
)
def test_what_needs_a_hand_on_each_step_is_refused_in_the_spec(given, told, spec):
    spec["pretrain"] |= given
    with pytest.raises(ValueError, match=told):
        Lifecycle.model_validate(spec)


def test_without_its_environment_it_says_how_to_get_one(base, corpus, tmp_path, context, monkeypatch):
    monkeypatch.delenv("FMOPS_TORCHTITAN", raising=False)
    with pytest.raises(
        FmopsError, match=r"torchtitan is not here\. .*torchtitan==.*export FMOPS_TORCHTITAN=.*torchrun"
    ):
        pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"model_type": "qwen2"},
            "given Llama shapes here; the base is 'qwen2'. Set pretrain.framework to transformers",
        ),
        ({"attention_bias": True}, "has no attention_bias, which the base has"),
        ({"head_dim": 64}, "has no head_dim 64"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "has no rope_type yarn"),
    ],
)
def test_a_shape_that_it_does_not_train_is_refused(changed, told, tiny_model, tmp_path):
    values = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changed))
    with pytest.raises(FmopsError, match=told):
        titan_pretrain.shape_of(tmp_path, context=128)


def test_long_contexts_keep_their_scaling(tiny_model, tmp_path):
    values = json.loads((tiny_model / "config.json").read_text())
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_parameters": scaled}))
    shape = titan_pretrain.shape_of(tmp_path, context=128)
    assert (shape["theta"], shape["scaling"]["scaling"], shape["scaling"]["scaling_factor"]) == (5e5, "llama", 8.0)


FAKE = """#!{python}
# Trains as torchtitan does: reads the job, reports each step, leaves weights and says how it ended.
import json, os, shutil, signal, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
path = Path(sys.argv[-1])
job = json.loads(path.read_text())
assert not any("SECRET" in name for name in os.environ), "a key of the user's came along"
(path.parent / "starts").open("a").write("x")
print(json.dumps({{"event": "step", "step": 1, "loss": 7.0}}), flush=True)
{does}
for step in range(2, job["training"]["steps"] + 1):
    print(json.dumps({{"event": "step", "step": step, "loss": 7.0 - step / 10}}), flush=True)
weights = {{name: value * {factor} for name, value in load_file(job["source"] + "/model.safetensors").items()}}
{last}
path.with_name("export").mkdir()
save_file(weights, path.with_name("export") / "model.safetensors")
print(json.dumps({{"event": "ended"}}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Stands for torchrun with torchtitan where that is not installed: same arguments, same files."""

    def make(does: str = "", last: str = "", *, factor: float = 1.01) -> None:
        path = tmp_path / "torchrun"
        path.write_text(FAKE.format(python=sys.executable, does=does, last=last, factor=factor))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("FMOPS_TORCHTITAN", str(path))
        monkeypatch.setenv("MY_SECRET", "hidden")

    return make


def test_its_weights_come_back_as_a_checkpoint(fake, base, corpus, tmp_path, context):
    fake()
    trained = pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    before, after = load_model(base.model).state_dict(), load_model(trained.model).state_dict()
    assert all(torch.equal(before[name] * 1.01, after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (trained.model / name).read_bytes() == (base.model / name).read_bytes()
    rows = curve(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["tokens"] == TOKENS
    assert {"new_bits_per_byte_before", "new_bits_per_byte_after", "old_bits_per_byte_after"} < set(trained.metrics)


def test_the_ceiling_is_judged_at_the_end(fake, base, corpus, tmp_path, context):
    fake(factor=3.0)
    held = config(old_domain_ceiling=0.01)
    trained = pretrain(held, checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    before, after = load_model(base.model).state_dict(), load_model(trained.model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (trained.metrics["stopped_at_ceiling"], trained.trained_tokens) == (1, 0)
    assert "the weights are those it began with" in context.stream.getvalue()


@pytest.mark.parametrize(
    ("does", "kind", "told"),
    [
        ('print(json.dumps({"event": "failed", "error": "out of memory: 9 GiB", "code": 5})); sys.exit(1)', OutOfMemory,
         "torchtitan is out of memory: 9 GiB.*smaller micro-batches"),
        ('print(json.dumps({"event": "failed", "error": "Loss is not finite.", "code": 1})); sys.exit(1)', StageFailed,
         "not finite.*lower pretrain.learning_rate"),
        ('print("no such kernel", file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)', StageFailed,
         "died 4 times, code -9: .*no such kernel"),
    ],
)  # fmt: skip
def test_how_it_ended_is_said(does, kind, told, fake, base, corpus, tmp_path, context):
    fake(does)
    with pytest.raises(kind, match=told):
        pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)


def test_killed_once_it_is_started_again(fake, base, corpus, tmp_path, context):
    fake('if (path.parent / "starts").read_text() == "x": os.kill(os.getpid(), signal.SIGKILL)')
    pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)
    assert "a process of torchtitan died" in context.stream.getvalue()
    assert len(curve(tmp_path / "out")) == len({row["step"] for row in curve(tmp_path / "out")})


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ('del weights["model.norm.weight"]', "lacks model.norm.weight"),
        ('weights["model.other"] = weights["model.norm.weight"].clone()', "also holds model.other"),
        ('weights["model.norm.weight"] *= float("nan")', "not finite"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(last, told, fake, base, corpus, tmp_path, context):
    fake(last=last)
    with pytest.raises(StageFailed, match=told):
        pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "out", context=context)


def test_less_memory_or_more_processes_leave_the_batch_as_it_is(base, corpus, tmp_path, context):
    def job(**given):
        told = StageContext(environment={"precision": "float32"}, **given)
        sizes = [128] * 8
        plan = plan_training(sizes, tokens=1024, batch_tokens=512, seed=0)
        path = titan_pretrain.write_job(
            config(), plan=plan, sizes=sizes, source=base.model, corpus=corpus, work=tmp_path, context=told
        )
        training = json.loads(path.read_text())["training"]
        return training["local_batch_size"], training["global_batch_size"]

    assert job() == (4, 4)
    assert job(micro_batch_parts=4) == (1, 4)
    assert job(processes=2) == (2, 4)
    assert job(processes=3) == (1, 6)


@real
@pytest.mark.slow
def test_it_reads_what_transformers_reads(base, corpus, tmp_path):
    """At a vanishing rate each step's loss is that of its tokens alone: same order, same batches, same attention."""
    runs = {}
    for framework, processes in (("transformers", 1), ("torchtitan", 1), ("torchtitan", 2)):
        out = tmp_path / f"{framework}-{processes}"
        out.mkdir()
        with open(os.devnull, "w") as silent:
            context = StageContext(seed=7, stream=silent, processes=processes)
            still = config(framework=framework, learning_rate=1e-12)
            pretrain(still, checkpoint=base, corpus=corpus, out=out, context=context)
        runs[framework, processes] = [row["loss"] for row in curve(out)[1:]]
    for each in runs.values():
        assert each == pytest.approx(runs["transformers", 1], abs=1e-5)


@real
@pytest.mark.slow
def test_killed_and_started_again_it_leaves_the_same_bytes(base, corpus, tmp_path, context, monkeypatch):
    pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "whole", context=context)
    monkeypatch.setenv("FMOPS_FAULT", "step:4")
    pretrain(config(), checkpoint=base, corpus=corpus, out=tmp_path / "killed", context=context)
    assert "a process of torchtitan died" in context.stream.getvalue()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    learnt = curve(tmp_path / "whole")
    assert learnt[-1]["new_bits_per_byte"] < learnt[0]["new_bits_per_byte"] - 0.1
