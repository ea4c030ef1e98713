"""The model card and the data list, from artifacts alone.

Enters: the artifacts that a model was made from and measured with. Leaves: text and plain values.
Refuses: to guess; what no artifact states is named as not stated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field

from fmops.artifacts import (
    Artifact,
    Checkpoint,
    Conversations,
    Corpus,
    Dropped,
    EvalReport,
    Frozen,
    GateDecision,
    Metric,
    Parity,
    Preferences,
)
from fmops.jobs import Origin

UNKNOWN = "not stated"


class Evidence(Frozen):
    """What is known about a model."""

    checkpoint: Checkpoint
    base: Checkpoint | None = None
    pretrained: Checkpoint | None = None
    instructed: Checkpoint | None = None
    gate: GateDecision | None = None
    champion_report: EvalReport | None = None
    challenger_report: EvalReport | None = None
    corpus: Corpus | None = None
    conversations: Conversations | None = None
    preferences: Preferences | None = None
    base_uri: str | None = None
    origins: dict[str, Origin] = Field(default={})

    @property
    def stages(self) -> list[Checkpoint]:
        """The trained checkpoints, in order; the last one is the model."""
        trained = [self.pretrained, self.instructed, self.checkpoint]
        return [made for made in trained if made is not None and made.stage != "base"]

    @property
    def licence(self) -> str | None:
        """The base model's licence."""
        return self.checkpoint.licence or (self.base.licence if self.base else None)

    def data_licence(self, key: str) -> str | None:
        """The stated licence of the data under `data.<key>` of the spec."""
        origin = self.origins.get(key)
        return origin.licence if origin else None

    @classmethod
    def of(cls, **artifacts: Artifact | None) -> Evidence:
        """Take artifacts by name; an unknown name is a mistake of the caller and raises."""
        return cls.model_validate(artifacts)


def facts(name: str, known: Evidence, parity: Parity) -> dict[str, Any]:
    """What the card states, as plain values."""
    checkpoint = known.checkpoint
    return {
        "name": name,
        "base": known.base_uri,
        "stage": checkpoint.stage,
        "stages": [{"stage": made.stage, "trained_tokens": made.trained_tokens} for made in known.stages],
        "architecture": _architecture(known),
        "parameters": checkpoint.parameters,
        "trained_tokens": checkpoint.trained_tokens,
        "metrics": dict(sorted(checkpoint.metrics.items())),
        "scores": [
            {**metric.model_dump(mode="json"), "base": base.value if base else None}
            for metric, base in _paired(known.challenger_report, known.champion_report)
        ],
        "gate": known.gate.model_dump(mode="json") if known.gate else None,
        "data": data_list(known),
        "parity": parity.model_dump(mode="json"),
    }


def data_list(known: Evidence) -> dict[str, Any]:
    """What the model learned from: by kind, with what was left out and what was redacted."""
    listed: dict[str, Any] = {}
    if known.corpus:
        corpus = known.corpus
        listed["corpus"] = {
            "documents": corpus.documents,
            "tokens": corpus.tokens,
            "replay_share": corpus.replay_share,
            "held_out_documents": {"new": corpus.held_out_new, "old": corpus.held_out_old},
            "sources": {name: dict(sorted(numbers.items())) for name, numbers in sorted(corpus.sources.items())},
            **_treatment(corpus.dropped, corpus.redactions),
            "origins": {
                key.removeprefix("corpora."): origin.model_dump(mode="json")
                for key, origin in sorted(known.origins.items())
                if key.startswith("corpora.")
            },
        }
    if known.conversations:
        talks = known.conversations
        listed["conversations"] = {
            "conversations": talks.conversations,
            "held_out": talks.held_out,
            **_treatment(talks.dropped, talks.redactions),
            **_origin(known.origins.get("conversations")),
        }
    if known.preferences:
        pairs = known.preferences
        listed["preferences"] = {
            pairs.form: pairs.pairs,
            "held_out": pairs.held_out,
            **_treatment(pairs.dropped, pairs.redactions),
            **_origin(known.origins.get("preferences")),
        }
    return listed


def model_card(name: str, known: Evidence, parity: Parity) -> str:
    """The card in Markdown, with the metadata block of the Hugging Face hub."""
    parts = [
        ["---", *_metadata(known), "---", "", f"# {name}"],
        _model(known),
        _training(known),
        _data(known),
        _evaluation(known),
        _gate(known.gate),
        _parity(parity),
        _limits(known),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _metadata(known: Evidence) -> Iterable[str]:
    licence = known.licence
    # The hub knows licences by lower-case SPDX names; anything else has to be called `other`.
    if licence and " " not in licence:
        yield f"license: {licence.lower()}"
    elif licence:
        yield "license: other"
        yield f"license_name: {json.dumps(licence, ensure_ascii=False)}"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"


def _model(known: Evidence) -> list[str]:
    base = known.base
    lines = [
        "## Model",
        "",
        f"- Base model: `{known.base_uri or UNKNOWN}`",
        f"- Architecture: {_architecture(known)}, {known.checkpoint.parameters:,} parameters",
        f"- Licence of the base model: {known.licence or UNKNOWN}",
        f"- Last training stage: {known.checkpoint.stage}",
    ]
    if base and base.parameters != known.checkpoint.parameters:
        lines.append(f"- The base model has {base.parameters:,} parameters")
    return lines


def _architecture(known: Evidence) -> str:
    """As the model's own configuration names it."""
    config = json.loads((known.checkpoint.model / "config.json").read_text(encoding="utf-8"))
    return ", ".join(config.get("architectures") or [str(config.get("model_type", UNKNOWN))])


def _training(known: Evidence) -> list[str]:
    lines = ["## Training", ""]
    if not known.stages:
        return [*lines, "None: this is the base model as it was imported."]
    for made in known.stages:
        lines += [f"The stage `{made.stage}` trained on {made.trained_tokens:,} tokens.", ""]
        if made.metrics:
            lines += ["| metric | value |", "|---|---:|"]
            lines += [f"| {_cell(key)} | {value:.6g} |" for key, value in sorted(made.metrics.items())]
            lines.append("")
    return lines[:-1]


def _data(known: Evidence) -> list[str]:
    lines = ["## Data", ""]
    if known.corpus:
        corpus = known.corpus
        lines += [
            f"Corpus: {corpus.documents:,} documents, {corpus.tokens:,} training tokens, "
            f"{corpus.replay_share:.1%} of them replayed from the old domain; "
            f"{corpus.held_out_new + corpus.held_out_old:,} documents held out.",
            "",
            "| source | documents | tokens | weight | licence |",
            "|---|---:|---:|---:|---|",
        ]
        for name, numbers in sorted(corpus.sources.items()):
            counted = " | ".join(_number(numbers.get(key)) for key in ("documents", "tokens", "weight"))
            stated = known.data_licence(f"corpora.{name}") or UNKNOWN
            lines.append(f"| {_cell(name)} | {counted} | {_cell(stated)} |")
        lines += ["", *_treated("corpus", corpus.dropped, corpus.redactions)]
    if known.conversations:
        talks = known.conversations
        stated = known.data_licence("conversations") or UNKNOWN
        lines += [
            "",
            f"Conversations: {talks.conversations:,} for training, {talks.held_out:,} held out. Licence: {stated}.",
            "",
        ]
        lines += _treated("conversations", talks.dropped, talks.redactions)
    if known.preferences:
        pairs = known.preferences
        stated = known.data_licence("preferences") or UNKNOWN
        lines += [
            "",
            f"Preferences: {pairs.pairs:,} {pairs.form} for training, {pairs.held_out:,} held out. Licence: {stated}.",
            "",
        ]
        lines += _treated("preferences", pairs.dropped, pairs.redactions)
    return lines if len(lines) > 2 else [*lines, "None beyond what the base model learned from."]


def _treated(what: str, dropped: Sequence[Dropped], redactions: dict[str, int]) -> list[str]:
    removed = ", ".join(f"{item.documents:,} {item.step}" for item in dropped if item.documents)
    hidden = ", ".join(f"{count:,} {kind}" for kind, count in sorted(redactions.items()) if count)
    return [f"Removed from the {what}: {removed or 'nothing'}. Redacted: {hidden or 'nothing'}."]


def _treatment(dropped: Sequence[Dropped], redactions: dict[str, int]) -> dict[str, Any]:
    return {
        "dropped": {item.step: item.documents for item in dropped},
        "redactions": dict(sorted(redactions.items())),
    }


def _origin(origin: Origin | None) -> dict[str, Any]:
    return {"origin": origin.model_dump(mode="json")} if origin else {}


def _paired(report: EvalReport | None, base: EvalReport | None) -> list[tuple[Metric, Metric | None]]:
    """Each metric of the candidate beside the base's."""
    before = {(m.suite, m.task, m.name): m for m in base.metrics} if base else {}
    measured = sorted(report.metrics, key=lambda m: (m.family, m.suite, m.task, m.name)) if report else []
    return [(metric, before.get((metric.suite, metric.task, metric.name))) for metric in measured]


def _evaluation(known: Evidence) -> list[str]:
    rows = _paired(known.challenger_report, known.champion_report)
    if not rows:
        return ["## Evaluation", "", "Not evaluated."]
    lines = [
        "## Evaluation",
        "",
        "Value ± standard error (n). Better is higher where the arrow points up, nearer to 0 where it says so.",
        "",
        "| family | task | metric | base | this model |",
        "|---|---|---|---:|---:|",
    ]
    for metric, base in rows:
        arrow = {True: "↑", False: "↓", None: "→ 0"}[metric.higher_is_better]
        lines.append(
            f"| {_cell(metric.family)} | {_cell(metric.task)} | {_cell(metric.name)} {arrow} | "
            f"{_value(base)} | {_value(metric)} |"
        )
    return lines


def _value(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    error = f" ± {metric.standard_error:.4f}" if metric.standard_error is not None else ""
    return f"{metric.value:.4f}{error} ({metric.n:,})"


def _gate(gate: GateDecision | None) -> list[str]:
    if gate is None:
        return ["## Gate", "", "None: no comparison with a champion decided about this release."]
    lines = ["## Gate", "", f"Verdict: **{gate.verdict}** at α = {gate.alpha:g}."]
    lines += [f"- {reason}" for reason in gate.reasons]
    lines += [
        "",
        "Differences are challenger − champion, positive is better; the interval is one-sided at 1 − α on each side.",
        "",
        "| family | n | difference | interval | margin | verdict |",
        "|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {_cell(f.family)} | {f.n:,} | {f.difference:+.4f} ± {f.standard_error:.4f} | "
        f"{f.lower:+.4f} … {f.upper:+.4f} | {f.margin:g} | {f.verdict} |"
        for f in gate.families
    ]
    if gate.guards:
        fallen = ", ".join(_cell(each.task) for each in gate.guards if each.fallen) or "none"
        lines += ["", f"Of {len(gate.guards)} guarded benchmarks, surely worse by more than their guard: {fallen}."]
    improved = ", ".join(gate.improved) or "none"
    return [*lines, "", f"Primary families that improved (Holm): {improved}."]


def _parity(parity: Parity) -> list[str]:
    return [
        "## Parity of trainer and server",
        "",
        f"Engine `{parity.engine}`, {parity.prompts} prompts: token ids, chat template and greedy tokens are equal; "
        f"log-probabilities differ by at most {parity.max_logprob_difference:g} nats (tolerance {parity.tolerance:g}).",
    ]


def _limits(known: Evidence) -> list[str]:
    lines = ["## Limits", ""]
    if known.gate:
        smallest = ", ".join(f"{f.family} {f.minimum_detectable:.3g}" for f in known.gate.families)
        if smallest:
            lines.append(f"- A difference smaller than this would most likely not have been seen: {smallest}.")
    if not (known.challenger_report and known.challenger_report.metrics):
        lines.append("- No benchmark was run: nothing is known about quality or harm.")
    lines.append("- Benchmarks sample behaviour; they do not certify the absence of harm or bias.")
    if any(origin.licence is None for origin in known.origins.values()):
        lines.append("- Some training data states no licence; check it before the model is passed on.")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _cell(text: str) -> str:
    """Text that cannot break out of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
