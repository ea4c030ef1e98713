"""What a training's curve tells: a row a step, and at some of them what was measured of the model.

Enters: the rows of a curve. Leaves: the names of its measurements, first and last values, a sentence.
Refuses: nothing. Row 0 is the model before training, and holds every measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Mapping[str, float]
COLUMNS = ("step", "tokens", "loss", "quarantined")
"""What a step leaves; no suite may be called so. Names of held-out losses have an underscore, those of suites none."""


def measured(curve: Sequence[Row]) -> list[str]:
    """Names of what is measured now and then: held-out losses, and the scores of suites."""
    if not curve or curve[0]["step"] != 0:
        return []
    return [name for name in curve[0] if name not in COLUMNS]


def summary(curve: Sequence[Row], *, last: Row) -> dict[str, float]:
    """First and last training loss (nats a token), and each measurement before and after; `last` is the row kept."""
    losses = [row["loss"] for row in curve if "loss" in row and row["step"] <= last["step"]]
    found = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    for name in measured(curve):
        if name in last:
            found |= {f"{name}_before": curve[0][name], f"{name}_after": last[name]}
    return found


def kept_row(curve: Sequence[Row], step: int | None) -> Row:
    """The row of the weights that were kept after `step`; the last one where no step was chosen."""
    return next((row for row in curve if row["step"] == step), curve[-1])


def best_note(curve: Sequence[Row], *, kept: Row, metric: str, stopped: bool) -> str:
    """That earlier weights than the last are kept, and why training ended."""
    early = f"stopped at step {curve[-1]['step']:g}, it got no better: " if stopped else ""
    return (
        f"{early}the weights of step {kept['step']:g} are kept, the best by {metric} ({kept[metric]:.4f}; "
        f"{curve[-1][metric]:.4f} at the end)"
    )
