"""The nouns: what stages hand to each other, as frozen models over files.

Enters: a folder that a stage has filled. Leaves: a typed view of it, with paths to its parts.
Refuses: unknown fields, so that an old reader never half-understands a new artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value: immutable, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Frozen):
    """What a stage leaves in its folder. `path` is where it lies here and is no part of its identity."""

    kind: ClassVar[str]
    path: Path = Field(exclude=True)


class SourceFile(Frozen):
    """One verified local file of a source."""

    path: Path = Field(exclude=True, description="Where the file lies on this machine.")
    name: str = Field(description="Stable name inside the source; identity and lineage use it, never the path.")
    sha256: str
    bytes: int


class Source(Frozen):
    """An outside input, resolved to verified local files."""

    uri: str = Field(description="As the spec writes it.")
    files: tuple[SourceFile, ...] = Field(description="In name order.")


class Dropped(Frozen):
    """Documents that one curation step removed or changed."""

    step: str = Field(description="language, quality, exact-duplicate, near-duplicate, contaminated, unreadable, …")
    documents: int
    examples: tuple[str, ...] = Field(default=(), description="A few openings or reasons, redacted.")


class Corpus(Artifact):
    """Documents, curated, tokenised and packed.

    Files: `train/*.parquet` (columns `input_ids`: list<int32>, `lengths`: list<int32>, the token count of each
    document piece in the block, in order, summing to len(input_ids)); `held_out/new.jsonl` and `held_out/old.jsonl`
    (rows `id`, `text`, `source`); `documents.jsonl` (one row a kept document: `id`, `source`, `sha256`,
    `tokens`); `contaminated.jsonl` (rows `task`, `sample`: the benchmark items that the raw documents held).
    """

    kind: ClassVar[str] = "corpus"
    documents: int
    tokens: int = Field(description="Tokens in the training blocks.")
    blocks: int
    block_tokens: int = Field(description="Longest block, in tokens.")
    replay_share: float = Field(description="Share of the training tokens that come from replay corpora.")
    held_out_new: int = Field(description="Held-out documents of the train corpora.")
    held_out_old: int = Field(description="Held-out documents of the replay corpora; 0 means no old domain is known.")
    redactions: dict[str, int] = Field(default={}, description="Personal data replaced, by type.")
    dropped: tuple[Dropped, ...] = ()
    sources: dict[str, dict[str, float]] = Field(default={}, description="Per corpus: documents, tokens, weight.")

    @property
    def train_shards(self) -> list[Path]:
        """Shards in reading order. Resuming depends on this order."""
        return sorted((self.path / "train").glob("*.parquet"))


class Conversations(Artifact):
    """Dialogues for instruction tuning: `train.jsonl`, `held_out.jsonl` (rows `id`, `source`, `messages`),
    `contaminated.jsonl` as in a corpus."""

    kind: ClassVar[str] = "conversations"
    conversations: int
    held_out: int
    redactions: dict[str, int] = {}
    dropped: tuple[Dropped, ...] = ()


class Preferences(Artifact):
    """Examples for alignment: `train.jsonl`, `held_out.jsonl`, `contaminated.jsonl` as in a corpus.

    Rows: `id`, `source`, `prompt` (messages, the last one from the user), and by what the method reads: `chosen`,
    `rejected` (assistant text); or `completion`, `label` (whether it was liked); or `columns` (for the reward).
    """

    kind: ClassVar[str] = "preferences"
    pairs: int = Field(description="Training examples, whatever their form.")
    form: Literal["pairs", "votes", "prompts"] = "pairs"
    held_out: int
    redactions: dict[str, int] = {}
    dropped: tuple[Dropped, ...] = ()


class Benchmarks(Artifact):
    """The pinned evaluation items: `tasks.json` (lm-evaluation-harness task configs with suite and family),
    and `items/<task>.jsonl` (the documents of each task); the same for what is scored while a model trains, none of it
    among those: `watched.json` (tasks by suite as the spec names it), `watched/<task>.jsonl`. Curation decontaminates
    against all of them."""

    kind: ClassVar[str] = "benchmarks"
    items: dict[str, int] = Field(description="Items per task.")
    watched: dict[str, int] = Field(default={}, description="Items per task, scored while a model trains.")


class Checkpoint(Artifact):
    """Weights and tokenizer in `model/` (safetensors, Hugging Face layout), LoRA already merged.

    Beside it: `curve.jsonl` (one row a logged step: `step`, `tokens`, `loss`, and at evaluations
    `new_bits_per_byte`, `old_bits_per_byte`, watched suites by name), `adapter/` where LoRA was trained,
    `quarantine.jsonl` where steps were not applied (`step`, `why`, `item`, `blocks`).
    """

    kind: ClassVar[str] = "checkpoint"
    stage: Literal["base", "pretrain", "instruct", "align"]
    parameters: int
    trained_tokens: int = Field(description="Tokens this stage trained on (those that carry loss).")
    metrics: dict[str, float] = Field(default={}, description="First and last losses, bits per byte, tokens/s.")
    licence: str | None = Field(default=None, description="As the base model states it.")

    @property
    def model(self) -> Path:
        """The Hugging Face model folder."""
        return self.path / "model"


class Metric(Frozen):
    """A score over samples, with its clustered standard error."""

    suite: str
    task: str
    family: str
    name: str = Field(description="acc, bits_per_byte, refusal, …")
    value: float
    standard_error: float | None
    n: int
    higher_is_better: bool | None = Field(description="None: best at 0, as a bias score is.")


class EvalReport(Artifact):
    """Scores of one checkpoint: `samples.jsonl`, one row a sample and metric.

    Rows: `family`, `suite`, `task`, `sample` (id), `cluster`, `metric`, `score` (float, oriented as measured),
    `response` (text: what was generated, or the choice that was taken), `slack` (multiple choice: by how much each
    log-likelihood may move before another choice is taken), `counted` (false: no part of the metric's mean),
    `prompt_sha256`.
    """

    kind: ClassVar[str] = "evaluation"
    metrics: tuple[Metric, ...]
    fingerprint: str = Field(description="Of items, prompts, template, engine, dtype, batch mode and seed; no weights.")


class Judged(Frozen):
    """One round that the gate has judged: what it was allowed, what it found."""

    candidate: str = Field(description="What was judged: a digest of both measurements, 16 digits.")
    level: float = Field(description="The α that it could use.")
    p_value: float = Field(description="Of the whole gate: the largest over families, and the gain's.")
    promoted: bool


class FamilyResult(Frozen):
    """One family's paired comparison. Differences are oriented so that positive is better."""

    family: str
    n: int
    clusters: int
    difference: float = Field(description="Mean of challenger − champion.")
    standard_error: float
    lower: float = Field(description="Pessimistic end of the one-sided 1−α interval.")
    upper: float = Field(description="Optimistic end of the one-sided 1−α interval.")
    margin: float
    minimum_detectable: float
    verdict: Literal["non-inferior", "regressed", "undecided"]
    unit: str = ""
    p_value: float = Field(1.0, description="Of `worse by the margin or more`.")
    contaminated: int = Field(0, description="Items left out, since the training data held them.")
    raw_difference: float | None = Field(None, description="With those items; None when there are none.")
    fragile: int = Field(0, description="Items that the batch tolerance could turn; counted against the challenger.")


class GuardResult(Frozen):
    """One benchmark of a pooled family against its guard. Differences are oriented so that positive is better."""

    task: str
    family: str
    n: int
    clusters: int
    difference: float = Field(description="Mean of challenger − champion.")
    lower: float = Field(description="Pessimistic end of the interval.")
    upper: float = Field(description="Optimistic end; each end is missed with at most α over the number of guards.")
    guard: float = Field(description="The tolerated loss, in the family's unit.")
    unit: str = ""
    fallen: bool = Field(False, description="Whether even the optimistic end lies below −guard; that rejects.")


class GateDecision(Artifact):
    """Promote, reject, or need more data: `decision.json`."""

    kind: ClassVar[str] = "gate"
    verdict: Literal["promote", "reject", "need more data"]
    reasons: tuple[str, ...]
    alpha: float
    families: tuple[FamilyResult, ...]
    improved: tuple[str, ...] = Field(default=(), description="Primary families with a significant gain (Holm).")
    level: float | None = Field(None, description="α of this round; None when there was nothing to test.")
    p_value: float | None = None
    wealth: float | None = Field(None, description="α that later rounds may still spend, before they earn any.")
    rounds: tuple[Judged, ...] = Field(default=(), description="Every round that was tested, this one last.")
    guards: tuple[GuardResult, ...] = Field(default=(), description="Benchmarks that share a family with others.")


class Parity(Frozen):
    """Agreement of trainer and server on the probe prompts."""

    passed: bool
    prompts: int
    engine: str
    token_ids_equal: bool
    template_equal: bool
    greedy_equal: bool
    max_logprob_difference: float
    tolerance: float
    reasons: tuple[str, ...] = ()


class Release(Artifact):
    """What may be served: `model/` (safetensors, tokenizer, template), `MODEL_CARD.md`, `parity.json`, `data.json`."""

    kind: ClassVar[str] = "release"
    name: str
    parity: Parity
    licence: str | None
    verdict: str
    facts: dict[str, Any] = Field(default={}, description="What the card states: base, tokens, scores, data list.")

    @property
    def model(self) -> Path:
        """The Hugging Face model folder."""
        return self.path / "model"


class Alarm(Frozen):
    """Something in production is not as it was."""

    signal: str
    kind: Literal["harm", "shift"] = Field(description="`shift` is a change that hurts nobody yet.")
    at_s: float = Field(description="Unix time of the answer that raised it.")
    level: float = Field(description="Of the detector; it alarms at the threshold.")
    threshold: float = Field(description="Mean number of answers between two false alarms, at least.")
    answers: int = Field(description="Answers since the detector began.")
    reference: float | None = Field(None, description="The signal's rate while normal was measured.")
    now: float | None = Field(None, description="Its rate over the latest answers.")
    examples: tuple[str, ...] = Field(default=(), description="Traces that show it.")


class Diagnosis(Frozen):
    """What is most likely wrong, and which stage mends it."""

    cause: str
    stage: Literal["pretrain", "instruct", "align", "evaluate", "rollback", "alert", "none"]
    because: tuple[str, ...] = Field(description="Facts that led here.")
    confirm: str = Field(description="What would confirm it.")
    refute: str = Field(description="What would refute it.")
    examples: tuple[str, ...] = Field(default=(), description="Traces to look at.")
    also_possible: tuple[str, ...] = Field(default=(), description="Causes that the same facts allow.")
    beside: Diagnosis | None = Field(None, description="What else is wrong, by facts that this cause does not explain.")

    @property
    def every(self) -> tuple[Diagnosis, ...]:
        """This one, and what stands beside it."""
        return (self, *(self.beside.every if self.beside else ()))


class DriftReport(Artifact):
    """What monitoring knows about the release that serves: `report.json`."""

    kind: ClassVar[str] = "drift"
    release: str
    at_s: float
    answers: int
    rates: dict[str, tuple[int, int]] = Field(description="Signal → events, answers, since the reference.")
    reference: dict[str, tuple[int, int]] = Field(description="The same, while normal was measured.")
    levels: dict[str, float] = Field(description="Of each detector, as a share of its threshold.")
    pictures: dict[str, dict[str, float]] = Field(default={}, description="PSI and KS by measure: effect sizes only.")
    golden: float | None = Field(None, description="Share of the golden prompts answered as certified.")
    golden_error: str | None = Field(None, description="Why they could not be asked.")
    judge_error: str | None = Field(None, description="Why the judge could not be asked.")
    meaning_error: str | None = Field(None, description="Why prompts are not put into codes of their meaning.")
    alarms: tuple[Alarm, ...] = ()
    diagnosis: Diagnosis | None = None


KINDS: dict[str, type[Artifact]] = {
    kind.kind: kind
    for kind in (Corpus, Conversations, Preferences, Benchmarks, Checkpoint, EvalReport, GateDecision, Release)
}
