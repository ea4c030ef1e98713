"""LLaMA-Factory as a framework of instruction tuning: what it is told, what comes back, what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_inputs import a_checkpoint, some_conversations
from training_run import digests

from fmops.adapters.model_files import load_model
from fmops.errors import FmopsError, OutOfMemory, StageFailed, Terminated
from fmops.finetuning.instruct import instruct
from fmops.lifecycle import Instruct, Lifecycle
from fmops.stage import StageContext

real = pytest.mark.skipif(
    "FMOPS_LLAMAFACTORY" not in os.environ, reason="FMOPS_LLAMAFACTORY names no command: see finetuning/llama-factory"
)


def config(**given) -> Instruct:
    settings = {"framework": "llama-factory", "batch_tokens": 300, "block_tokens": 150, "learning_rate": 1e-3}
    return Instruct.model_validate({**settings, "epochs": 2, "checkpoints": 3, **given})


@pytest.fixture
def given(tiny_model, tmp_path):
    return {
        "checkpoint": a_checkpoint(tmp_path / "base", tiny_model),
        "conversations": some_conversations(tmp_path / "talk"),
        "out": tmp_path / "out",
    }


def settings(given) -> dict:
    return yaml.safe_load((given["out"] / ".work/llama-factory/train.yaml").read_text())


FAKE = """#!{python}
# Tunes as LLaMA-Factory does: reads its config and the tokens, logs each step, leaves weights and the trainer's state.
import json, os, sys, yaml
from pathlib import Path
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
job = yaml.safe_load(Path(sys.argv[2]).read_text())
assert sys.argv[1] == "train"
assert not any("SECRET" in name for name in os.environ), "a key of the user's came along"
rows = load_from_disk(job["tokenized_path"])
assert all(len(row["labels"]) == len(row["input_ids"]) and set(row["labels"]) - {{-100}} for row in rows)
{does}
step = job["per_device_train_batch_size"] * job["gradient_accumulation_steps"]
made = Path(job["output_dir"])
made.mkdir()
history = [{{"step": n + 1, "loss": 7.0 - n / 10}} for n in range(-(-len(rows) // step) - {missing})]
with (made / "trainer_log.jsonl").open("w") as log:
    for row in history:
        log.write(json.dumps({{"current_steps": row["step"], "loss": row["loss"]}}) + "\\n")
        log.flush()
        print(row, flush=True)
(made / "trainer_state.json").write_text(json.dumps({{"log_history": history}}))
source = load_file(job["model_name_or_path"] + "/model.safetensors")
save_file({{name: value * 1.01 for name, value in source.items()}}, made / "model.safetensors")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Stands for llamafactory-cli where that is not installed: same arguments, same files."""

    def make(does: str = "", *, missing: int = 0) -> None:
        path = tmp_path / "llamafactory-cli"
        path.write_text(FAKE.format(python=sys.executable, does=does, missing=missing))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("FMOPS_LLAMAFACTORY", str(path))
        monkeypatch.setenv("MY_SECRET", "hidden")

    return make


def test_without_its_environment_it_says_how_to_get_one(given, context, monkeypatch, tmp_path):
    monkeypatch.setenv("FMOPS_LLAMAFACTORY", str(tmp_path / "nowhere"))
    with pytest.raises(FmopsError, match=r"llamafactory is not here .*pip install llamafactory==.*export FMOPS_LLAMA"):
        instruct(config(), **given, context=context)


def test_the_best_weights_are_not_kept_by_it():
    spec = {
        "name": "mine", "base": "base", "data": {"conversations": {"source": "talk.jsonl"}},
        "instruct": {"framework": "llama-factory", "keep": "best"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="llama-factory has no keep best"):
        Lifecycle.model_validate(spec)


def test_its_weights_come_back_as_a_checkpoint(fake, given, context):
    fake()
    trained = instruct(config(adapter="full"), **given, context=context)
    before, after = load_model(given["checkpoint"].model).state_dict(), load_model(trained.model).state_dict()
    assert all(torch.equal(before[name] * 1.01, after[name]) for name in before)
    name = "tokenizer.json"
    assert (trained.model / name).read_bytes() == (given["checkpoint"].model / name).read_bytes()
    assert {"first_loss", "last_loss", "held_out_loss_before", "held_out_loss_after"} == set(trained.metrics)
    told = [json.loads(line) for line in context.stream.getvalue().splitlines()]
    assert [each["step"] for each in told if each["event"] == "metrics"][:3] == [0, 1, 2]


def test_the_spec_becomes_its_config(fake, given, context):
    fake()
    instruct(config(adapter="full"), **given, context=context)
    written = settings(given)
    assert (written["finetuning_type"], written["learning_rate"], written["cutoff_len"]) == ("full", 1e-3, 150)
    assert written["per_device_train_batch_size"] * written["gradient_accumulation_steps"] > 1
    assert "lora_rank" not in written


@pytest.mark.parametrize(
    ("does", "missing", "kind", "told"),
    [
        ('sys.exit("ValueError: Unknown key: rat")', 0, StageFailed, "code 1: ValueError: Unknown key.*its config:"),
        ('sys.exit("torch.OutOfMemoryError: CUDA out of memory")', 0, OutOfMemory, "tries smaller micro-batches"),
        ("", 1, StageFailed, "logged 5 of 6 steps"),
    ],
)  # fmt: skip
def test_how_it_ended_is_said(does, missing, kind, told, fake, given, context):
    fake(does, missing=missing)
    with pytest.raises(kind, match=told):
        instruct(config(adapter="full"), **given, context=context)


@real
@pytest.mark.slow
def test_its_own_parser_reads_the_config_and_refuses_another(fake, given, context):
    python = Path(os.environ["FMOPS_LLAMAFACTORY"]).with_name("python")
    fake('sys.exit("it was only to be written")')
    for adapter in ("lora", "full"):
        given["out"] = given["out"].with_name(adapter)
        with pytest.raises(StageFailed, match="only to be written"):
            instruct(config(adapter=adapter), **given, context=context)
    code = (
        "import sys, yaml\nfrom llamafactory.hparams import get_train_args\n"
        "for path in sys.argv[1:]:\n"
        "    given = yaml.safe_load(open(path))\n"
        "    model, data, training, tuning, _ = get_train_args(given)\n"
        "    assert training.max_grad_norm == 1.0 and tuning.finetuning_type in path\n"
        "    try:\n        get_train_args({**given, 'learning_rat': 1})\n"
        "    except ValueError as error:\n        print(tuning.finetuning_type, error)\n"
    )
    paths = [str(given["out"].with_name(name) / ".work/llama-factory/train.yaml") for name in ("lora", "full")]
    done = subprocess.run([python, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.count("learning_rat") == 2


class Leave(io.StringIO):
    """Tells this process to leave at a step, as a machine that is taken away does."""

    def write(self, text: str) -> int:
        if '"step": 4' in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


@real
@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_it_tunes_and_told_to_leave_it_ends_with_the_same_bytes(adapter, given, context):
    whole = given["out"].with_name("whole")
    trained = instruct(config(adapter=adapter), **{**given, "out": whole}, context=context)
    assert trained.metrics["held_out_loss_after"] < trained.metrics["held_out_loss_before"] - 0.1
    assert (whole / "adapter").exists() == (adapter == "lora")
    with pytest.raises(Terminated, match="Run again to go on"):
        instruct(config(adapter=adapter), **given, context=StageContext(stream=Leave()))
    instruct(config(adapter=adapter), **given, context=context)
    assert digests(given["out"]) == digests(whole)
