"""How much replay: what a model gains on a new domain and loses on the old one, over three arrivals of new documents.

Enters: `python -m benchmarks.replay [--model FOLDER] [--seconds S]`; wheels by way of `fmops.sources`. Leaves:
benchmarks/results/replay-DATE.json, docs/images/replay.svg. Refuses: to draw what is not measured whole.

Old domain: Wikipedia passages (BoolQ's). New domain: Python's documentation, in three parts that arrive one after the
other. Each arrival is one round of the product's own stages, `curate` and `pretrain`, from the checkpoint before, with
the same token budget whatever the share of replay. Without `--model` a small model learns the old domain first.
Cells that are done are kept, so that the study may be made in pieces: run it again until it says `whole`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fmops.artifacts import Checkpoint, Corpus
from fmops.data.curate import curate
from fmops.environment import processor
from fmops.jobs import CorpusPart, CurateJob
from fmops.lifecycle import Curate, Pretrain
from fmops.pretraining.pretrain import pretrain
from fmops.sources import resolve
from fmops.stage import StageContext

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "quickstart"))

ARRIVALS = 3
HELD_OUT = 40
"""Documents of each domain that no round reads; the first 2,048 tokens of them are scored."""
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t, two-sided 95 %, by the number of seeds."""


@dataclass(frozen=True)
class Plan:
    """One size of the study."""

    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    tokens: int
    """Of one arrival, replay included."""
    learning_rate: float
    batch_tokens: int
    old_tokens: int = 0
    """That a model with random weights reads of the old domain first."""


TINY = Plan(
    shares=(0.0, 0.1, 0.25, 0.5), seeds=(0, 1, 2), tokens=16_384, learning_rate=2e-3, batch_tokens=1024,
    old_tokens=131_072,
)  # fmt: skip
REAL = Plan(shares=(0.0, 0.25), seeds=(0,), tokens=2_048, learning_rate=1e-4, batch_tokens=512)


def write_texts(folder: Path) -> None:
    """`old/` and `new-1/` … as JSON Lines, and `held_out/` of both; disjoint, in an order that hashes decide."""
    import prepare

    passages = [text for text in prepare.scattered(prepare.rows(prepare.BOOLQ, "passage")) if len(text) >= 300]
    documents = prepare.scattered(prepare.python_docs().values())
    held_out = folder / "held_out"
    held_out.mkdir(parents=True)
    _write(held_out / "old.jsonl", passages[:HELD_OUT])
    _write(held_out / "new.jsonl", documents[:HELD_OUT])
    _write(folder / "old.jsonl", passages[HELD_OUT:])
    for arrival in range(ARRIVALS):
        _write(folder / f"new-{arrival + 1}.jsonl", documents[HELD_OUT + arrival :: ARRIVALS])


def _write(path: Path, texts: Iterable[str]) -> None:
    rows = ({"id": str(number), "text": text, "source": path.stem} for number, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_round(
    plan: Plan, *, start: Checkpoint, texts: Path, new: str, share: float, seed: int, tokens: int, out: Path
) -> tuple[Checkpoint, dict[str, float]]:
    """Curate and train one round; returns its checkpoint and the losses before and after, in bits per byte."""
    shutil.rmtree(out, ignore_errors=True)
    context = StageContext(seed=seed, stream=(out.parent / "events.jsonl").open("a"))
    corpora = {"new": CorpusPart(weight=1 - share if share else None)}
    given = {"corpus_new": resolve(f"{new}.jsonl", root=texts, cache=texts / "cache")}
    if share:
        corpora["old"] = CorpusPart(role="replay", weight=share)
        given["corpus_old"] = resolve("old.jsonl", root=texts, cache=texts / "cache")
    job = CurateJob(curate=Curate(held_out=1e-9, block_tokens=512), corpora=corpora, tokens=tokens)
    (out / "corpus").mkdir(parents=True)
    corpus = curate(job, base=start, out=out / "corpus", context=context, **given)
    config = Pretrain(
        tokens=tokens, learning_rate=plan.learning_rate, batch_tokens=plan.batch_tokens, evaluations=1, checkpoints=1
    )
    corpus = _with_held_out(corpus, texts)
    trained = pretrain(config, checkpoint=start, corpus=corpus, out=out / "trained", context=context)
    shutil.rmtree(out / "trained" / ".work")
    shutil.rmtree(out / "corpus")
    return trained, {**trained.metrics, "replay_share": corpus.replay_share}


def _with_held_out(corpus: Corpus, texts: Path) -> Corpus:
    """The corpus, measured on the study's own held-out documents: the same in every round."""
    shutil.copytree(texts / "held_out", corpus.path / "held_out", dirs_exist_ok=True)
    return corpus.model_copy(update={"held_out_new": HELD_OUT, "held_out_old": HELD_OUT})


def starting_point(plan: Plan, model: Path | None, *, texts: Path, seed: int, work: Path) -> Checkpoint:
    """The model that knows the old domain: the given one, or a small one that has read it."""
    folder = work / f"start-{seed}"
    done = folder / "old" / "trained"
    if not (done / "model").is_dir() or not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "old").mkdir(parents=True)
        if model is not None:
            done.mkdir()
            (done / "model").symlink_to(model.resolve())
        else:
            from tiny_model import write_tiny_model

            write_tiny_model(folder / "random" / "model", seed=seed)
            random = Checkpoint(path=folder / "random", stage="base", parameters=0, trained_tokens=0)
            read_round(
                plan, start=random, texts=texts, new="old", share=0.0, seed=seed, tokens=plan.old_tokens,
                out=folder / "old",
            )  # fmt: skip
        (folder / "done").touch()
    return Checkpoint(path=done, stage="base", parameters=0, trained_tokens=0)


def study(plan: Plan, model: Path | None, *, work: Path, seconds: float) -> list[dict[str, Any]]:
    """Every cell that is done by the deadline: one row an arrival, with losses against the starting point."""
    deadline = time.monotonic() + seconds
    texts = work / "texts"
    if not (texts / "held_out" / "new.jsonl").is_file():
        shutil.rmtree(texts, ignore_errors=True)
        write_texts(texts)
    log = work / "cells.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(row["seed"], row["share"], row["arrival"]): row for row in rows}
    for seed in plan.seeds:
        for share in plan.shares:
            for arrival in range(1, ARRIVALS + 1):
                if (seed, share, arrival) in done:
                    continue
                if time.monotonic() > deadline:
                    return list(done.values())
                start = starting_point(plan, model, texts=texts, seed=seed, work=work)
                before = work / f"{seed}-{share}-{arrival - 1}" / "trained"
                if arrival > 1:
                    start = start.model_copy(update={"path": before})
                used = time.process_time()
                _, found = read_round(
                    plan, start=start, texts=texts, new=f"new-{arrival}", share=share, seed=seed, tokens=plan.tokens,
                    out=work / f"{seed}-{share}-{arrival}",
                )  # fmt: skip
                row = {"seed": seed, "share": share, "arrival": arrival, "cpu_s": time.process_time() - used, **found}
                done[seed, share, arrival] = row
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return list(done.values())


def summary(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By share and arrival: gain on the new domain and rise on the old one since the start, means over seeds.

    `…_against_none` is the paired difference to the run of the same seed without replay, with the half-width of its
    95 % interval: seeds differ in where they begin, and the difference does not.
    """
    start = {row["seed"]: row for row in rows if row["arrival"] == 1}
    found = []
    for share in plan.shares:
        for arrival in range(1, ARRIVALS + 1):
            cells = {row["seed"]: row for row in rows if (row["share"], row["arrival"]) == (share, arrival)}
            none = {row["seed"]: row for row in rows if (row["share"], row["arrival"]) == (plan.shares[0], arrival)}
            if len(cells) < len(plan.seeds):
                continue
            after = {
                seed: (-row["new_bits_per_byte_after"], row["old_bits_per_byte_after"]) for seed, row in cells.items()
            }
            point: dict[str, Any] = {"share": share, "arrival": arrival, "seeds": len(cells)}
            for place, name in enumerate(("new_gain", "old_rise")):
                sign, domain = ((1, "new"), (-1, "old"))[place]
                moved = [after[seed][place] + sign * start[seed][f"{domain}_bits_per_byte_before"] for seed in cells]
                against = [
                    after[seed][place] + sign * none[seed][f"{domain}_bits_per_byte_after"]
                    for seed in cells
                    if seed in none
                ]
                point |= {name: statistics.fmean(moved), f"{name}_half_width": half_width(moved)}
                if share != plan.shares[0]:
                    point[f"{name}_against_none"] = statistics.fmean(against)
                    point[f"{name}_against_none_half_width"] = half_width(against)
            found.append(point)
    return found


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean over seeds, by Student's t; None for one seed."""
    if len(values) < 2:
        return None
    return T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def draw(points: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG: the old domain's rise across, the new domain's gain upwards; a line a share, a dot an arrival."""
    width, height, left, bottom, top = 640, 400, 70, 50, 40
    xs = [p["old_rise"] for p in points]
    ys = [p["new_gain"] for p in points]
    reach, tall = ([_bar(p, name) for p in points] for name in ("old_rise", "new_gain"))
    x_low, x_high = (
        min(0.0, *(x - e for x, e in zip(xs, reach, strict=True))),
        max(x + e for x, e in zip(xs, reach, strict=True)),
    )
    y_low, y_high = min(0.0, *ys), max(y + e for y, e in zip(ys, tall, strict=True))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low or 1) * (width - left - 110),
            height - bottom - (y - y_low) / (y_high - y_low or 1) * (height - bottom - top),
        )

    title = escape(title)
    colours = ("#b3261e", "#c77700", "#5f7d00", "#00796b", "#1f4e9e")
    shares = sorted({p["share"] for p in points})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{title}</title>',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20">{title}</text>',
    ]
    for step in range(5):
        x, y = x_low + (x_high - x_low) * step / 4, y_low + (y_high - y_low) * step / 4
        across, down = at(x, y_low)[0], at(x_low, y)[1]
        parts.append(f'<text x="{across:.0f}" y="{height - bottom + 16}" text-anchor="middle">{x:+.3f}</text>')
        parts.append(f'<text x="{left - 6}" y="{down + 4:.0f}" text-anchor="end">{y:+.3f}</text>')
        parts.append(f'<path d="M{left} {down:.0f}H{width - 110}" stroke="#dddddd"/>')
    parts.append(
        f'<text x="{(width - 40) / 2:.0f}" y="{height - 10}" text-anchor="middle">rise of the old domain\'s loss, '
        f'bits per byte (left is better)</text><text transform="translate(14 {height / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">gain on the new domain, bits per byte</text>'
    )
    for share, colour in zip(shares, colours, strict=False):
        mine = sorted((p for p in points if p["share"] == share), key=lambda p: p["arrival"])
        path = " ".join("{:.1f},{:.1f}".format(*at(p["old_rise"], p["new_gain"])) for p in mine)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in mine:
            x, y = at(p["old_rise"], p["new_gain"])
            for across, down in ((_bar(p, "old_rise"), 0.0), (0.0, _bar(p, "new_gain"))):
                low, high = (
                    at(p["old_rise"] - across, p["new_gain"] - down),
                    at(p["old_rise"] + across, p["new_gain"] + down),
                )
                parts.append(f'<path d="M{low[0]:.1f} {low[1]:.1f}L{high[0]:.1f} {high[1]:.1f}" stroke="{colour}"/>')
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>share {share:g}, arrival '
                f"{p['arrival']}: old {p['old_rise']:+.4f}, new {p['new_gain']:+.4f}</title></circle>"
            )
        x, y = at(mine[-1]["old_rise"], mine[-1]["new_gain"])
        parts.append(f'<text x="{x + 6:.0f}" y="{y - 8:.0f}" fill="{colour}">replay {share:.0%}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bar(point: dict[str, Any], name: str) -> float:
    """Half the length of a point's bar: how sure its distance to the line without replay is."""
    return point.get(f"{name}_against_none_half_width") or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A Hugging Face folder; left out: a small one of 1 M parameters.")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".replay", help="Where cells are kept.")
    parser.add_argument("--seconds", type=float, default=math.inf, help="Begin no cell after so many.")
    given = parser.parse_args()
    name = given.model.name if given.model else "tiny"
    plan = REAL if given.model else TINY
    work = given.work / name
    rows = study(plan, given.model, work=work, seconds=given.seconds)
    whole = len(rows) == len(plan.shares) * len(plan.seeds) * ARRIVALS
    points = summary(plan, rows)
    now = datetime.now(UTC)
    path = ROOT / "benchmarks" / "results" / f"replay-{now:%Y-%m-%d}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[name] = {
        "whole": whole, "plan": asdict(plan), "summary": points, "cells": rows,
        "machine": {"processor": processor(), "threads": 1},
        "unit": "bits per byte", "interval": "95 %, Student's t over seeds; against_none: paired by seed",
    }  # fmt: skip
    path.write_text(json.dumps(results, indent=1) + "\n")
    if whole and not given.model:
        title = f"Replay over three arrivals ({len(plan.seeds)} seeds; bars: 95 % of the difference to no replay)"
        svg = draw(points, title)
        (ROOT / "docs" / "images" / "replay.svg").write_text(svg)
    for point in points:
        print(json.dumps(point))
    print("whole" if whole else f"{len(rows)} cells done; run it again to go on")


if __name__ == "__main__":
    main()
