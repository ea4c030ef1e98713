"""`fmops compare`: two evaluations judged as the gate would, with what moved and where it is weak.

Enters: a project and two names. Leaves: text, a page, and the exit code of the verdict.
Refuses: names without an evaluation, altered evaluations. It promotes nothing and spends nothing of the gate's α.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmops.artifacts import EvalReport
from fmops.errors import EXIT_NEED_MORE_DATA, EXIT_OK, EXIT_REJECTED, FmopsError
from fmops.evaluation.compare import Comparison, fairly, lay_side_by_side
from fmops.evaluation.evidence import gather
from fmops.evaluation.gate import Decision, contaminated_items, decide
from fmops.evaluation.journal import Journal
from fmops.evaluation.judge import (
    REPLY_TOKENS,
    Pair,
    Preference,
    ask_judge,
    collect,
    read_labels,
    to_label,
    weigh,
)
from fmops.evaluation.protocol import write_lines
from fmops.lifecycle import Gate, Judge
from fmops.orchestration.project import Project
from fmops.orchestration.show import table
from fmops.store import Record, Store

EXIT_CODES = {"promote": EXIT_OK, "reject": EXIT_REJECTED, "need more data": EXIT_NEED_MORE_DATA}
MOVED_PRINTED = 10


@dataclass(frozen=True)
class Compared:
    """Everything that the text and the page show."""

    before: Record
    after: Record
    decision: Decision
    comparison: Comparison | None
    """None when the two cannot be paired; the decision says why."""
    gates: tuple[Record, ...]
    """Every decision of this workspace, the newest last; it holds the rounds and the budget."""
    judged: Preference | None = None
    """Where the spec names a judge."""

    @property
    def gate(self) -> Record | None:
        """The newest decision."""
        return self.gates[-1] if self.gates else None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.decision.verdict]


def compare(project: Project, a: str, b: str) -> Compared:
    """Judge `b` against `a`.

    A spec's `gate` asks as much here as of a candidate: its primary families must be measured. Without a `gate` no gain
    is asked for.

    Raises:
        FmopsError: no such artifact, or none with an evaluation.
        IntegrityError: a file of an evaluation, or of the data behind it, is not what its record says.
    """
    store = project.store
    before, after = (find_report(store, key) for key in (a, b))
    made_from = [record for record in ancestors(store, after) if record.kind in _DATA]
    for record in (before, after, *made_from):
        store.verify(record)
    champion, challenger = (store.load(record) for record in (before, after))
    assert isinstance(champion, EvalReport)
    assert isinstance(challenger, EvalReport)
    evidence = gather(champion, challenger, contaminated=contaminated_items(map(store.load, made_from)))
    policy = project.spec.gate or Gate(primary=())
    margins = {name: margin for name, margin in policy.margins.items() if name in evidence.families}
    decision = decide(evidence, alpha=policy.alpha, margins=margins, primary=policy.primary, guards=policy.guards)
    gates = tuple(record for record in store.records() if record.kind == "gate")
    side_by_side = lay_side_by_side(champion, challenger, _items(store, after)) if evidence.families else None
    judged = None
    if side_by_side and project.spec.evaluate and project.spec.evaluate.judge:
        pairs = collect(champion, challenger, _items(store, after), seed=project.spec.seed)
        judged = judge_answers(project, project.spec.evaluate.judge, pairs, f"{before.key}--{after.key}")
    return Compared(before, after, decision, side_by_side, gates, judged)


def judge_answers(project: Project, judge: Judge, pairs: list[Pair], name: str) -> Preference:
    """Ask the spec's judge; leave the pairs for people to label, and use their labels where there are some."""
    from fmops.adapters.openai_endpoint import OpenAIEndpoint

    folder = project.store.root / "comparisons"
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = OpenAIEndpoint(judge.endpoint, model=judge.model)

    def ask(question: str) -> str:
        return endpoint.chat([{"role": "user", "content": question}], max_tokens=REPLY_TOKENS)

    journal = Journal(folder / "judge.jsonl")
    verdicts = ask_judge(pairs, ask, journal=journal, name=endpoint.model)
    journal.close()
    asked = folder / f"{name}.to-label.jsonl"
    if not asked.exists():
        # People may be filling it.
        write_lines(asked, to_label(pairs))
    labels = read_labels(project.graph.root / judge.labels, pairs) if judge.labels else {}
    return weigh(pairs, verdicts, labels)


_DATA = ("corpus", "conversations", "preferences")


def find_report(store: Store, key: str) -> Record:
    """The newest evaluation behind an alias, a stage's name, or the key of an evaluation, a checkpoint or a release.

    Raises:
        FmopsError: there is none; says how to get one.
    """
    record = store.by_key(store.aliases().get(key, key))
    if record.kind == "evaluation":
        return record
    if record.kind == "release" and "challenger_report" in record.inputs:
        return store.by_key(record.inputs["challenger_report"].ref)
    found = [
        report
        for report in store.records()
        if report.kind == "evaluation" and report.inputs["checkpoint"].ref == record.key
    ]
    if not found:
        raise FmopsError(f"{record.key} has no evaluation. Make one: `fmops evaluate {key}`.")
    return found[-1]


def ancestors(store: Store, record: Record) -> Iterator[Record]:
    """What the evaluated model was made from, as far as its records are here."""
    known = {each.key: each for each in store.records()}
    waiting, seen = [record.inputs["checkpoint"].ref], set()
    while waiting:
        key = waiting.pop()
        if key in known and key not in seen:
            seen.add(key)
            yield known[key]
            waiting += [ref.ref for ref in known[key].inputs.values() if ref.kind == "artifact"]


def _items(store: Store, report: Record) -> Path | None:
    ref = report.inputs.get("benchmarks")
    record = next((each for each in store.records() if ref and each.key == ref.ref), None)
    return store.files(record) / "items" if record else None


def render_comparison(compared: Compared, page: Path) -> str:
    """The verdict, families, tasks, weak slices and the first moved items."""
    decision = compared.decision
    lines = [f"{compared.before.key} → {compared.after.key}: {decision.verdict}"]
    lines += [f"  {reason}" for reason in decision.reasons]
    if compared.comparison:
        lines += _tasks(compared.comparison)
        lines += _slices(compared.comparison)
        lines += _moved(compared.comparison)
    if compared.judged:
        lines += ["", *told_preference(compared.judged)]
    lines += budget(compared.gate)
    return "\n".join([*lines, f"page: {page}"])


def _tasks(comparison: Comparison) -> list[str]:
    rows = [
        (each.task, each.metric, f"{each.before:.4f}", f"{each.after:.4f}", _signed(each.difference),
         f"{_signed(each.lower)} to {_signed(each.upper)}", str(each.n))
        for each in comparison.tasks
    ]  # fmt: skip
    return ["", table(("task", "metric", "before", "after", "better by", "95 % interval", "n"), rows)]


def _slices(comparison: Comparison) -> list[str]:
    if not comparison.slices:
        return []
    rows = [
        (each.task, _short(each.name, 48), str(each.n), f"{each.value:.3f} ± {each.standard_error:.3f}",
         f"{each.rest:.3f}")
        for each in comparison.slices
    ]  # fmt: skip
    head = ("weakest slices", "", "n", "score ± error", "the others")
    return ["", table(head, rows)]


def _moved(comparison: Comparison) -> list[str]:
    better = sum(each.difference > 0 for each in comparison.moved)
    lines = ["", f"moved: {len(comparison.moved)} items, {better} better, {len(comparison.moved) - better} worse"]
    for each in fairly(comparison.moved, MOVED_PRINTED):
        lines.append(f"  {'+' if each.difference > 0 else '−'} {each.task}: {_short(each.prompt or each.sample, 90)}")
    return lines


def told_preference(judged: Preference) -> list[str]:
    """What the judge and people say, with what may be wrong with it."""
    interval = f"95 % {judged.lower:.3f} to {judged.upper:.3f}, n = {judged.n}"
    lines = [
        f"judge: the new answers are preferred {judged.value:.3f} ({interval}): {judged.won} won, {judged.lost} lost, "
        f"{judged.tied} tied, {judged.equal} of them equal",
        f"  order: the first answer won {judged.favours_first} times whatever it was, the second "
        f"{judged.favours_second} times (p = {judged.order_p:.2g}); {judged.unreadable} replies named no choice",
    ]
    if judged.unreadable > judged.n - judged.equal:
        lines.append("  more than half of its replies named no choice: this model is no judge of these answers")
    people = judged.people
    if people is None:
        return [*lines, "  people: no labels; the judge alone proves nothing"]
    return [
        *lines,
        f"  people: {people.value:.3f} (95 % {people.lower:.3f} to {people.upper:.3f}) from {people.labelled} labels "
        f"and the judge's {people.unlabelled} others; agreement {people.agreement:.2f}, weight {people.weight:.2f}",
    ]


def budget(gate: Record | None) -> list[str]:
    """The rounds that the gate has tested, and the α that is left."""
    rounds: list[dict[str, Any]] = gate.artifact.get("rounds", []) if gate else []
    if not gate or not rounds:
        return []
    promoted = sum(each["promoted"] for each in rounds)
    return [
        "",
        f"error budget: {len(rounds)} rounds tested, {promoted} promoted; α {gate.artifact['alpha']:g}, "
        f"{gate.artifact['wealth']:.4f} left before a promotion earns more",
    ]


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else ("+∞" if value > 0 else "−∞")


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
