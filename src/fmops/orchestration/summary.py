"""One line about an artifact.

Enters: a record. Leaves: the few figures a person wants to see when its stage ends.
Refuses: nothing.
"""

from __future__ import annotations

from typing import Any

from fmops.store import Record


def summarise(record: Record) -> str:
    """The figures of an artifact in one line, without its name or cost."""
    artifact = record.artifact
    match record.kind:
        case "corpus":
            dropped = sum(item["documents"] for item in artifact["dropped"])
            return f"{artifact['documents']:,} documents, {artifact['tokens']:,} tokens, {dropped:,} dropped"
        case "conversations":
            return f"{artifact['conversations']:,} conversations, {artifact['held_out']:,} held out"
        case "preferences":
            return f"{artifact['pairs']:,} {artifact.get('form', 'pairs')}, {artifact['held_out']:,} held out"
        case "benchmarks":
            return f"{sum(artifact['items'].values()):,} items of {len(artifact['items'])} tasks"
        case "checkpoint":
            moved = _moved(artifact["metrics"])
            size = f"{artifact['parameters'] / 1e6:.1f} M parameters"
            told = "; ".join(part for part in (f"{artifact['trained_tokens']:,} tokens", moved) if part)
            return told if artifact["trained_tokens"] else size
        case "evaluation":
            return _scores(artifact["metrics"])
        case "gate":
            return str(artifact["verdict"])
        case _:
            return f"{record.key}, parity {'passed' if artifact['parity']['passed'] else 'failed'}"


def _scores(metrics: list[dict[str, Any]]) -> str:
    """The first metric of each family, the domain first: what the gate looks at."""
    first: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        first.setdefault(metric["family"], metric)
    chosen = sorted(first.values(), key=lambda metric: metric["family"] != "domain")[:4]
    return ", ".join(f"{m['task']} {m['name'].replace('_', ' ')} {m['value']:.3f}" for m in chosen)


def _moved(metrics: dict[str, float]) -> str:
    pairs = [(name.removesuffix("_before"), name) for name in sorted(metrics) if name.endswith("_before")]
    shown = [
        f"{name.replace('_', ' ')} {metrics[first]:.3f} → {metrics[f'{name}_after']:.3f}"
        for name, first in pairs
        if f"{name}_after" in metrics
    ]
    return ", ".join(shown[:3])
