"""From what monitoring found to the stage that mends it: a table of rules, read in order.

Enters: alarms and a few facts about the release. Leaves: a `Diagnosis` with its reasons, or None when nothing is wrong.
Refuses: to guess beyond the table; what no rule covers is shown to a person.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from fmops.artifacts import Alarm, Diagnosis, Frozen

Stage = Literal["pretrain", "instruct", "align", "evaluate", "rollback", "alert", "none"]

FACTS = {
    "failing": "requests fail",
    "slow": "answers take longer",
    "other model": "golden prompts are not answered as certified",
    "worse release": "the release is worse than the one before it",
    "unsafe": "abuse, personal data, secrets or the system prompt in answers",
    "malformed": "empty, truncated, repeated, ill-formed answers, or in the wrong language",
    "refusing": "more refusals",
    "disliked": "more thumbs down",
    "judged": "the judge finds more answers bad",
    "new topics": "users ask about other things",
    "new prompts": "prompts have another length",
    "unsure": "answers are less likely under the model itself",
    "other answers": "answers have another length",
}
"""Everything that a rule may ask for, in words."""


class Rule(Frozen):
    """One line of the table."""

    cause: str
    stage: Stage
    all_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    explains: tuple[str, ...] | None = None
    """Further facts that this cause may bring about; None: all of them. What it does not explain is judged apart."""
    confirm: str
    refute: str


RULES = (
    Rule(
        cause="release fault", stage="rollback", any_of=("other model",),
        confirm="A fresh engine on the release's own files answers as certified.",
        refute="A fresh engine answers otherwise, too: then parity was proved on another machine.",
    ),
    Rule(
        cause="release fault", stage="rollback", any_of=("worse release",),
        confirm="The previous release, given the same prompts, does not show the signal.",
        refute="The previous release shows it on today's prompts as well: the traffic changed, not the model.",
    ),
    Rule(
        # Who waits blames the answer. But no machine makes people ask about other things, or a model doubt itself.
        cause="infrastructure", stage="alert", any_of=("failing", "slow"), explains=("disliked",),
        confirm="Engine logs, memory and queue show errors; the previous release on the same machine fails as well.",
        refute="Errors stop when the previous release serves: then it is a release fault.",
    ),
    Rule(
        cause="unsafe answers", stage="align", any_of=("unsafe",),
        confirm="The harm suite, or red-team probes made from the examples, score lower than at the release.",
        refute="The examples hold data that users gave themselves, or placeholders.",
    ),
    Rule(
        cause="knowledge gap", stage="pretrain", all_of=("new topics",),
        any_of=("unsure", "refusing", "disliked", "judged"),
        confirm="Questions made from documents on the new topics score low; there are documents that answer them.",
        refute="The model answers such questions when asked plainly: then it is behaviour.",
    ),
    Rule(
        cause="behaviour", stage="instruct", any_of=("malformed",),
        confirm="Conversations like the examples, answered well by hand, are answered badly by the model.",
        refute="Raising max_tokens or mending the client's prompt ends it.",
    ),
    Rule(
        cause="over-refusal", stage="align", any_of=("refusing",),
        confirm="The over-refusal suite scores lower than at the release; people would answer the examples.",
        refute="The examples ask for harm: then refusing is right, and the traffic changed.",
    ),
    Rule(
        cause="preference", stage="align", any_of=("disliked", "judged"),
        confirm="Pairs of answers to the examples: people prefer another one.",
        refute="Thumbs down come from few identities, or in a burst: then it is poisoning.",
    ),
    Rule(
        cause="traffic changed", stage="evaluate", any_of=("new topics", "new prompts"),
        confirm="New items made from today's prompts score as the old ones do.",
        refute="They score lower: then it is a knowledge gap.",
    ),
    Rule(
        cause="answers changed", stage="none", any_of=("unsure", "other answers"),
        confirm="Nothing hurts yet. Look at the examples.",
        refute="A signal of harm follows.",
    ),
)  # fmt: skip
"""Read in order; the first rule whose facts hold is the diagnosis, later ones that hold are named as possible."""

FACT_OF = {
    ("failed", "harm"): "failing", ("slow", "harm"): "slow", ("disliked", "harm"): "disliked",
    ("judged_bad", "harm"): "judged",
    ("refused", "harm"): "refusing", ("personal_data", "harm"): "unsafe", ("secret", "harm"): "unsafe",
    ("prompt_leak", "harm"): "unsafe", ("toxic", "harm"): "unsafe",
    ("empty", "harm"): "malformed", ("truncated", "harm"): "malformed",
    ("repeated", "harm"): "malformed", ("invalid_json", "harm"): "malformed", ("wrong_language", "harm"): "malformed",
    ("topic", "shift"): "new topics", ("meaning", "shift"): "new topics", ("prompt_words", "shift"): "new prompts",
    ("log_probability", "shift"): "unsure", ("words", "shift"): "other answers",
}  # fmt: skip
"""What an alarm says."""


class Findings(Frozen):
    """What is known when the question is asked."""

    alarms: tuple[Alarm, ...] = Field(default=(), description="Recent ones of the release that serves.")
    golden_agree: bool | None = Field(None, description="None when nobody asked.")
    worse_than_before: tuple[str, ...] = Field(default=(), description="Signals worse than under the last release.")
    young_answers: int = Field(
        2000, description="An alarm within so many answers of the reference speaks of the release."
    )


def diagnose(findings: Findings) -> Diagnosis | None:
    """The first rule whose facts hold, and beside it what the facts say that it does not explain.

    None when nothing has been found. A shift of log-probability counts as doubt whichever way it goes: the table's
    `refute` sorts that out.
    """
    return _diagnose(facts_of(findings), findings)


def _diagnose(facts: frozenset[str], findings: Findings) -> Diagnosis | None:
    if not facts:
        return None
    holding = [rule for rule in RULES if _holds(rule, facts)]
    if not holding:
        return Diagnosis(
            cause="unknown", stage="alert", because=_words(facts, findings), examples=_examples(findings.alarms),
            confirm="A person looks at the examples.", refute="",
        )  # fmt: skip
    rule = holding[0]
    used = facts & {*rule.all_of, *rule.any_of}
    rest = frozenset() if rule.explains is None else facts - used - {*rule.explains}
    beside = _diagnose(rest, findings)
    known = {rule.cause} | {found.cause for found in (beside.every if beside else ())}
    telling = [a for a in findings.alarms if FACT_OF.get((a.signal, a.kind)) in used] or list(findings.alarms)
    return Diagnosis(
        cause=rule.cause, stage=rule.stage, because=_words(used, findings), confirm=rule.confirm, refute=rule.refute,
        examples=_examples(telling), beside=beside,
        also_possible=tuple(dict.fromkeys(other.cause for other in holding[1:] if other.cause not in known)),
    )  # fmt: skip


def facts_of(findings: Findings) -> frozenset[str]:
    """Alarms and comparisons as facts of the table."""
    facts = {fact for alarm in findings.alarms if (fact := FACT_OF.get((alarm.signal, alarm.kind)))}
    if findings.golden_agree is False:
        facts.add("other model")
    if findings.worse_than_before:
        facts.add("worse release")
    return frozenset(facts)


def _holds(rule: Rule, facts: frozenset[str]) -> bool:
    return facts.issuperset(rule.all_of) and (not rule.any_of or not facts.isdisjoint(rule.any_of))


def _words(facts: Iterable[str], findings: Findings) -> tuple[str, ...]:
    """Facts in words, in the table's order, with the figures of the alarms behind them."""
    told = []
    for name, text in FACTS.items():
        if name not in facts:
            continue
        figures = [
            f"{alarm.signal} {alarm.reference:.1%} → {alarm.now:.1%}"
            for alarm in findings.alarms
            if FACT_OF.get((alarm.signal, alarm.kind)) == name and alarm.reference is not None and alarm.now is not None
        ]
        if name == "worse release":
            figures = list(findings.worse_than_before)
        told.append(text + (f" ({', '.join(figures)})" if figures else ""))
    return tuple(told)


def _examples(alarms: Iterable[Alarm]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trace for alarm in alarms for trace in alarm.examples))[:10]


def table() -> str:
    """The rules in Markdown, as the docs show them."""
    lines = ["| cause | stage | facts |", "|---|---|---|"]
    for rule in RULES:
        parts = [*rule.all_of, " or ".join(rule.any_of)] if rule.any_of else list(rule.all_of)
        facts = " and ".join(f"({part})" if " or " in part and len(parts) > 1 else part for part in parts)
        lines.append(f"| {rule.cause} | {rule.stage} | {facts} |")
    return "\n".join(lines)
