"""`fmops evaluate`: the spec's suites on any model.

Enters: a project and an alias, an artifact, or the source of a model. Leaves: an evaluation in the workspace, a table.
Refuses: a spec without suites, and what is no model.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

from fmops.errors import FmopsError
from fmops.evaluation.suites import is_path, load_suite
from fmops.jobs import EvaluateJob, ImportJob
from fmops.lifecycle import Data, Evaluate
from fmops.locks import locked
from fmops.orchestration.events import View
from fmops.orchestration.execute import execute
from fmops.orchestration.graph import Graph, Node, build
from fmops.orchestration.launch import pinned_threads
from fmops.orchestration.project import Project
from fmops.orchestration.show import table
from fmops.orchestration.summary import summarise
from fmops.stage import STAGES
from fmops.store import Record

SUBJECT = "subject"
SERVED = "-served"
"""Ends the name of a measurement by an endpoint; it compares with others of its kind."""


def evaluate(
    project: Project, model: str, view: View, *, endpoint: str | None = None, served: str | None = None,
    suites: tuple[str, ...] = (),
) -> Record:  # fmt: skip
    """Measure a model as the spec's own checkpoints are measured, so that both can be compared.

    Args:
        endpoint: URL of an OpenAI-compatible endpoint that serves the model; it is asked instead of the weights.
        served: the model's name there.
        suites: names, or paths from the working directory, in place of the spec's.

    Raises:
        FmopsError: there are no suites, or `model` is neither known here nor the source of a model.
    """
    if suites:
        project = _measured_by(project, suites)
    if "evaluate-base" not in project.graph.nodes:
        raise FmopsError(f"{project.spec_path.name} has no `evaluate`: add it, with suites, to say what is measured.")
    source, release = _source(project, model)
    asked = {"endpoint": endpoint, "served_model": served, "release": release} if endpoint else {}
    project = replace(project, graph=_with_subject(project, source, asked))
    # The stages import what reads these, and report their own progress.
    os.environ.update(pinned_threads(project.threads), TQDM_DISABLE="1")
    with locked(project.store.root / "lock"):
        for name in project.graph.nodes:
            planned = project.planner(lambda text: view.show("sources", {"event": "note", "text": text})).plan()[name]
            if planned.record:
                view.show(name, {"event": "cached"})
                record = planned.record
                continue
            view.show(name, {"event": "started"})
            record = execute(project, name, fingerprint=None, stream=_Forward(view, name))
            view.show(name, {"event": "finished", "cost": record.cost, "summary": summarise(record)})
    return record


def _measured_by(project: Project, suites: tuple[str, ...]) -> Project:
    """The project with other suites and no gate; its corpora stay where a suite is made from them."""
    root = project.graph.root
    named = tuple(os.path.relpath(Path.cwd() / suite, root) if is_path(suite) else suite for suite in suites)
    tasks = [task for suite in named for task in load_suite(suite, root=root).tasks.values()]
    stated = project.spec.evaluate or Evaluate()
    changes: dict[str, object] = {"evaluate": stated.model_copy(update={"suites": named}), "gate": None}
    if not any(task.corpus for task in tasks):
        changes["data"] = Data()
    spec = project.spec.model_copy(update=changes)
    return replace(project, spec=spec, graph=build(spec, root))


def _source(project: Project, model: str) -> tuple[str, str | None]:
    """The URI of the model's folder, and the key when it is a release."""
    store = project.store
    key = store.aliases().get(model, model)
    known = [record for record in store.records() if record.key.startswith(key) or record.node == key]
    for record in reversed(known):
        if record.kind in ("checkpoint", "release"):
            return str(store.files(record) / "model"), record.key if record.kind == "release" else None
    if known:
        raise FmopsError(
            f"{known[-1].key} is a {known[-1].kind}. Only a checkpoint, a release or a model is evaluated."
        )
    if "://" in model or (project.graph.root / model).exists():
        return model, None
    if os.path.exists(model):  # noqa: PTH110  a path from where the command was given
        return os.path.abspath(model), None  # noqa: PTH100
    names = ", ".join(sorted({*store.aliases(), *(r.key for r in store.records() if r.kind == "checkpoint")}))
    known_there = f"Known there: {names}." if names else "Nothing is yet: `fmops run` makes models."
    raise FmopsError(f"no model {model!r}: no such folder, and not known in {store.place}. {known_there}")


def _with_subject(project: Project, source: str, asked: dict[str, str | None]) -> Graph:
    """The part of the graph that an evaluation needs, with the model in the place of the base."""
    nodes = project.graph.nodes
    pattern = nodes["evaluate-base"]
    wanted = {name for parameter, name in pattern.artifacts.items() if parameter != "checkpoint"}
    for name in reversed(nodes):
        if name in wanted:
            wanted |= set(nodes[name].artifacts.values())
    label = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[-32:]
    subject = Node(name=SUBJECT, stage=STAGES["import"], config=ImportJob(), sources={"source": (source,)})
    assert isinstance(pattern.config, EvaluateJob)
    job = pattern.config.model_copy(update=asked)
    label += SERVED if asked else ""
    measured = replace(
        pattern, config=job, name=f"evaluate-{label}", artifacts={**pattern.artifacts, "checkpoint": SUBJECT}
    )
    kept = {name: node for name, node in nodes.items() if name in wanted}
    # The subject first: what is no model is refused before anything is made for it.
    return replace(project.graph, nodes={SUBJECT: subject, **kept, measured.name: measured})


class _Forward(StringIO):
    """The stage's reports, shown as those of a stage process are."""

    def __init__(self, view: View, node: str) -> None:
        super().__init__()
        self._view, self._node = view, node

    def write(self, text: str, /) -> int:
        for line in text.splitlines():
            if line.strip():
                self._view.show(self._node, json.loads(line))
        return len(text)


def render_evaluation(record: Record) -> str:
    """Every metric with its standard error and n."""
    rows = [
        (metric["family"], metric["task"], metric["name"], f"{metric['value']:.4f}",
         "" if metric["standard_error"] is None else f"± {metric['standard_error']:.4f}", str(metric["n"]),
         {True: "higher", False: "lower", None: "at 0"}[metric["higher_is_better"]])
        for metric in record.artifact["metrics"]
    ]  # fmt: skip
    head = ("family", "task", "metric", "value", "error", "n", "better")
    if record.node.endswith(SERVED):
        hint = f"`fmops compare OTHER {record.key}` lays it beside the evaluation of another served model"
    else:
        hint = f"`fmops compare evaluate-base {record.key}` lays it beside the base"
    return f"{table(head, rows)}\n{record.key}: {hint}"
