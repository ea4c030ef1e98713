"""The report's sections as plain values: what the template shows, computed from records and files.

Enters: a history and the store. Leaves: rows, sentences and charts.
Refuses: a figure without its n and interval where one is known; a missing one is left out, never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fmops.curve import measured
from fmops.lifecycle import FAMILIES
from fmops.orchestration.charts import Point, interval_rows, line_chart, margin_interval, signed
from fmops.orchestration.history import History, NodeRun
from fmops.store import Record, Store

SAMPLES_SHOWN, SAMPLE_CHARACTERS = 12, 2000
SERIES = ("base", "pretrained", "candidate")
BETTER = {True: "higher is better", False: "lower is better", None: "0 is best"}


@dataclass(frozen=True)
class Headline:
    """The verdict in one or two words, and one sentence that says why."""

    word: str
    tone: str
    """`good`, `bad`, `open` or `plain`: its colour."""
    sentence: str


def headline(history: History) -> Headline:
    """What the run came to. A gate that did not promote says so first; then a failure; then the release."""
    if not history.nodes:
        return Headline("Nothing has run", "plain", "This run ended before its first stage; run `fmops run` again.")
    gate, release = history.record("gate"), history.record("release")
    if gate and gate.artifact["verdict"] != "promote":
        word = "Rejected" if gate.artifact["verdict"] == "reject" else "More data needed"
        tone = "bad" if gate.artifact["verdict"] == "reject" else "open"
        return Headline(word, tone, "Nothing is released: " + "; ".join(gate.artifact["reasons"]) + ".")
    failed = next((node for node in history.nodes.values() if node.state == "failed"), None)
    if failed:
        return Headline(f"Failed at {failed.name}", "bad", failed.error or "Its log says why.")
    cut_off = next((node.name for node in history.nodes.values() if node.state == "running"), None)
    if cut_off or history.finished is None:
        sentence = f"{history.error + '. ' if history.error else ''}`fmops run` goes on from where it was."
        return Headline(f"Cut off in {cut_off}" if cut_off else "Unfinished", "open", sentence)
    if history.error:
        return Headline("Stopped", "bad", history.error)
    if release is None:
        return Headline("Done", "plain", "The spec asks for no release.")
    made = sum(node.state == "done" for node in history.nodes.values())
    kept = f"; {made} of {len(history.nodes)} stages were run, the others kept" if made < len(history.nodes) else ""
    if gate is None:
        return Headline("Released", "plain", f"{release.key}, without a gate{kept}.")
    return Headline("Promoted", "good", f"{release.key} is released{kept}.")


def key_figures(store: Store, history: History) -> list[tuple[str, str, str]]:
    """Label, figure and explanation of the few numbers that stand on top."""
    figures = []
    for label, field in (("New domain", "new_bits_per_byte"), ("Old domain", "old_bits_per_byte")):
        points = _curve(store, history.nodes.get("pretrain"), field)
        if len(points) > 1:
            first, last = points[0][1], points[-1][1]
            figures.append((label, signed(last - first), f"bits per byte, {first:.3f} → {last:.3f}"))
    gate = history.record("gate")
    if gate:
        safe = sum(family["verdict"] == "non-inferior" for family in gate.artifact["families"])
        total = len(gate.artifact["families"])
        gained = ", ".join(gate.artifact["improved"]) or "none"
        figures.append(("Gate", f"{safe} of {total}", f"families hold their margin; improved: {gained}"))
    made = [node.record for node in history.nodes.values() if node.state == "done" and node.record]
    if made:
        wall, cpu = (sum(record.cost[name] for record in made) for name in ("wall_s", "cpu_s"))
        figures.append(("Time", duration(wall), f"in {len(made)} stages, {duration(cpu)} of CPU"))
    return figures


def curves(store: Store, history: History) -> list[dict[str, Any]]:
    """A chart for each curve that was logged: held-out losses, scores of suites, and each stage's training loss."""
    pretrain = history.nodes.get("pretrain")
    record = pretrain.record if pretrain else None
    allowed = record.config.get("old_domain_ceiling") if record else None
    charts = []
    for field, title, css in (
        ("new_bits_per_byte", "New domain, held out", "candidate"),
        ("old_bits_per_byte", "Old domain, held out", "pretrained"),
    ):
        points = _curve(store, pretrain, field)
        ceiling = points[0][1] + allowed if points and allowed and field.startswith("old") else None
        charts.append((title, "bits per byte", css, points, ceiling))
    drawn = {"new_bits_per_byte", "old_bits_per_byte"}
    for name in ("pretrain", "instruct"):
        node = history.nodes.get(name)
        for field in measured(_curve_rows(store, node)):
            if field not in drawn:
                unit = "nats a token" if field == "held_out_loss" else "score"
                title = f"{name.capitalize()}, {field.replace('_', ' ')}"
                charts.append((title, unit, "candidate", _curve(store, node, field), None))
    for name in ("pretrain", "instruct", "align"):
        points = _curve(store, history.nodes.get(name), "loss")
        charts.append((f"{name.capitalize()}, training loss", "loss", "base", points, None))
    return [_chart(*chart) for chart in charts if any(math.isfinite(y) for _, y in chart[3])]


def _chart(title: str, unit: str, css: str, points: Sequence[Point], ceiling: float | None) -> dict[str, Any]:
    finite = [y for _, y in points if math.isfinite(y)]
    lost, first, last = len(points) - len(finite), finite[0], finite[-1]
    caption = f"{first:.3f} → {last:.3f} {unit} ({signed(last - first)})"
    return {
        "title": title,
        "caption": caption + (f"; {lost} values were not finite" if lost else ""),
        "svg": line_chart(points, css=css, x_label="tokens", y_label=unit, ceiling=ceiling),
    }


def score_rows(reports: Sequence[Record | None]) -> list[dict[str, Any]]:
    """One row a task and metric: the values of base, pretrained and candidate with 95 % intervals and n."""
    metrics = [{_metric(item): item for item in report.artifact["metrics"]} if report else {} for report in reports]
    rows = []
    for key in dict.fromkeys(key for found in metrics for key in found):
        items = [found.get(key) for found in metrics]
        known = [(css, item) for css, item in zip(SERIES, items, strict=True) if item]
        drawn = [(css, item["value"], interval(item)) for css, item in known if math.isfinite(item["value"])]
        tops = [bounds[1] if bounds else value for _, value, bounds in drawn]
        high = 1.0 if max(tops, default=0) <= 1.0 or "acc" in key[2] else max(tops)
        first = known[0][1]
        low = -1.0 if first["higher_is_better"] is None else 0.0
        rows.append({
            "family": key[0], "task": key[1], "metric": key[2], "n": first["n"],
            "better": BETTER[first["higher_is_better"]],
            "cells": [(css, _with_interval(item)) for css, item in zip(SERIES, items, strict=True)],
            "svg": interval_rows(drawn, low=low, high=high), "scale": f"{low:.2g} to {high:.2g}",
        })  # fmt: skip
    return sorted(rows, key=lambda row: _place(row["family"]))


def gate_rows(gate: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a family: the paired difference, its one-sided interval, the margin, benchmarks past their guard."""
    tones = {"non-inferior": "good", "regressed": "bad", "undecided": "open"}
    fallen: dict[str, list[dict[str, Any]]] = {}
    for each in gate.get("guards", ()):
        if each["fallen"]:
            fallen.setdefault(each["family"], []).append(each)
    rows = []
    for family in sorted(gate["families"], key=lambda family: _place(family["family"])):
        numbers = [family[name] for name in ("lower", "difference", "upper")]
        drawn = all(map(math.isfinite, numbers))
        tone = tones[family["verdict"]]
        svg = margin_interval(*numbers, margin=family["margin"], css=tone) if drawn else Markup("")
        rows.append({**family, "tone": tone, "svg": svg, "fallen": fallen.get(family["family"], [])})
    return rows


def samples(store: Store, before: Record, after: Record) -> list[dict[str, str]]:
    """Answers to the same prompts before and after, side by side."""
    answers = [
        {row["prompt"]: row["response"] for row in read_rows(_folder(store, report) / "generations.jsonl")}
        for report in (before, after)
    ]
    prompts = [prompt for prompt in answers[0] if prompt in answers[1]][:SAMPLES_SHOWN]
    return [
        {"prompt": _cut(prompt), "before": _answer(answers[0][prompt]), "after": _answer(answers[1][prompt])}
        for prompt in prompts
    ]


def corpus_card(corpus: dict[str, Any]) -> dict[str, Any]:
    """What the corpus kept and dropped, with the share of each step."""
    dropped = sum(item["documents"] for item in corpus["dropped"])
    kept = round(sum(source["documents"] for source in corpus["sources"].values())) or corpus["documents"]
    held_out = corpus["held_out_new"] + corpus["held_out_old"]
    read = kept + held_out + dropped
    steps = [
        {
            **item,
            "share": item["documents"] / read if read else 0.0,
            "examples": [_cut(text) for text in item["examples"][:3]],
        }
        for item in corpus["dropped"]
    ]
    return {**corpus, "read": read, "kept": kept, "dropped_documents": dropped, "steps": steps}


def costs(history: History) -> dict[str, Any]:
    """Time, CPU and memory a stage; what this run spent and what it saved by keeping artifacts."""
    longest = max((node.record.cost["wall_s"] for node in history.nodes.values() if node.record), default=0.0) or 1.0
    rows: list[dict[str, Any]] = []
    for node in history.nodes.values():
        cost = node.record.cost if node.record else {}
        rows.append({
            "name": node.name, "state": node.state, "reason": node.reason, "error": node.error,
            "key": node.record.key if node.record else "", "wall": cost.get("wall_s"), "cpu": cost.get("cpu_s"),
            "peak": cost.get("peak_bytes"), "share": cost.get("wall_s", 0.0) / longest,
        })  # fmt: skip
    spent = sum(row["wall"] or 0.0 for row in rows if row["state"] == "done")
    kept = sum(row["wall"] or 0.0 for row in rows if row["state"] == "cached")
    return {"rows": rows, "spent": duration(spent), "kept": duration(kept) if kept else ""}


def duration(seconds: float) -> str:
    """`58 s`, `7 min 12 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file of a committed artifact; none when the stage does not write it."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _curve(store: Store, node: NodeRun | None, field: str) -> list[Point]:
    """Tokens against a field."""
    rows = _curve_rows(store, node)
    return [(float(row.get("tokens", row["step"])), float(row[field])) for row in rows if row.get(field) is not None]


def _curve_rows(store: Store, node: NodeRun | None) -> list[dict[str, Any]]:
    """The curve, from the artifact; without one, from what the stage reported before it ended."""
    if node is None:
        return []
    if node.record:
        return list(read_rows(_folder(store, node.record) / "curve.jsonl"))
    return [{"step": step, **values} for step, values in node.metrics]


def _folder(store: Store, record: Record) -> Path:
    return store.files(record)


def _metric(item: dict[str, Any]) -> tuple[str, str, str]:
    return item["family"], item["task"], item["name"]


def _place(family: str) -> int:
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)


def _with_interval(item: dict[str, Any] | None) -> str:
    if item is None:
        return "–"
    bounds = interval(item) if math.isfinite(item["value"]) else None
    return f"{item['value']:.3f}" + (f" ({bounds[0]:.3f}–{bounds[1]:.3f})" if bounds else "")


def interval(item: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 %: Wilson's (1927) for a share of items, within 0 and 1 and no point at 0 of n; else 1.96 errors.

    Clusters count through the effective number of items, at which the clustered standard error would be binomial.
    """
    value, error, n = item["value"], item["standard_error"], item["n"]
    if error is None:
        return None
    if item["name"] == "bits_per_byte" or not 0 <= value <= 1:
        return value - 1.96 * error, value + 1.96 * error
    spread = value * (1 - value)
    effective = min(n, spread / error**2) if error and spread else n
    weight = 1.96**2 / effective
    middle = (value + weight / 2) / (1 + weight)
    half = 1.96 / (1 + weight) * math.sqrt(spread / effective + weight / (4 * effective))
    return max(0.0, middle - half), min(1.0, middle + half)


def _answer(text: str) -> str:
    """An answer as it is shown: a base model may end in hundreds of empty lines."""
    if not text.strip():
        return f"({len(text)} characters of white space)" if text else "(empty)"
    return _cut(re.sub(r"\n\s*\n\s*\n", "\n\n", text.strip()))


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " … (cut here)"
