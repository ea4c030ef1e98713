"""Benchmark suites scored on a model while it trains.

Enters: the watched items of a benchmarks artifact, the model as it is. Leaves: a score a suite, for the curve.
Refuses: to disturb training: weights, mode, attention and random generators are as they were found.

The scorer is that of evaluation, in float32. Every process of a training scores all items, so all decide alike.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fmops.adapters.guarded import generators, set_generators
from fmops.adapters.lm_eval import check_fit, run_task
from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.adapters.model_files import evaluating
from fmops.adapters.sharding import is_sharded
from fmops.adapters.trainer import Watch
from fmops.artifacts import Benchmarks
from fmops.evaluation.items import choose, most
from fmops.evaluation.journal import Journal
from fmops.evaluation.protocol import PinnedTask
from fmops.integrity import read_lines
from fmops.lifecycle import Measured
from fmops.stage import StageContext

Tasks = list[tuple[PinnedTask, list[dict[str, Any]]]]


class TrainingLM(SharedPrefixLM):
    """The scorer over a model that somebody else trains."""

    def __init__(self, folder: Path, model: Any, *, threads: int) -> None:
        self._trained = model
        super().__init__(folder, threads=threads)

    def _load(self, folder: Path) -> Any:
        return self._trained


def with_suites(watch: Watch, config: Measured, benchmarks: Benchmarks, *, source: Path, context: StageContext) -> None:
    """`watch` also scores the suites that `config` names, and knows what is better in `watch.best` if it is one.

    A suite's score is the mean of its tasks' first metrics over all of its items here.
    """
    tasks = read_watched(config, benchmarks, seed=context.seed)
    of_best = [task.higher_is_better for task, _ in tasks if task.suite == watch.best]
    if of_best:
        watch.better = operator.gt if any(of_best) else operator.lt
    losses = watch.evaluate
    lm: TrainingLM | None = None

    def measure(model: Any) -> dict[str, float]:
        nonlocal lm
        bare = _bare(model)
        with _undisturbed(model, bare):
            if lm is None:
                lm = TrainingLM(source, bare, threads=context.threads)
                for task, documents in tasks:
                    check_fit(lm, task, documents)
            # What was scored before was scored with other weights.
            lm.model, lm.journal = bare, Journal()
            scores = suite_scores(lm, tasks)
        return losses(model) | scores

    watch.evaluate = measure


def read_watched(config: Measured, benchmarks: Benchmarks, *, seed: int) -> Tasks:
    """The watched tasks of the suites that `config` names, with `config.suite_items` items each."""
    by_suite = json.loads((benchmarks.path / "watched.json").read_text(encoding="utf-8"))
    tasks: Tasks = []
    for entry in (entry for name in config.suites for entry in by_suite[name]):
        task = PinnedTask.model_validate(entry)
        documents = read_lines(benchmarks.path / "watched" / f"{task.task}.jsonl")
        tasks.append((task, choose(documents, most(task.share, config.suite_items), seed=seed, name=task.task)))
    return tasks


def suite_scores(lm: SharedPrefixLM, tasks: Tasks) -> dict[str, float]:
    """The mean of each suite's items."""
    scores: dict[str, list[float]] = {}
    for task, documents in tasks:
        rows = run_task(lm, task, documents, chat=task.chat and lm.templated)
        scores.setdefault(task.suite, []).extend(row["score"] for row in rows if row["metric"] == task.metrics[0])
    return {suite: fmean(values) for suite, values in scores.items()}


@contextmanager
def _undisturbed(model: Any, bare: Any) -> Iterator[None]:
    """Evaluation in float32 on the model's own device; afterwards everything is as it was."""
    drawn, attention = generators(), bare.config._attn_implementation
    try:
        with evaluating(model, dtype=torch.float32) as device, device:
            if is_sharded(model):
                # The whole has to be entered once before a part of it, and not in inference mode: what is gathered for
                # the first time there can never be trained in.
                model(input_ids=torch.tensor([[0, 0]]), use_cache=False)
                model.unshard()
            yield
    finally:
        bare.set_attn_implementation(attention)
        set_generators(drawn)


def _bare(model: Any) -> Any:
    """The causal language model within what a trainer wrapped round it."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
