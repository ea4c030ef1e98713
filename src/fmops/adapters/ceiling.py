"""What training does at the old domain's ceiling, instead of ending there.

Enters: the watch over a run, whose last measurement may not be kept. Leaves: the kept weights, and half the rate.
Refuses: to try more than three times, or at the last step.
"""

from __future__ import annotations

from typing import Any

from fmops.adapters.trainer import Watch

HALVINGS = 3
"""After these the rate is an eighth: what still forgets too much wants more replay, not more patience."""


def halve_the_rate(
    watch: Watch, model: Any, row: dict[str, float], *, optimizer: Any, lr_scheduler: Any, **_: Any
) -> bool:
    """Put the last weights below the ceiling back and halve the rate of all steps to come; False: the run is to end.

    Batches go on where they are. The curve's row says `rate_halved`, so a resumed run counts the same; schedulers save
    their base rates, so it goes on at the same one, too.
    """
    if row["step"] >= watch.plan.steps or sum("rate_halved" in earlier for earlier in watch.curve) >= HALVINGS:
        return False
    watch.put_back(model)
    lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]
    # The scheduler has set the next step's rate already.
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
    row["rate_halved"] = 1.0
    watch.context.note(
        f"step {row['step']:g} is above the old domain's ceiling: back to the weights of step {watch.kept_step}, "
        "and on at half the rate"
    )
    return True
