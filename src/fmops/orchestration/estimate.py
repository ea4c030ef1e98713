"""How long a stage will take, before it runs.

Enters: a step and what this workspace has measured. Leaves: seconds, and where the figure comes from.
Refuses: to guess where it knows nothing; then it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmops.artifacts import Source
from fmops.lifecycle import Pretrain
from fmops.orchestration.plan import Step
from fmops.store import Record

ASSUMED_FLOPS_PER_THREAD = 40e9
"""Sustained fp32 training on one current server core, measured with SmolLM2-135M (docs/log.md)."""


BYTES_PER_PARAMETER = {"q4": 0.63, "q5": 0.75, "q6": 0.88, "q8": 1.07, "bf16": 2.0, "f16": 2.0, "f32": 4.0}
"""Of weights by the quantisation that a GGUF file's name states; safetensors are taken for 16 bits."""


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one step."""

    tokens: int | None
    wall_s: float | None
    basis: str
    """`measured` (the same node ran here), `computed` (from model size and tokens), or `unknown`."""


def parameters_of(base: Source) -> int | None:
    """About how many parameters a model has that is not imported yet, from the size of its files."""
    total = 0.0
    for file in base.files:
        name = file.name.lower()
        if name.endswith((".gguf", ".safetensors")):
            stated = next((size for mark, size in BYTES_PER_PARAMETER.items() if mark in name), 2.0)
            total += file.bytes / stated
    return round(total) or None


def estimate(step: Step, newest: Mapping[str, Record], *, threads: int, parameters: int | None) -> Estimate:
    """Seconds for one step: from its last run in this workspace, scaled by tokens; else from 6·parameters·tokens."""
    config: Any = step.node.config
    tokens = config.tokens if isinstance(config, Pretrain) else getattr(config, "max_tokens", None)
    tokens = tokens if step.node.stage.name in ("pretrain", "instruct") else None
    if step.state == "cached":
        return Estimate(tokens=tokens, wall_s=0.0, basis="cached")
    last = newest.get(step.node.name)
    if last is not None:
        scale = tokens / last.artifact["trained_tokens"] if tokens and last.artifact.get("trained_tokens") else 1.0
        return Estimate(tokens=tokens, wall_s=last.cost["wall_s"] * scale, basis="measured")
    if tokens and parameters:
        return Estimate(
            tokens=tokens, wall_s=6 * parameters * tokens / (ASSUMED_FLOPS_PER_THREAD * threads), basis="computed"
        )
    return Estimate(tokens=tokens, wall_s=None, basis="unknown")
