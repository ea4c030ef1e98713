"""What a lifecycle would need on a cluster: `fmops plan --on eks`.

Enters: a project, the kind and number of nodes if they are set. Leaves: a line a stage: nodes, layout, hours, dollars.
Refuses: models it has no formula for; a stage that fits nowhere says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from fmops.errors import FmopsError
from fmops.orchestration.estimate import ASSUMED_FLOPS_PER_THREAD
from fmops.orchestration.plan import Planner, Step
from fmops.orchestration.project import Project
from fmops.orchestration.shares import PROCESSORS
from fmops.orchestration.show import table
from fmops.orchestration.sizing import (
    GIB,
    Instance,
    Load,
    Shape,
    Training,
    Work,
    instance,
    instances,
    serving,
    training,
)
from fmops.sources import Report

START_H = 0.1
"""From a stage's submission to its first step: a node that Karpenter makes, its image, the weights."""
VCPU_DOLLARS_H = 0.2016 / 4
"""Of an m7i.xlarge, as infra/costs.yaml has it."""
ITEM_TOKENS = 350
"""That scoring a benchmark item reads, its shared prefix counted once; the quickstart's items have 200 to 500."""


def render_cluster_plan(
    project: Project, *, on: str | None, nodes: int | None, requests_per_s: float, report: Report | None = None
) -> str:
    """A line a stage on its cheapest node, or on the one that is named; then the endpoint, the sums, the assumptions.

    Raises:
        FmopsError: the base's shape is unknown, or there is no instance of that name.
    """
    planner = project.planner(report)
    steps = planner.plan()
    shape = shape_of(planner, steps["base"])
    kinds = [instance(on)] if on else [each for each in instances().values() if each.trains]
    rows, dollars, hours, unknown = [], 0.0, 0.0, []
    for name, work in works(project, planner).items():
        if work is None:
            unknown.append(name)
            continue
        if steps[name].node.stage.name == "evaluate":
            # The scorer computes on processors.
            flops = PROCESSORS * ASSUMED_FLOPS_PER_THREAD
            taken = START_H + work.tokens * shape.training_flops(work.sequence) / flops / 3600
            paid = taken * PROCESSORS * VCPU_DOLLARS_H
            dollars, hours = dollars + paid, hours + taken
            rows.append(
                (
                    name, f"{work.tokens:,.0f}", f"{PROCESSORS} processors", "", "", f"{taken:,.2f}", f"{paid:,.2f}",
                    "", "",
                )
            )  # fmt: skip
            continue
        best = min((size for each in kinds if (size := _sized(shape, work, each, nodes))), key=_cost, default=None)
        if best is None:
            rows.append((name, f"{work.tokens:,.0f}", "fits on none", "", "", "", "", "", ""))
            continue
        dollars, hours = dollars + _cost(best), hours + best.hours + START_H
        rows.append(
            (
                name, f"{work.tokens:,.0f}", f"{best.nodes} × {best.on.name}", _layout(best),
                f"{best.layout.bytes_per_device / GIB:.1f} of {best.on.memory_gib:.0f}",
                f"{best.hours + START_H:,.2f}", f"{_cost(best):,.2f}", f"{best.goodput:.1%}", _interval(best),
            )
        )  # fmt: skip
    lines = [f"model: {shape.parameters / 1e9:.3g} B parameters, {shape.cache_bytes / 1e3:.0f} kB of cache a token", ""]
    columns = ("stage", "tokens", "nodes", "layout", "GiB a device", "hours", "dollars", "goodput", "state every")
    lines += [table(columns, rows), ""]
    lines.append(f"expected: {hours:,.1f} h one after the other, ${dollars:,.2f} for their nodes, no spot discount")
    if unknown:
        lines.append(f"not in that sum, their data are not curated yet: {', '.join(unknown)}")
    lines += ["", *_endpoint(shape, Load(requests_per_s), instance(on) if on else None)]
    lines.append("layout: tensor × pipeline × replicas. Formulas, sources and what they miss: docs/sizing.md")
    return "\n".join(lines)


def _sized(shape: Shape, work: Work, on: Instance, nodes: int | None) -> Training | None:
    return training(shape, work, on, nodes=nodes) if on.trains else None


def _cost(size: Training) -> float:
    return size.dollars + START_H * size.nodes * size.on.dollars_per_hour


def _layout(size: Training) -> str:
    return f"{size.layout.tensor} × {size.layout.pipeline} × {size.layout.replicas}"


def _interval(size: Training) -> str:
    """Between two resume states, by Young and Daly; one at the end suffices where the stage is shorter."""
    seconds = size.checkpoint_every_s
    if seconds >= size.hours * 3600:
        return "end"
    return f"{seconds / 60:,.0f} min"


def shape_of(planner: Planner, base: Step) -> Shape:
    """Of the imported base; before that, of its config.json or GGUF header."""
    if base.record:
        artifact: Any = planner.store.load(base.record)
        return Shape.of(json.loads((artifact.model / "config.json").read_text("utf-8")))
    source = planner.sources[base.node.sources["source"]]
    for file in source.files:
        if PurePosixPath(file.name).name == "config.json":
            return Shape.of(json.loads(file.path.read_text("utf-8")))
        if file.name.endswith(".gguf"):
            from fmops.adapters.gguf_header import read_config

            return Shape.of(read_config(file.path))
    raise FmopsError(f"{source.uri} has neither config.json nor a .gguf file, so its model is not sized.")


def works(project: Project, planner: Planner) -> dict[str, Work | None]:
    """Each stage that computes, in order; None for one whose tokens nobody knows yet."""
    return dict(_works(project, planner))


def _works(project: Project, planner: Planner) -> Iterator[tuple[str, Work | None]]:
    spec = project.spec
    for name, step in planner.plan().items():
        stage, last = step.node.stage.name, planner.newest.get(name)
        seen = last.artifact.get("trained_tokens") if last else None
        if stage == "pretrain" and spec.pretrain:
            config = spec.pretrain
            yield name, Work(config.tokens, spec.curate.block_tokens, config.batch_tokens, lora=config.tuning == "lora")
        elif stage == "instruct" and spec.instruct:
            tuned = spec.instruct
            tokens = tuned.max_tokens or seen
            lora = tuned.adapter == "lora"
            yield name, Work(tokens, tuned.block_tokens, tuned.batch_tokens, lora=lora) if tokens else None
        elif stage == "align" and spec.align:
            pairs = spec.align
            batch = 2 * pairs.batch_pairs * pairs.max_tokens
            yield name, Work(seen, pairs.max_tokens, batch, lora=pairs.adapter == "lora") if seen else None
        elif stage == "evaluate":
            pinned = planner.newest.get("benchmarks")
            items = sum(pinned.artifact["items"].values()) if pinned else None
            # Scoring is forward only: a third of training's arithmetic.
            yield name, Work(items * ITEM_TOKENS / 3, ITEM_TOKENS, 64 * ITEM_TOKENS, lora=True) if items else None


def _endpoint(shape: Shape, load: Load, on: Instance | None) -> list[str]:
    kinds = [on] if on else list(instances().values())
    sizes = [size for each in kinds if (size := serving(shape, load, each))]
    asked = (
        f"{load.requests_per_s:g} requests/s of {load.prompt_tokens} and {load.answer_tokens} tokens, at most "
        f"{load.token_s * 1e3:.0f} ms between two"
    )
    if not sizes:
        return [f"endpoint: no node of {', '.join(each.name for each in kinds)} carries {asked}"]
    best = min(sizes, key=lambda size: (size.dollars_per_hour, size.replicas))
    return [
        f"endpoint: {asked}:",
        f"  {best.replicas} replicas of {best.tensor} {best.on.device} on {best.nodes} × {best.on.name}, "
        f"{best.slots} answers at a time each, ${best.dollars_per_hour:,.2f} an hour",
    ]
