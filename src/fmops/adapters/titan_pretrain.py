"""Continued pretraining with torchtitan, for models and clusters beyond one Trainer.

Enters: a Llama-shaped model folder, packed blocks. Leaves: a model folder in Transformers' layout, its curve.
Refuses: other shapes, adapters, and what needs a measurement while torchtitan trains.

torchtitan runs in an environment of its own (`titan_run` is our part in there); only files pass between. Held-out
losses are measured before and after; a ceiling on the old domain's loss is judged once, at the end.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import fmops
from fmops.adapters.held_out import held_out_losses
from fmops.adapters.model_files import load_model, save_model, take_weights
from fmops.adapters.packing import Plan, PlannedBlocks, micro_batch, read_blocks
from fmops.adapters.schedule import FLOOR
from fmops.adapters.trainer import Keep, Trained
from fmops.adapters.training_faults import refuse_not_finite
from fmops.adapters.training_stage import begin, first_row, plan_blocks
from fmops.artifacts import Corpus
from fmops.errors import EXIT_MEMORY, FmopsError, OutOfMemory, StageFailed
from fmops.frameworks import executable, follow, installed_version, last_words, own_environment
from fmops.lifecycle import Pretrain
from fmops.stage import StageContext

WEIGHT_DECAY = 0.01
FOLDER = "torchtitan"
RESTARTS = 3
"""Times that its processes are started again after one was killed."""


def train(
    config: Pretrain, *, source: Path, corpus: Corpus, out: Path, keep: Keep | None, context: StageContext
) -> Trained:
    """Train the model in `source` on the corpus; write `out/model`. Killed, and called again, it goes on.

    Raises:
        FmopsError: torchtitan is not here, or the model is none that it trains.
        StageFailed: its processes ended early; OutOfMemory when a smaller micro-batch may fit.
    """
    command = executable("torchtitan")
    scratch, dtype = begin(context, out=out)
    work = scratch / FOLDER
    work.mkdir(exist_ok=True)
    context.environment["torchtitan"] = installed_version(command, "torchtitan")
    blocks = read_blocks(corpus.train_shards)
    sizes = blocks.sizes()
    plan = plan_blocks(config, sizes, seed=context.seed)
    job = write_job(config, plan=plan, sizes=sizes, source=source, corpus=corpus, work=work, context=context)
    model = load_model(source)
    measure = held_out_losses(corpus, source, dtype=dtype)
    start = first_row(measure, model, context)
    if not (work / "export" / "ended").is_file():
        _run(command, job, plan=plan, context=context)
    take_weights(model, work / "export", of="torchtitan")
    refuse_not_finite(model)
    curve = [start, *_curve(work / "curve.jsonl", plan)]
    curve[-1] |= measure(model)
    stopped = keep is not None and not keep(start, curve[-1])
    if stopped:
        model = load_model(source)
    save_model(model, out / "model", source=source)
    planned = PlannedBlocks(blocks, plan)
    return Trained(
        parameters=model.num_parameters(),
        trained_tokens=0 if stopped else sum(map(planned.learnt, range(len(planned)))),
        curve=curve,
        stopped=stopped,
        kept_step=None if keep is None else 0 if stopped else plan.steps,
    )


def write_job(
    config: Pretrain,
    *,
    plan: Plan,
    sizes: list[int],
    source: Path,
    corpus: Corpus,
    work: Path,
    context: StageContext,
) -> Path:
    """The spec, the plan and the model's shape in torchtitan's words, as JSON under `work`."""
    micro = max(1, micro_batch(plan, sizes, processes=context.processes) // context.micro_batch_parts)
    accumulate = ceil(ceil(plan.blocks_per_step / micro) / context.processes)
    whole = context.sharding == "ddp"
    job = {
        "source": str(source.resolve()),
        "shards": [str(shard.resolve()) for shard in corpus.train_shards],
        "shape": shape_of(source, context=max(sizes)),
        "plan": asdict(plan),
        "accumulate": accumulate,
        "learning_rate": config.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "schedule": {
            "warmup_steps": ceil(config.warmup * plan.steps),
            "decay_ratio": config.decay,
            "min_lr_factor": FLOOR,
        },
        "training": {
            "local_batch_size": micro,
            "global_batch_size": micro * accumulate * context.processes,
            "seq_len": max(sizes),
            "steps": plan.steps,
            "max_norm": 1.0,
            "mixed_precision_param": context.environment["precision"],
        },
        "parallelism": {
            # torchtitan's newer backend wants a torch after 2.13 as soon as there are two ranks.
            "spmd_backend": "partial_dtensor",
            "data_parallel_replicate_degree": context.processes if whole else 1,
            "data_parallel_shard_degree": 1 if whole else -1,
        },
        "save_every": max(1, plan.steps // (config.checkpoints + 1)),
        "seed": context.seed,
        "threads": context.threads,
    }
    path = work / "job.json"
    path.write_text(json.dumps(job))
    return path


def shape_of(source: Path, *, context: int) -> dict[str, Any]:
    """What torchtitan's Llama needs to know; `context` is the longest row.

    Raises:
        FmopsError: the model is no Llama, or has parts that torchtitan's Llama lacks.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    remedy = "Set pretrain.framework to transformers."
    if config.model_type != "llama":
        raise FmopsError(f"torchtitan is given Llama shapes here; the base is {config.model_type!r}. {remedy}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    odd = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        f"head_dim {head}": head * config.num_attention_heads != config.hidden_size,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
    }
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    odd[f"rope_type {kind}"] = kind not in ("default", "llama3")
    if any(odd.values()):
        has = ", ".join(name for name, found in odd.items() if found)
        raise FmopsError(f"torchtitan's Llama has no {has}, which the base has. {remedy}")
    scaling = {} if kind == "default" else {
        "scaling": "llama",
        "scaling_factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
    }  # fmt: skip
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "feed_forward": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head": head,
        "epsilon": config.rms_norm_eps,
        "theta": rope["rope_theta"],
        "scaling": scaling,
        "context": context,
        "tied": bool(config.tie_word_embeddings),
    }


def _run(command: str, job: Path, *, plan: Plan, context: StageContext) -> None:
    """Start torchtitan's ranks and follow them to their end."""
    work = job.parent
    shutil.rmtree(work / "export", ignore_errors=True)
    # In there only our package may be found beside torchtitan's, none of our libraries.
    ours = work / "code" / "fmops"
    ours.parent.mkdir(exist_ok=True)
    ours.unlink(missing_ok=True)
    ours.symlink_to(Path(fmops.__file__).parent.resolve(), target_is_directory=True)
    environment = own_environment(work, PYTHONPATH=str(ours.parent), OMP_NUM_THREADS=str(context.threads))
    started = context.clock()
    ends: dict[str, dict[str, Any]] = {}

    def take(line: str) -> None:
        event = json.loads(line)
        if event["event"] != "step":
            ends[event["event"]] = event
            return
        step = event["step"]
        row = {"step": step, "tokens": plan.tokens_after[step - 1], "loss": event["loss"]}
        with (work / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(row) + "\n")
        context.metrics(step, tokens=row["tokens"], loss=row["loss"])
        first = ends.setdefault("first", row)
        speed = (row["tokens"] - first["tokens"]) / max(1e-9, context.clock() - started)
        context.cost["tokens_per_s"] = speed
        context.progress(row["tokens"], plan.tokens, unit="tokens", tokens_per_s=speed, loss=row["loss"])

    log = work / "output.txt"
    ranks = ["--standalone", "--nproc-per-node", str(context.processes), "-m", "fmops.adapters.titan_run", str(job)]
    for attempt in range(RESTARTS + 1):
        code = follow([command, *ranks], folder=work, environment=environment, log=log, on_line=take)
        if "failed" in ends:
            raise _failed(ends["failed"], log)
        if "ended" in ends:
            break
        if attempt == RESTARTS:
            raise StageFailed(f"torchtitan's processes died {attempt + 1} times, code {code}: {last_words(log)}")
        context.note("a process of torchtitan died; all start again from its newest resume state")
        # What a test asked for has happened.
        environment.pop("FMOPS_FAULT", None)
    (work / "export" / "ended").touch()


def _failed(failure: dict[str, Any], log: Path) -> StageFailed:
    if failure["code"] == EXIT_MEMORY:
        return OutOfMemory(f"torchtitan is {failure['error']}. `fmops run` tries smaller micro-batches.")
    if "not finite" in failure["error"]:
        return StageFailed(
            f"torchtitan: {failure['error']} It sets no batch aside: lower pretrain.learning_rate, or train with "
            "framework transformers, which does."
        )
    return StageFailed(f"torchtitan: {failure['error']} All it said: {log}")


def _curve(path: Path, plan: Plan) -> list[dict[str, float]]:
    """A row a step, in order; of a step that was run again after a kill, the newest."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    missing = [step for step in range(1, plan.steps + 1) if step not in rows]
    if missing:
        raise StageFailed(f"torchtitan reported no step {missing[0]} of {plan.steps}. Remove {path.parent}, run again.")
    return [rows[step] for step in range(1, plan.steps + 1)]
