"""What would run, and why.

Enters: a graph, the store, resolved sources. Leaves: for each node its fingerprint and state, with the reason.
Refuses: nothing; it changes nothing but for setting damaged artifacts aside when asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from fmops.artifacts import Judged, Source
from fmops.jobs import EvaluateJob, GateJob
from fmops.orchestration.graph import Graph, Node
from fmops.store import InputRef, Record, Store, fingerprint_of, source_digest

State = Literal["cached", "run", "waiting", "blocked"]


@dataclass(frozen=True)
class Step:
    """One node's part in a plan."""

    node: Node
    state: State
    """`cached`: nothing to do. `run`: its inputs are there. `waiting`: an input must be made first. `blocked`: by the
    gate, or by a stage that is."""
    reason: str
    fingerprint: str | None = None
    """None while an input is still to be made."""
    inputs: dict[str, InputRef] | None = None
    record: Record | None = None


_JUDGING = ("benchmarks", "evaluation", "gate", "release")
"""Kinds of artifact that do not decide what the candidate is."""
Sources = Mapping[tuple[str, ...], Source]


class Planner:
    """Answers for one node at a time, so that a run can go on where content turned out equal."""

    def __init__(self, graph: Graph, store: Store, sources: Sources) -> None:
        self.graph, self.store, self.sources = graph, store, sources
        # The reason for a re-run is told against the newest record of the same node.
        self.newest: dict[str, Record] = {record.node: record for record in store.records()}

    def plan(self, *, on_damage: Callable[[Record, str], None] | None = None) -> dict[str, Step]:
        """Every node's step. A damaged artifact counts as missing and is reported to `on_damage`."""
        steps: dict[str, Step] = {}
        for node in self.graph.nodes.values():
            steps[node.name] = self.step(node, steps, on_damage=on_damage)
        return steps

    def step(
        self, node: Node, before: Mapping[str, Step], *, on_damage: Callable[[Record, str], None] | None = None
    ) -> Step:
        """One node's step, given those of its inputs."""
        blocked = [name for name in node.after if _blocks(before[name])]
        if blocked:
            return Step(node=node, state="blocked", reason=f"by {blocked[0]}")
        open_inputs = [name for name in node.after if before[name].record is None]
        if open_inputs:
            return Step(node=node, state="waiting", reason=f"after {', '.join(open_inputs)}")
        inputs = self._inputs(node, before)
        node = self._of_this_round(node, inputs)
        fingerprint = fingerprint_of(
            stage=node.stage.name,
            version=node.stage.version,
            seed=self.graph.spec.seed,
            config=node.config.model_dump(mode="json"),
            inputs={name: ref.digest for name, ref in inputs.items()},
        )
        record = self.store.find(node.stage.name, fingerprint)
        fault = self.store.intact(record) if record else None
        if record and fault:
            if on_damage:
                on_damage(record, fault)
            return Step(node=node, state="run", reason=f"damaged: {fault}", fingerprint=fingerprint, inputs=inputs)
        if record:
            return Step(
                node=node, state="cached", reason="unchanged", fingerprint=fingerprint, inputs=inputs, record=record
            )
        reason = self._why(node, inputs)
        return Step(node=node, state="run", reason=reason, fingerprint=fingerprint, inputs=inputs)

    def _inputs(self, node: Node, before: Mapping[str, Step]) -> dict[str, InputRef]:
        inputs = {}
        for parameter, name in node.artifacts.items():
            record = before[name].record
            assert record is not None
            inputs[parameter] = InputRef(kind="artifact", ref=record.key, digest=record.digest)
        for parameter, uris in node.sources.items():
            source = self.sources[uris]
            inputs[parameter] = InputRef(kind="source", ref=" ".join(uris), digest=source_digest(source))
        if node.rival:
            candidate = before[node.rival].record
            champion = self._champion_against(candidate.key) if candidate else None
            if champion:
                inputs["checkpoint"] = InputRef(kind="artifact", ref=champion.key, digest=champion.digest)
        return inputs

    def _champion_against(self, candidate: str) -> Record | None:
        """The checkpoint that a candidate has to beat: the champion's, or None before the first release.

        A candidate that is the champion by now goes on being compared with the one it beat, so that a second run finds
        its own decision.
        """
        champion = self._known(self.store.aliases().get("champion"))
        if champion is None:
            return None
        if champion.inputs["checkpoint"].ref != candidate:
            return self._known(champion.inputs["checkpoint"].ref)
        gate = self._input(champion, "gate")
        report = self._input(gate, "champion") if gate else None
        return self._input(report, "checkpoint") if report else None

    def _input(self, record: Record, name: str) -> Record | None:
        return self._known(record.inputs[name].ref) if name in record.inputs else None

    def _known(self, key: str | None) -> Record | None:
        return self.store.remembered(key) if key else None

    def _of_this_round(self, node: Node, inputs: Mapping[str, InputRef]) -> Node:
        """A node with what only the workspace knows: which items a rotating round asks, what the gate has tested."""
        if isinstance(node.config, EvaluateJob) and node.config.rotation is not None:
            return replace(node, config=node.config.model_copy(update={"rotation": self._candidate}))
        if isinstance(node.config, GateJob):
            return replace(node, config=node.config.model_copy(update={"earlier": self._tested(node, inputs)}))
        return node

    @cached_property
    def _candidate(self) -> str:
        """A digest of everything that the candidate is made from: data, settings, seed and stage versions.

        It decides the items of a rotating round. Who wants to train on them would have to know them first, and they
        are known only when the training data is settled.
        """
        making = [node for node in self.graph.nodes.values() if node.stage.output.kind not in _JUDGING]
        return fingerprint_of(
            stage="candidate",
            version=1,
            seed=self.graph.spec.seed,
            config={node.name: [node.stage.version, node.config.model_dump(mode="json")] for node in making},
            inputs={
                f"{node.name}.{name}": source_digest(self.sources[uris])
                for node in making
                for name, uris in node.sources.items()
            },
        )

    def _tested(self, node: Node, inputs: Mapping[str, InputRef]) -> tuple[Judged, ...]:
        """The rounds before this one. A comparison that was made keeps its place: asking again costs nothing."""
        gates = [record for record in self.store.records() if record.stage == node.stage.name]
        asked = node.config.model_dump(mode="json", exclude={"earlier"})
        digests = {name: ref.digest for name, ref in inputs.items()}
        for record in gates:
            policy = {name: value for name, value in record.config.items() if name != "earlier"}
            if policy == asked and {name: ref.digest for name, ref in record.inputs.items()} == digests:
                return tuple(map(Judged.model_validate, record.config.get("earlier", ())))
        return _longest(gates)

    def next_level(self, alpha: float) -> tuple[float, int]:
        """The level of a candidate that was not judged yet, and how many rounds came before it."""
        from fmops.evaluation.spending import level

        earlier = _longest(record for record in self.store.records() if record.kind == "gate")
        return level(earlier, alpha), len(earlier)

    def _why(self, node: Node, inputs: Mapping[str, InputRef]) -> str:
        last = self.newest.get(node.name)
        if last is None:
            return "never run"
        if last.version != node.stage.version:
            return f"stage code version {last.version} → {node.stage.version}"
        if last.seed != self.graph.spec.seed:
            return f"seed {last.seed} → {self.graph.spec.seed}"
        settled = {name: value for name, value in last.config.items() if name != "earlier"}
        changes = config_changes(settled, node.config.model_dump(mode="json", exclude={"earlier"}))
        changes += [
            f"input {name} changed"
            for name in sorted({*inputs, *last.inputs})
            if name not in inputs or name not in last.inputs or inputs[name].digest != last.inputs[name].digest
        ]
        return "; ".join(changes[:4]) or "its artifact is gone"


def _longest(gates: Iterable[Record]) -> tuple[Judged, ...]:
    """The rounds of the decision that knows most of them; each holds those before it."""
    rounds: list[Any] = max((record.artifact.get("rounds", []) for record in gates), key=len, default=[])
    return tuple(map(Judged.model_validate, rounds))


def _blocks(step: Step) -> bool:
    """A gate lets nothing pass but a promotion."""
    if step.state == "blocked":
        return True
    return step.record is not None and step.record.kind == "gate" and step.record.artifact["verdict"] != "promote"


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> list[str]:
    """Fields that differ, as `learning_rate 0.0001 → 0.0002`."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += config_changes(old, new, f"{at}{key}.")
        elif old != new:
            changes.append(f"{at}{key} {old} → {new}")
    return changes


def wanted_sources(graph: Graph) -> list[tuple[str, ...]]:
    """Every outside input of the graph, each once."""
    return list(dict.fromkeys(uris for node in graph.nodes.values() for uris in node.sources.values()))
