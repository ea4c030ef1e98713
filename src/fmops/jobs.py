"""What each stage is told beside its inputs: the identity part of the spec, cut to what that stage depends on.

Enters: a `Lifecycle`, by way of the graph. Leaves: frozen configs that go into fingerprints.
Refuses: anything a stage does not need; one key too many here re-runs work for nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmops.artifacts import Frozen, Judged
from fmops.lifecycle import CorpusSource, Curate, ExampleSource, Gate, Lifecycle


class ImportJob(Frozen):
    """The base model's source says everything."""


class BenchmarksJob(Frozen):
    """Which items the model is measured on."""

    suites: tuple[str, ...]
    limit: int | None = None
    watched: dict[str, int] = Field(
        default={}, description="Suites scored while a model trains, and their items a task: others than those above."
    )
    texts: dict[str, str] = Field(
        default={}, description="SHA-256 of each packaged suite's text: another version of FMOps may ask otherwise."
    )

    @property
    def named(self) -> tuple[str, ...]:
        """Every suite once; the n-th one's own file arrives as `suite_<n>`."""
        return tuple(dict.fromkeys((*self.suites, *self.watched)))


class CorpusPart(Frozen):
    """What one corpus is to the mixture. Where it lies and who owns it change nothing in it."""

    role: Literal["train", "replay"] = "train"
    weight: float | None = None
    text_field: str = "text"


class CurateJob(Frozen):
    """How documents become training blocks. Sources arrive as inputs named `corpus_<name>`."""

    curate: Curate
    corpora: dict[str, CorpusPart]
    tokens: int | None = None
    """Training tokens that pretraining will consume; None packs everything once."""


class ExampleJob(Frozen):
    """How conversations and preferences are cleaned. The source arrives as the input `source`."""

    redact: bool = True
    unreadable: Literal["skip", "stop"] = "skip"
    held_out: float = 0.1
    max_tokens: int = 1024
    """Longer examples are dropped and counted."""
    form: Literal["pairs", "votes", "prompts"] = "pairs"
    """What preferences are read as; the method of alignment decides."""


class EvaluateJob(Frozen):
    """How a checkpoint is measured on the benchmarks."""

    limit: int | None = None
    """Items a task and held-out documents a domain; without rotation the benchmarks hold no more items."""
    rotation: str | None = None
    """Chooses this round's items: a digest of all that the candidate is made from. None keeps them over rounds."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible endpoint that serves the model; it is asked instead of the weights."""
    served_model: str | None = None
    """The model's name there; None where the endpoint has one."""
    release: str | None = None
    """Key of the release that the endpoint must serve, where it says which; None when the model is no release."""
    scorers: str = ""
    """Digest of our own scorers' rules: another version of FMOps may score otherwise, and then measures again."""


class GateJob(Gate):
    """The gate's policy, and the rounds that were tested before. They decide how much α is left."""

    earlier: tuple[Judged, ...] = ()


class Origin(Frozen):
    """Where something came from, in the spec's words."""

    source: tuple[str, ...]
    licence: str | None = None


class ReleaseJob(Frozen):
    """What is released, which engine must agree with the trainer, and where everything came from."""

    name: str
    engine: str = "auto"
    base: str | None = Field(None, description="The base model's URI.")
    data: dict[str, Origin] = Field(
        default={}, description="By the key under `data`: `corpora.<name>`, `conversations`, `preferences`."
    )


def origins(spec: Lifecycle) -> dict[str, Origin]:
    """Where the data of a spec comes from."""
    named: dict[str, CorpusSource | ExampleSource | None] = {
        **{f"corpora.{name}": corpus for name, corpus in spec.data.corpora.items()},
        "conversations": spec.data.conversations,
        "preferences": spec.data.preferences,
    }
    return {key: Origin(source=item.source, licence=item.licence) for key, item in named.items() if item}
