"""The spec as a graph of stages.

Enters: a `Lifecycle`. Leaves: nodes in the order they run, each with its config, its inputs and why it is there.
Refuses: suites, families and signals that there are none of; everything else in the spec has been validated before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fmops.artifacts import Frozen
from fmops.curve import COLUMNS
from fmops.errors import SpecMistake, unknown
from fmops.jobs import (
    BenchmarksJob,
    CorpusPart,
    CurateJob,
    EvaluateJob,
    ExampleJob,
    GateJob,
    ImportJob,
    ReleaseJob,
    origins,
)
from fmops.lifecycle import HELD_OUT_METRICS, ExampleSource, Lifecycle
from fmops.stage import STAGES, Stage

if TYPE_CHECKING:
    from fmops.evaluation.suites import Suite

Form = Literal["pairs", "votes", "prompts"]
FORMS: dict[str, Form] = {"dpo": "pairs", "orpo": "pairs", "kto": "votes", "grpo": "prompts"}
"""What each method of alignment reads."""
TO_COME = "to come"
"""Stands for the round's rotation until the sources are known."""


@dataclass(frozen=True)
class Node:
    """One stage with everything that it is given."""

    name: str
    stage: Stage
    config: Frozen
    artifacts: dict[str, str] = field(default_factory=dict)
    """Parameter → name of the node whose artifact it receives."""
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameter → URIs that are resolved to files before the stage runs."""
    rival: str | None = None
    """Node of a candidate. Its champion's checkpoint stands in for `checkpoint`, where there is a champion."""

    @property
    def after(self) -> tuple[str, ...]:
        """Nodes that come before this one."""
        return tuple(dict.fromkeys((*self.artifacts.values(), *((self.rival,) if self.rival else ()))))


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which each comes after its inputs."""

    spec: Lifecycle
    root: Path
    nodes: dict[str, Node]

    def downstream(self, name: str) -> list[str]:
        """Nodes that use the artifact of `name`, directly or through others, in order."""
        reached = {name}
        for node in self.nodes.values():
            if reached & set(node.after):
                reached.add(node.name)
        return [other for other in self.nodes if other in reached and other != name]


def build(spec: Lifecycle, root: Path) -> Graph:
    """Make the graph of a spec whose relative paths start at `root`.

    Raises:
        SpecMistake: a suite, family or signal that there is none of; with the key that names it.
    """
    _refuse_unknown_signals(spec)
    builder = _Builder(spec, root)
    builder.prepare()
    checkpoint, report = builder.train()
    builder.decide(checkpoint, report)
    return Graph(spec=spec, root=root, nodes=builder.nodes)


def _refuse_unknown_signals(spec: Lifecycle) -> None:
    if spec.rollout.margins:
        from fmops.deployment.rollout.evidence import SIGNALS

        _refuse_others(spec.rollout.margins, SIGNALS, what="signal", at=("rollout", "margins"))
    if spec.monitor.tolerances:
        from fmops.deployment.monitoring.watch import RATES

        _refuse_others(spec.monitor.tolerances, RATES, what="signal", at=("monitor", "tolerances"))


def _refuse_others(named: Iterable[str], choices: Iterable[str], *, what: str, at: tuple[str, ...]) -> None:
    known = set(choices)
    for name in named:
        if name not in known:
            raise SpecMistake((*at, name), str(unknown(f"{what} under {'.'.join(at)}", name, known)))


def watched(spec: Lifecycle, root: Path) -> dict[str, int]:
    """The suites that training scores, each with its items a task.

    Raises:
        SpecMistake: a suite that cannot be scored there, or a metric that is none of what is measured.
    """
    from fmops.evaluation.suites import load_suite

    items: dict[str, int] = {}
    held_out = {
        "pretrain": ("new_bits_per_byte", "old_bits_per_byte"),
        "instruct": ("held_out_loss",),
        "align": (HELD_OUT_METRICS[spec.align.method],) if spec.align else (),
    }
    for key, training in (("pretrain", spec.pretrain), ("instruct", spec.instruct), ("align", spec.align)):
        measured = {*held_out[key]}
        for name in training.suites if training else ():
            suite = load_suite(name, root=root, at=(key, "suites"))
            if why := _unwatchable(suite):
                raise SpecMistake((key, "suites", name), f"{key}.suites: the suite {suite.suite} {why}")
            measured.add(suite.suite)
            items[name] = max(items.get(name, 0), training.suite_items if training else 0)
        if training and training.metric is not None and training.metric not in measured:
            raise SpecMistake((key, "metric"), str(unknown(f"{key}.metric", training.metric, measured)))
    return items


def _unwatchable(suite: Suite) -> str | None:
    """Why training cannot score a suite, and the remedy."""
    if suite.suite in COLUMNS:
        return f"has the name of a column of the curve ({', '.join(COLUMNS)}). Rename it."
    if any(task.corpus for task in suite.tasks.values()):
        return "is made from held-out documents, whose loss is measured in any case. Drop it."
    if any(task.framework for task in suite.tasks.values()):
        return "is asked by an outside framework at an endpoint. Leave it to evaluate.suites."
    return None


class _Builder:
    """Adds nodes in the order of the lifecycle; a part that the spec lacks stays None and is passed to nobody."""

    def __init__(self, spec: Lifecycle, root: Path) -> None:
        self.spec, self.root = spec, root
        self.nodes: dict[str, Node] = {}
        self.benchmarks: str | None = None
        self.corpus: str | None = None
        self.conversations: str | None = None
        self.preferences: str | None = None
        self.base_report: str | None = None

    def add(
        self, name: str, stage: str, config: Frozen, sources: Mapping[str, tuple[str, ...]], **given: str | None
    ) -> str:
        artifacts = {parameter: node for parameter, node in given.items() if node}
        self.nodes[name] = Node(
            name=name, stage=STAGES[stage], config=config, artifacts=artifacts, sources=dict(sources)
        )
        return name

    def prepare(self) -> None:
        """Base model, benchmarks, corpus: what everything else stands on."""
        spec = self.spec
        self.add("base", "import", ImportJob(), {"source": (spec.base,)})
        self.benchmarks = self._items()
        if spec.data.corpora:
            tokens = spec.pretrain.tokens if spec.pretrain else None
            parts = {
                name: CorpusPart(role=item.role, weight=item.weight, text_field=item.text_field)
                for name, item in spec.data.corpora.items()
            }
            curate = CurateJob(curate=spec.curate, corpora=parts, tokens=tokens)
            sources = {f"corpus_{name}": item.source for name, item in spec.data.corpora.items()}
            self.corpus = self.add("corpus", "curate", curate, sources, base="base", benchmarks=self.benchmarks)
        self.base_report = self.evaluate("base", name="evaluate-base")

    def _items(self) -> str | None:
        """What the gate asks, and what training may watch."""
        from fmops.evaluation.suites import load_suite, packaged_texts, suite_sources

        spec, asked = self.spec, self.spec.evaluate
        if asked:
            suites = [load_suite(name, root=self.root) for name in asked.suites]
            families = {suite.family for suite in suites}
            # Found out by the gate itself, it would cost the whole training.
            for key, named in (("margins", spec.gate.margins), ("primary", spec.gate.primary)) if spec.gate else ():
                _refuse_others(named, families, what="family", at=("gate", key))
            tasks = {task for suite in suites for task in suite.tasks}
            _refuse_others(spec.gate.guards if spec.gate else (), tasks, what="task", at=("gate", "guards"))
        # With rotation all items are pinned, and kept out of the training data; a round asks some of them.
        limit = asked.limit if asked and not asked.rotate else None
        job = BenchmarksJob(suites=asked.suites if asked else (), limit=limit, watched=watched(spec, self.root))
        job = job.model_copy(update={"texts": packaged_texts(job.named)})
        pinned = {name: (uri,) for name, uri in suite_sources(job.named, root=self.root).items()}
        return self.add("benchmarks", "benchmarks", job, pinned) if job.named else None

    def evaluate(self, checkpoint: str, *, name: str) -> str | None:
        if not self.spec.evaluate:
            return None
        from fmops.evaluation.protocol import scorers_digest

        rotation = TO_COME if self.spec.evaluate.rotate else None
        job = EvaluateJob(limit=self.spec.evaluate.limit, rotation=rotation, scorers=scorers_digest())
        return self.add(
            name, "evaluate", job, {}, checkpoint=checkpoint, benchmarks=self.benchmarks, corpus=self.corpus
        )

    def train(self) -> tuple[str, str | None]:
        """Pretraining, instruction tuning, alignment; returns the last checkpoint and its report."""
        spec = self.spec
        checkpoint, report = "base", self.base_report
        if spec.pretrain:
            checkpoint = self.add(
                "pretrain", "pretrain", spec.pretrain, {}, checkpoint=checkpoint, corpus=self.corpus,
                benchmarks=self.benchmarks if spec.pretrain.suites else None,
            )  # fmt: skip
            report = self.evaluate(checkpoint, name="evaluate-pretrain")
        if spec.instruct and spec.data.conversations:
            self.conversations = self._examples(
                "conversations", spec.data.conversations, max_tokens=spec.instruct.block_tokens
            )
            checkpoint = self.add(
                "instruct", "instruct", spec.instruct, {}, checkpoint=checkpoint, conversations=self.conversations,
                corpus=self.corpus if spec.instruct.documents else None,
                benchmarks=self.benchmarks if spec.instruct.suites else None,
            )  # fmt: skip
        if spec.align and spec.data.preferences:
            form = FORMS[spec.align.method]
            self.preferences = self._examples(
                "preferences", spec.data.preferences, max_tokens=spec.align.max_tokens, form=form
            )
            files = tuple(sorted({name.rpartition(":")[0] for name in spec.align.reward}))
            sources = {"rewards": files} if files else {}
            checkpoint = self.add(
                "align", "align", spec.align, sources, checkpoint=checkpoint, preferences=self.preferences,
                benchmarks=self.benchmarks if spec.align.suites else None,
            )  # fmt: skip
        if checkpoint not in ("base", "pretrain"):
            report = self.evaluate(checkpoint, name="evaluate-candidate")
        return checkpoint, report

    def _examples(self, stage: str, source: ExampleSource, *, max_tokens: int, form: Form = "pairs") -> str:
        curate = self.spec.curate
        held_out = curate.held_out_examples or curate.held_out
        job = ExampleJob(
            redact=curate.redact, unreadable=curate.unreadable, held_out=held_out, max_tokens=max_tokens, form=form
        )
        return self.add(stage, stage, job, {"source": source.source}, base="base", benchmarks=self.benchmarks)

    def _earlier(self, stage: str, last: str) -> str | None:
        """The checkpoint of a stage before the last one, for the card's history."""
        return stage if stage in self.nodes and stage != last else None

    def decide(self, checkpoint: str, report: str | None) -> None:
        """The gate, when there is a candidate to judge, and the release."""
        gate = None
        if self.spec.gate and report != self.base_report:
            champion = self.evaluate("base", name="evaluate-champion")
            assert champion is not None
            self.nodes[champion] = replace(self.nodes[champion], rival=checkpoint)
            gate = self.add(
                "gate",
                "gate",
                GateJob.model_validate(self.spec.gate.model_dump()),
                {},
                champion=champion,
                challenger=report,
                corpus=self.corpus,
                conversations=self.conversations,
                preferences=self.preferences,
            )
        self.add(
            "release",
            "release",
            ReleaseJob(
                name=self.spec.name, engine=self.spec.serve.engine, base=self.spec.base, data=origins(self.spec)
            ),
            {},
            checkpoint=checkpoint,
            base="base",
            pretrained=self._earlier("pretrain", checkpoint),
            instructed=self._earlier("instruct", checkpoint),
            gate=gate,
            champion_report=self.base_report,
            challenger_report=report,
            corpus=self.corpus,
            conversations=self.conversations,
            preferences=self.preferences,
        )
