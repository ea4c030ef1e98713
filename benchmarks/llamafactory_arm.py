"""LLaMA-Factory's arm of `benchmarks.training`, run by an interpreter that has it installed: its packages are not ours.

Enters: a JSON file (model folder, tokens of samples, steps), by its path. Leaves: one JSON line of figures.
Refuses: another number of steps than was asked for.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH = 8
"""As TRL's default, so that padding is the same."""

PEER_PYTHON = "LLAMAFACTORY_PYTHON"
"""Environment variable: the interpreter; without it the arm is absent."""
ARM = "sft_llamafactory"


def measure(job: dict[str, Any], *, work: Path, threads: int) -> dict[str, Any]:
    """Run this file by LLaMA-Factory's interpreter."""
    (work / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(threads)
    ended = subprocess.run(
        [os.environ[PEER_PYTHON], __file__, str(work / "job.json")],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    if found["steps"] != job["steps"]:
        raise SystemExit(f"LLaMA-Factory made {found['steps']} steps instead of {job['steps']}")
    return found


def main(job: Path) -> None:
    given = json.loads(job.read_text())
    from datasets import Dataset, DatasetDict

    # Imports are no part of the figure, as in every other arm.
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class Last(TrainerCallback):
        loss, steps = float("nan"), 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                Last.loss, Last.steps = float(logs["loss"]), state.global_step

    rows = {"input_ids": [ids for ids, _ in given["samples"]]}
    rows["labels"] = [[-100] * prompt + ids[prompt:] for ids, prompt in given["samples"]]
    rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
    for unused in ("images", "videos", "audios"):
        rows[unused] = [None] * len(rows["input_ids"])
    data = job.parent / "tokens"
    DatasetDict({"train": Dataset.from_dict(rows)}).save_to_disk(str(data))
    options = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": given["model"],
        "template": "default",
        # A name that it asks for and does not read: the tokens are there.
        "dataset": "tokens",
        "tokenized_path": str(data),
        "output_dir": str(job.parent / "out"),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": len(given["samples"]) // given["steps"] // BATCH,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "disable_gradient_checkpointing": True,
        "seed": 0,
    }
    started, wall = time.process_time(), time.perf_counter()
    # It saves the model at the end, which the others do not.
    saved = _without_saving()
    run_exp(options, callbacks=[Last()])
    found = {
        "cpu_s": time.process_time() - started - saved["cpu_s"],
        "wall_s": time.perf_counter() - wall - saved["wall_s"],
        "steps": Last.steps,
        "last_loss": Last.loss,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "versions": {name: importlib.metadata.version(name) for name in ("llamafactory", "torch", "transformers")},
    }
    print(json.dumps(found))


def _without_saving() -> dict[str, float]:
    """Seconds that saving takes, filled while it runs."""
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    spent = {"cpu_s": 0.0, "wall_s": 0.0}
    save = CustomSeq2SeqTrainer.save_model

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        started, wall = time.process_time(), time.perf_counter()
        save(self, *args, **kwargs)
        spent["cpu_s"] += time.process_time() - started
        spent["wall_s"] += time.perf_counter() - wall

    CustomSeq2SeqTrainer.save_model = timed
    return spent


if __name__ == "__main__":
    main(Path(sys.argv[1]))
