"""How long a stage will take, before it runs.

Enters: a step and what this workspace has measured. Leaves: seconds, and where the figure comes from.
Refuses: to guess where it knows nothing; then it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmops.lifecycle import Pretrain
from fmops.orchestration.plan import Step
from fmops.store import Record

ASSUMED_FLOPS_PER_THREAD = 40e9
"""Sustained fp32 training on one current server core, measured with SmolLM2-135M (docs/log.md)."""


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one step."""

    tokens: int | None
    wall_s: float | None
    basis: str
    """`measured` (the same node ran here), `computed` (from model size and tokens), or `unknown`."""


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
