"""The spec: `lifecycle.yaml` as one typed model.

Enters: a YAML file or keyword arguments. Leaves: a frozen `Lifecycle`, or every mistake at once, with its line.
Refuses: unknown keys, wrong types, impossible combinations, duplicate keys, before anything runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fmops.artifacts import Frozen
from fmops.errors import FmopsError, SpecMistakes
from fmops.production import Loop, Monitor, Rollout, Serve, Share


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _said(value: Any) -> Any:
    if value is None:
        raise ValueError("there is nothing below it. Leave the key out to skip it, or write {} for its defaults")
    return value


Text = Annotated[str, Field(min_length=1)]
Uris = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=str | list[str]),
    Field(min_length=1, description="One URI or a list: hf://, s3:// (any fsspec URL), pypi://, a path or a glob."),
]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | list[str])]
Rate = Annotated[float, Field(gt=0, lt=1)]
Tuning = Literal["full", "lora"]
_REWARD = re.compile(r"(?!.*://).+\.py:[A-Za-z_]\w*")


def _as_weights(value: Any) -> Any:
    return {value: 1.0} if isinstance(value, str) else value


Rewards = Annotated[dict[str, float], BeforeValidator(_as_weights, json_schema_input_type=str | dict[str, float])]
Licence = Annotated[
    str | None, Field(description="Of the data, as its owner states it; the release's card and data list repeat it.")
]

FAMILIES = ("capability", "domain", "forgetting", "harm", "over-refusal", "bias")


class CorpusSource(Frozen):
    """Documents of one origin."""

    source: Uris
    role: Literal["train", "replay"] = Field(
        "train", description="`replay` is the old domain: mixed in against forgetting, and its loss is watched."
    )
    weight: Share | None = Field(
        None, description="Share of the training tokens. Left out: what the others leave, by size."
    )
    text_field: str = Field("text", description="The column or key that holds the text, in JSON Lines and Parquet.")
    licence: Licence = None


class ExampleSource(Frozen):
    """Conversations or preferences; the form (messages, alpaca, ShareGPT; pairs, votes, prompts) is recognised."""

    source: Uris
    licence: Licence = None


class Data(Frozen):
    """What the model learns from."""

    corpora: dict[str, CorpusSource] = Field(default={}, description="By name.")
    conversations: ExampleSource | None = None
    preferences: ExampleSource | None = None


class Curate(Frozen):
    """How documents are chosen. Every removal is counted, with examples, in the corpus artifact."""

    language: str | None = Field("en", description="ISO 639-1 code to keep; null keeps every language.")
    min_characters: int = Field(200, ge=1, description="Shorter documents are dropped.")
    quality: bool = Field(True, description="Drop documents that are mostly symbols, numbers or repeated lines.")
    near_duplicate: Share = Field(0.8, description="Estimated Jaccard similarity from which a document is a duplicate.")
    redact: bool = Field(True, description="Replace personal data and secrets before anything is written.")
    unreadable: Literal["skip", "stop"] = Field(
        "skip",
        description="Rows and files that cannot be read: left out and counted, or an error that names the first.",
    )
    held_out: Share = Field(0.1, description="Share of documents kept from training, up to 200 documents a domain.")
    held_out_examples: Share | None = Field(
        None, description="The same of conversations and preferences. Left out: `held_out`."
    )
    block_tokens: int = Field(1024, ge=64, description="Longest training sequence; documents never see each other.")


class Measured(Frozen):
    """What is measured while it trains, and which weights are kept."""

    suites: Names = Field((), description="Scored beside the held-out losses, on items that the gate never asks.")
    suite_items: int = Field(100, ge=2, description="Items a task of these suites, chosen by seed.")
    keep: Literal["last", "best"] = Field(
        "last", description="`best` keeps the weights of the measurement that is best in `metric`."
    )
    patience: int | None = Field(
        None, ge=1, description="With keep best: measurements in a row without a better one that end training."
    )


class Pretrain(Measured):
    """Continued pretraining."""

    framework: Literal["transformers", "torchtitan"] = "transformers"
    tokens: int = Field(ge=1, description="Tokens to train on; the one dial. Steps follow from it.")
    tuning: Tuning = Field("full", description="`full` moves every weight; `lora` an adapter, merged at the end.")
    learning_rate: Rate = Field(1e-4, description="Peak rate; warms up, stays, decays. The next round re-warms it.")
    warmup: Share = Field(0.1, description="Share of the steps that warm up.")
    decay: Share = Field(0.3, description="Share of the steps that decay to a tenth of the peak.")
    batch_tokens: int = Field(2048, ge=64, description="Tokens an optimizer step sees.")
    old_domain_ceiling: float | None = Field(
        None, gt=0, description="Bits per byte by which the old domain's loss may rise; no weights above it are kept."
    )
    on_ceiling: Literal["stop", "adjust"] = Field(
        "stop", description="`adjust` goes back below the ceiling and on at half the rate, three times at most."
    )
    evaluations: int = Field(4, ge=1, description="How often losses and suites are measured, the end included.")
    metric: str = Field("new_bits_per_byte", description="Or old_bits_per_byte, or the name of one of `suites`.")
    checkpoints: int = Field(4, ge=1, description="How often a resume state is written, spread evenly.")


class Instruct(Measured):
    """Instruction tuning: loss on the assistant's tokens only."""

    framework: Literal["trl", "llama-factory"] = "trl"
    method: Literal["sft"] = "sft"
    adapter: Tuning = Field("lora", description="`lora` trains an adapter and merges it; `full` moves every weight.")
    rank: int = Field(16, ge=1, description="LoRA rank; scale is twice the rank.")
    learning_rate: Rate | None = Field(None, description="Peak rate. Left out: 2e-4 for LoRA, 2e-5 for full.")
    epochs: float = Field(1.0, gt=0)
    documents: float = Field(
        0.0, ge=0, le=0.9, description="Share of documents in the tokens, so that what pretraining taught stays."
    )
    max_tokens: int | None = Field(None, ge=1, description="Stop after so many tokens, whatever the epochs say.")
    batch_tokens: int = Field(2048, ge=64, description="Tokens an optimizer step sees.")
    block_tokens: int = Field(1024, ge=64, description="Longest packed sequence; longer dialogues are refused.")
    evaluations: int = Field(1, ge=1, description="How often loss and suites are measured, the end included.")
    metric: str = Field("held_out_loss", description="Or the name of one of `suites`.")
    checkpoints: int = Field(2, ge=1, description="How often a resume state is written, spread evenly.")


HELD_OUT_METRICS = {
    "dpo": "preference_accuracy", "orpo": "preference_accuracy", "kto": "vote_accuracy", "grpo": "held_out_reward",
}  # fmt: skip
"""By method of alignment, what is measured of held-out examples; more is better."""


class Align(Measured):
    """Alignment to preferences (dpo, orpo), to votes on single answers (kto), or to rewards (grpo)."""

    framework: Literal["trl"] = "trl"
    method: Literal["dpo", "orpo", "kto", "grpo"] = Field(
        "dpo", description="dpo and orpo read pairs, kto votes (or pairs, taken apart), grpo prompts and a reward."
    )
    adapter: Tuning = Field("lora", description="`lora` trains an adapter and merges it; `full` moves every weight.")
    rank: int = Field(16, ge=1, description="LoRA rank; scale is twice the rank.")
    learning_rate: Rate | None = Field(None, description="Peak rate. Left out: the method's own (docs/finetuning.md).")
    beta: float | None = Field(
        None,
        ge=0,
        description="How strongly the policy is held to the reference; for orpo, the weight of the odds ratio. "
        "Left out: 0.1; for grpo 0, which needs no reference.",
    )
    reward: Rewards = Field(
        default={}, description="grpo: `rewards.py:function`, a file beside the spec; or several, each with its weight."
    )
    answers: int = Field(8, ge=2, description="grpo: answers sampled for a prompt; their mean reward is the baseline.")
    answer_tokens: int = Field(128, ge=1, description="grpo: longest answer that is sampled.")
    epochs: float = Field(1.0, gt=0)
    max_pairs: int | None = Field(None, ge=1, description="Most pairs (votes, prompts) to use, in seeded order.")
    batch_pairs: int = Field(8, ge=1, description="Pairs (votes, prompts) an optimizer step sees.")
    max_tokens: int = Field(512, ge=16, description="Longest prompt with answer, in tokens; longer ones are refused.")
    evaluations: int = Field(1, ge=1, description="How often held-out examples and suites are measured, end included.")
    metric: str | None = Field(
        None,
        description="Left out: preference_accuracy (dpo, orpo), vote_accuracy (kto), held_out_reward (grpo). Or the "
        "name of one of `suites`.",
    )
    checkpoints: int = Field(2, ge=1, description="How often a resume state is written, spread evenly.")

    @property
    def kept_by(self) -> str:
        """The measurement that `keep: best` goes by."""
        return self.metric or HELD_OUT_METRICS[self.method]

    @model_validator(mode="after")
    def _belongs_together(self) -> Align:
        if self.method == "grpo" and not self.reward:
            raise ValueError("grpo needs a reward: the name of a function, as in `reward: rewards.py:exact_answer`")
        if self.method != "grpo" and self.reward:
            raise ValueError(f"{self.method} learns from answers that people judged, not from a reward. Drop one")
        if self.method != "grpo" and self.beta == 0:
            raise ValueError(f"beta 0 leaves {self.method} nothing to learn. Leave it out, or raise it")
        if self.method == "kto" and self.batch_pairs % 2:
            raise ValueError(f"kto compares votes within a batch: batch_pairs {self.batch_pairs} must be even")
        return self

    @field_validator("reward")
    @classmethod
    def _local_functions(cls, rewards: dict[str, float]) -> dict[str, float]:
        for name in rewards:
            if not _REWARD.fullmatch(name):
                raise ValueError(
                    f"reward {name!r} is no `file.py:function` beside the spec. Rewards are code: they run from local "
                    "files only"
                )
        return rewards


class Judge(Frozen):
    """A model that compares answers of two models, for `fmops compare`; the gate does not read it."""

    endpoint: str = Field(description="URL up to /v1 of an OpenAI-compatible server.")
    model: str | None = Field(None, description="Its name there, where the server has several.")
    labels: str | None = Field(
        None, description="File of people's choices, as `fmops compare` writes it to be filled; they correct the judge."
    )


class Evaluate(Frozen):
    """What is measured, of the base, after pretraining and after finetuning."""

    suites: Names = Field(FAMILIES, min_length=1, description="Suite names, or paths to suite files.")
    limit: int | None = Field(None, ge=2, description="Items a task, chosen by seed; left out: all.")
    rotate: bool = Field(
        False, description="Each candidate is measured on items of its own, which nobody could know while training it."
    )
    judge: Judge | None = Field(None, description="Compares answers in words, in `fmops compare`.")

    @model_validator(mode="after")
    def _can_rotate(self) -> Evaluate:
        if self.rotate and self.limit is None:
            raise ValueError("rotate needs limit: without one every item is asked in every round. Give a limit")
        return self

    @field_validator("suites")
    @classmethod
    def _each_once(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in suites if suites.count(name) > 1})
        if twice:
            raise ValueError(f"suites named twice: {', '.join(twice)}. Name each once")
        return suites


class Gate(Frozen):
    """What may go on. The bad promotion is the type-I error (STATISTICS in the docs)."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    margins: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Tolerated loss by family, in the family's own unit. Left out: the suite's own margin."
    )
    guards: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Loss by task (benchmark), in its family's unit, past which the candidate is rejected whatever its "
        "family says. Left out: twice the family's margin.",
    )
    primary: Names = Field(
        ("domain",), description="Families of which at least one must improve; [] asks for no regression only."
    )


class Runtime(Frozen):
    """How it runs here. No part of any artifact's identity."""

    threads: int | None = Field(None, ge=1, description="Left out: every core this process may use.")
    processes: int = Field(
        1, ge=1, description="That share training or evaluation, each with `threads` threads and memory for a model."
    )
    launcher: Literal["torchrun", "ray"] = Field(
        "torchrun", description="Of processes that train together: on this machine, or on the cluster at RAY_ADDRESS."
    )
    sharding: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto", description="Of a model that several processes train: whole in each (ddp) or in shards; by its size."
    )
    dollars_per_hour: float = Field(0.0, ge=0, description="Price of this machine; `fmops plan` and the report use it.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of training arithmetic; `auto` measures once and takes bfloat16 where it is faster."
    )
    store: str | None = Field(
        None, pattern=r"^s3://.+", description="s3://bucket/prefix that machines share; --store comes first."
    )
    cache_gb: float | None = Field(
        None, ge=0, description="Of copies of what is in the store. Left out: half the disk."
    )


class Lifecycle(Frozen):
    """One foundation model's whole life. A stage that is left out is skipped."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Lower-case letters, digits, hyphens.")
    base: Text = Field(description="The model to start from: pypi://…gguf, hf://owner/name@revision, s3://…, a path.")
    seed: int = Field(0, ge=0)
    data: Data = Data()
    curate: Curate = Curate()
    pretrain: Annotated[Pretrain | None, BeforeValidator(_said)] = None
    instruct: Annotated[Instruct | None, BeforeValidator(_said)] = None
    align: Annotated[Align | None, BeforeValidator(_said)] = None
    evaluate: Annotated[Evaluate | None, BeforeValidator(_said)] = None
    gate: Annotated[Gate | None, BeforeValidator(_said)] = None
    serve: Serve = Serve()
    rollout: Rollout = Rollout()
    monitor: Monitor = Monitor()
    loop: Loop = Loop()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _possible(self) -> Lifecycle:
        from fmops.combinations import impossible

        mistakes = impossible(self)
        if mistakes:
            raise SpecMistakes(mistakes)
        return self


def read_lifecycle(path: Path) -> Lifecycle:
    """Read a spec file.

    Raises:
        FmopsError: names every mistake with its line, the nearest valid key and the remedy.
    """
    from fmops.yaml_lines import parse_yaml

    if path.is_dir():
        raise FmopsError(f"{path} is a folder. Name the spec in it with --spec, as in {path / 'lifecycle.yaml'}.")
    if not path.is_file():
        raise FmopsError(f"no spec at {path}. Write one with `fmops init`, or name another with --spec.")
    document = parse_yaml(path)
    try:
        return Lifecycle.model_validate(document.value)
    except ValidationError as error:
        raise document.refused(error, Lifecycle) from None
