"""The arms of `benchmarks.training`: one way of training each.

Enters: an arm's name, a model folder or none. Leaves: CPU seconds, what was trained on, the last loss.
Refuses: nothing; an arm that cannot run here ends with its library's error.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES_A_STEP = 16
PAIRS_A_STEP = 8
"""What TRL's trainers take at a time by default."""
BLOCKS_A_STEP = 4
BLOCK = 1024
MEAN, SPREAD = 163, 0.8
"""Of chat samples, in tokens: mean, and the standard deviation of the length's logarithm."""
ANSWER = 48
"""Mean tokens of a preference pair's answer."""


@dataclass(frozen=True)
class Setting:
    """What every arm is given."""

    folder: Path
    work: Path
    steps: int
    vocabulary: int
    bf16: bool
    """Whether every arm multiplies in bfloat16, but for those that are named after what they multiply in."""

    @property
    def large(self) -> bool:
        """A real model: a step reads half as many blocks, or the peers would need more memory and a day."""
        return self.vocabulary > 10_000

    @property
    def blocks_a_step(self) -> int:
        return BLOCKS_A_STEP // 2 if self.large else BLOCKS_A_STEP

    def lengths(self, count: int, *, mean: float, seed: int) -> list[int]:
        """Log-normal lengths of at least 8 and at most `BLOCK` tokens."""
        drawn = np.random.default_rng(seed).lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD, count)
        return [int(length) for length in np.clip(drawn, 8, BLOCK)]

    def tokens(self, count: int, *, seed: int) -> list[int]:
        return [int(token) for token in np.random.default_rng(seed).integers(3, self.vocabulary, count)]

    def samples(self) -> list[tuple[list[int], int]]:
        """Token ids, and how many of them are the prompt's: half."""
        sizes = self.lengths(self.steps * SAMPLES_A_STEP, mean=MEAN, seed=0)
        return [(self.tokens(size, seed=index), size // 2) for index, size in enumerate(sizes)]

    def pairs(self) -> list[dict[str, list[int]]]:
        count = self.steps * PAIRS_A_STEP
        parts = zip(
            *(self.lengths(count, mean=mean, seed=i) for i, mean in enumerate((MEAN, ANSWER, ANSWER))), strict=True
        )
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [
            {
                name: self.tokens(size, seed=3 * index + i)
                for i, (name, size) in enumerate(zip(names, sizes, strict=True))
            }
            for index, sizes in enumerate(parts)
        ]

    def blocks(self) -> list[tuple[list[int], tuple[int, ...]]]:
        """Full blocks of documents, the last of each cut; and the documents' lengths."""
        sizes = iter(self.lengths(10_000, mean=MEAN, seed=5))
        found = []
        for index in range(self.steps * self.blocks_a_step):
            lengths: list[int] = []
            while sum(lengths) < BLOCK:
                lengths.append(min(next(sizes), BLOCK - sum(lengths)))
            found.append((self.tokens(BLOCK, seed=index), tuple(lengths)))
        return found


def set_up(model: Path | None, *, steps: int, work: Path, bf16: bool = False) -> Setting:
    """What the arms are given; `model` None is the small shape."""
    from transformers import AutoConfig

    from fmops.adapters.model_files import quiet

    quiet()
    folder = model or _small_shape(work / "small")
    return Setting(folder, work / "run", steps, AutoConfig.from_pretrained(folder).vocab_size, bf16)


def run_arm(name: str, setting: Setting) -> dict[str, Any]:
    """Train as the arm does. Returns CPU and wall seconds, peak memory, units of work, useful GFLOP, the last loss.

    The clock stands while weights are read from the disk, which every arm does alike.
    """
    make, work_of = ARMS[name]
    started, wall = time.process_time(), time.perf_counter()
    reading.clear()
    trainer = make(setting)
    trainer.train()
    cpu_s = time.process_time() - started - sum(cpu for cpu, _ in reading)
    wall_s = time.perf_counter() - wall - sum(seconds for _, seconds in reading)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "steps": trainer.state.global_step,
        "last_loss": losses[-1] if losses else math.nan,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **work_of(setting),
    }


def _small_shape(out: Path) -> Path:
    """A Llama of 4.7 million parameters, 2.1 of them the tied head, with the quickstart's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
    from tiny_model import write_tiny_model

    write_tiny_model(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def _arguments(setting: Setting, *, batch: int, accumulate: int = 1, **more: Any) -> dict[str, Any]:
    """What is equal for every arm."""
    return {
        "output_dir": str(setting.work),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": setting.bf16,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "seed": 0,
        **more,
    }


reading: list[tuple[float, float]] = []
"""CPU and wall seconds of each model that this process has read."""


def _model(setting: Setting, *, fast: bool) -> Any:
    from fmops.adapters.document_attention import attend_by_document
    from fmops.adapters.linear_loss import learn_without_logits
    from fmops.adapters.model_files import load_model

    started = time.process_time(), time.perf_counter()
    model = load_model(setting.folder)
    reading.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    if fast:
        attend_by_document(model, note=sys.exit)
        learn_without_logits(model, note=sys.exit)
    return model


def _taken_here() -> bool:
    """Whether our stages would train in bfloat16 on this machine, where nobody says otherwise."""
    from fmops.adapters.model_files import PRECISION_GAIN, bfloat16_gain

    return bfloat16_gain() >= PRECISION_GAIN


def _in_bf16(make: Callable[[Setting], Any], *, when: Callable[[], bool]) -> Callable[[Setting], Any]:
    """An arm that multiplies in bfloat16 or in float32 whatever the others do."""
    return lambda setting: make(replace(setting, bf16=when()))


def _sft(adapter: str) -> Callable[[Setting], Any]:
    """Instruction tuning as `fmops.adapters.trl_sft` sets it up."""

    def make(setting: Setting) -> Any:
        from datasets import Dataset
        from peft import get_peft_model
        from trl import SFTConfig

        from fmops.adapters.model_files import load_tokenizer, lora_config
        from fmops.adapters.packing import Block, collate, pack
        from fmops.adapters.trl_sft import SftTrainer

        pieces = [
            Block(np.asarray(ids, dtype=np.int32), (len(ids),), np.arange(len(ids)) >= prompt)
            for ids, prompt in setting.samples()
        ]
        blocks = pack(pieces, block_tokens=BLOCK)
        model = _model(setting, fast=True)
        if adapter != "full":
            config = lora_config(rank=16)
            if adapter == "peft":
                config._custom_modules = None
            model = get_peft_model(model, config)
        return _unwatched(SftTrainer)(
            model=model,
            args=SFTConfig(
                **_arguments(setting, batch=1, accumulate=math.ceil(len(blocks) / setting.steps)),
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_dict({"place": range(len(blocks))}),
            data_collator=lambda rows: collate([blocks[row["place"]] for row in rows]),
            processing_class=load_tokenizer(setting.folder),
        )

    return make


OWN_CHOICE = ("bf16", "gradient_checkpointing")
"""What TRL turns on by itself, and the arms that compare equal arithmetic turn off."""


def _as_shipped(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in OWN_CHOICE}


def _sft_trl(*, packing: bool, shipped: bool = False) -> Callable[[Setting], Any]:
    """TRL's SFTTrainer: padded batches of 8, or its best packing into rows of `BLOCK` tokens."""

    def make(setting: Setting) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from fmops.adapters.model_files import load_tokenizer

        samples = setting.samples()
        rows = {
            "input_ids": [ids for ids, _ in samples],
            "labels": [[-100] * prompt + ids[prompt:] for ids, prompt in samples],
        }
        batch, accumulate = 8, SAMPLES_A_STEP // 8
        if packing:
            packed = math.ceil(sum(len(ids) for ids, _ in samples) / BLOCK)
            batch, accumulate = math.ceil(packed / setting.steps), 1
        arguments = _arguments(setting, batch=batch, accumulate=accumulate)
        return SFTTrainer(
            model=_model(setting, fast=False),
            args=SFTConfig(
                **(_as_shipped(arguments) if shipped else arguments),
                max_length=BLOCK,
                packing=packing,
                packing_strategy="bfd",
            ),
            train_dataset=Dataset.from_dict(rows),
            processing_class=load_tokenizer(setting.folder),
        )

    return make


def _dpo(*, fast: bool, shipped: bool = False) -> Callable[[Setting], Any]:
    """Full tuning with the reference: ours beforehand with shared prompts, TRL's as it comes, beside the policy.

    `shipped` leaves TRL its own arithmetic.
    """

    def make(setting: Setting) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        from fmops.adapters.model_files import load_tokenizer
        from fmops.adapters.trl_dpo import DpoTrainer

        kind = _unwatched(DpoTrainer) if fast else type("Plain", (DPOTrainer,), {"_prepare_dataset": _as_it_is})
        model = _model(setting, fast=False)
        options: dict[str, Any] = {"ref_model": _model(setting, fast=False)}
        if fast:
            from fmops.adapters.document_attention import attend_by_document

            attend_by_document(model, note=sys.exit)
            options = {"note": sys.exit}
        arguments = _arguments(setting, batch=PAIRS_A_STEP)
        if shipped:
            arguments = _as_shipped(arguments)
        return kind(
            model=model,
            args=DPOConfig(**arguments, max_length=BLOCK, precompute_ref_log_probs=fast),
            train_dataset=Dataset.from_list(setting.pairs()),
            processing_class=load_tokenizer(setting.folder),
            **options,
        )

    return make


def _as_it_is(trainer: Any, dataset: Any, *_: Any, **__: Any) -> Any:
    """The pairs are tokens already; TRL would look for their text."""
    return dataset


def _cpt(how: str) -> Callable[[Setting], Any]:
    """Continued pretraining on equal blocks: ours; Trainer with documents apart; Trainer with documents leaking."""

    def make(setting: Setting) -> Any:
        import torch
        from transformers import Trainer, TrainingArguments

        from fmops.adapters.packing import Block, collate
        from fmops.adapters.transformers_pretrain import PretrainTrainer

        blocks = [Block(np.asarray(ids, dtype=np.int32), lengths) for ids, lengths in setting.blocks()]

        def stacked(rows: list[Block]) -> dict[str, Any]:
            batches = [collate([row]) for row in rows]
            kept = ["input_ids", "labels", *(["position_ids"] if how == "apart" else [])]
            return {name: torch.cat([batch[name] for batch in batches]) for name in kept} | {"use_cache": False}

        kind = _unwatched(PretrainTrainer) if how == "ours" else Trainer
        batch = 1 if how == "ours" else setting.blocks_a_step
        return kind(
            model=_model(setting, fast=how == "ours"),
            args=TrainingArguments(
                **_arguments(setting, batch=batch, accumulate=setting.blocks_a_step // batch),
                remove_unused_columns=False,
            ),
            train_dataset=blocks,
            data_collator=collate if how == "ours" else stacked,
        )

    return make


def _unwatched(kind: type) -> type:
    """Our trainer outside a stage: the same steps without the watch over them."""
    from fmops.adapters.guarded import Guarded

    def past_the_watch(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(super(Guarded, self), name)(*args, **kwargs)

    guards = [name for name, value in vars(Guarded).items() if callable(value) and not name.startswith("__")]
    return type("Unwatched", (kind,), {name: past_the_watch(name) for name in guards})


def sft_work(setting: Setting) -> dict[str, Any]:
    samples = setting.samples()
    read = sum(len(ids) for ids, _ in samples)
    learnt = sum(len(ids) - prompt for ids, prompt in samples)
    return {"units": read, "unit": "tokens", "useful_gflop": _gflop(setting, read=read, learnt=learnt)}


def _dpo_work(setting: Setting) -> dict[str, Any]:
    pairs = setting.pairs()
    learnt = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    read = learnt + sum(len(pair["prompt_ids"]) for pair in pairs)
    # Forward and backward of the policy, forward of the reference; the prompt once.
    return {"units": len(pairs), "unit": "pairs", "useful_gflop": _gflop(setting, read=read, learnt=learnt) * 4 / 3}


def _cpt_work(setting: Setting) -> dict[str, Any]:
    read = setting.steps * setting.blocks_a_step * BLOCK
    return {"units": read, "unit": "tokens", "useful_gflop": _gflop(setting, read=read, learnt=read)}


def _gflop(setting: Setting, *, read: int, learnt: int) -> float:
    """Six operations a weight and token of full tuning (Kaplan et al. 2020): body where read, head where learnt.

    Attention's own products are left out; for LoRA it is the work of full tuning, so its MFU may pass 1.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.folder)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.layers.parameters())
    return 6 * (body * read + head * learnt) / 1e9


ARMS: dict[str, tuple[Callable[[Setting], Any], Callable[[Setting], dict[str, Any]]]] = {
    "sft": (_sft("full"), sft_work),
    "sft_lora": (_sft("lora"), sft_work),
    "sft_lora_peft": (_sft("peft"), sft_work),
    "sft_bfloat16": (_in_bf16(_sft("full"), when=lambda: True), sft_work),
    "sft_shipped": (_in_bf16(_sft("full"), when=_taken_here), sft_work),
    "sft_trl_shipped": (_sft_trl(packing=False, shipped=True), sft_work),
    "sft_trl_padded": (_sft_trl(packing=False), sft_work),
    "sft_trl_packed": (_sft_trl(packing=True), sft_work),
    "dpo": (_dpo(fast=True), _dpo_work),
    "dpo_trl": (_dpo(fast=False), _dpo_work),
    "dpo_shipped": (_in_bf16(_dpo(fast=True), when=_taken_here), _dpo_work),
    "dpo_trl_shipped": (_dpo(fast=False, shipped=True), _dpo_work),
    "cpt": (_cpt("ours"), _cpt_work),
    "cpt_shipped": (_in_bf16(_cpt("ours"), when=_taken_here), _cpt_work),
    "cpt_trainer": (_cpt("apart"), _cpt_work),
    "cpt_trainer_leaking": (_cpt("leaking"), _cpt_work),
}
"""Name → what makes the trainer, and the work it does."""
