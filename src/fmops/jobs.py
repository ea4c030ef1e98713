"""What each stage is told beside its inputs: the identity part of the spec, cut to what that stage depends on.

Enters: a `Lifecycle`, by way of the graph. Leaves: frozen configs that go into fingerprints.
Refuses: anything a stage does not need; one key too many here re-runs work for nothing.
"""

from __future__ import annotations

from fmops.artifacts import Frozen
from fmops.lifecycle import CorpusSource, Curate


class ImportJob(Frozen):
    """The base model's source says everything."""


class BenchmarksJob(Frozen):
    """Which items the model is measured on."""

    suites: tuple[str, ...]
    limit: int | None = None


class CurateJob(Frozen):
    """How documents become training blocks. Sources arrive as inputs named `corpus_<name>`."""

    curate: Curate
    corpora: dict[str, CorpusSource]
    tokens: int | None = None
    """Training tokens that pretraining will consume; None packs everything once."""


class ExampleJob(Frozen):
    """How conversations and preferences are cleaned. The source arrives as the input `source`."""

    redact: bool = True
    held_out: float = 0.1
    max_tokens: int = 1024
    """Longer examples are dropped and counted."""


class EvaluateJob(Frozen):
    """How a checkpoint is measured on the benchmarks."""

    limit: int | None = None
    """Held-out documents a domain; the items of the benchmarks are chosen already."""


class ReleaseJob(Frozen):
    """What is released, and which engine must agree with the trainer."""

    name: str
    engine: str = "transformers"
