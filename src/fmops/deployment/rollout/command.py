"""`fmops rollout`: a person's orders, and where the rollout stands, in words.

Enters: a store, the spec's policy, an action. Leaves: text.
Refuses: an order that does not fit the rollout (exit code 1).
"""

from __future__ import annotations

import math
import time
from typing import Literal, cast

from fmops.artifacts import Release
from fmops.deployment.rollout.controller import Controller, Saved
from fmops.deployment.rollout.machine import ENDED, Order
from fmops.deployment.rollout.traffic import GatewayTraffic
from fmops.errors import FmopsError
from fmops.production import Rollout
from fmops.store import Store

Action = Literal["start", "status", "look", "promote", "hold", "resume", "rollback"]


def run_action(
    store: Store, policy: Rollout, action: str, *, key: str | None = None, why: str = "", seen: str | None = None,
    cluster: GatewayTraffic | None = None,
) -> str:  # fmt: skip
    """Do it, and say where the rollout stands afterwards.

    Args:
        seen: what the person looked at: a rollout's id; with `start`, the champion. If it is another by now, nothing is
            done.
        cluster: whose gateway is meant; None: this machine's.

    Raises:
        FmopsError: there is nothing to roll out, or the order does not fit.
    """
    controller = Controller(store, traffic=cluster, engine=cluster.engine) if cluster else Controller(store)
    if action == "start":
        saved: Saved | None = controller.start(key or _newest(store), policy, seen=seen)
    elif action == "status":
        saved = controller.read()
    else:
        order = None if action == "look" else cast(Order, action)
        saved = controller.look(order, why=why, seen=seen)
    return describe(saved, now=time.time()) if saved else "no rollout yet: `fmops rollout start`"


def describe(saved: Saved, *, now: float) -> str:
    """State, evidence by signal, what is still missing, and what happened so far."""
    state, evidence, policy = saved.state, saved.evidence, saved.policy
    held = f", held by {state.held_by} in {state.held_from}" if state.held_by else ""
    share = evidence.shares[-1][1] if evidence.shares and state.phase not in ENDED else 0.0
    lines = [
        f"{state.id}: {state.phase}{held}: {state.reason}",
        f"{state.challenger} against {state.champion}, canary share {share:.0%}, "
        f"{evidence.canary_answers} answers, {evidence.pairs} shadow pairs",
        f"harm: e = {_e(evidence.log_harm)}; rolls back at {1 / (policy.alpha * 0.8):g}",
    ]
    for name, signal in evidence.signals.items():
        if signal.canary.n or signal.shadow_harm.n:
            lines.append(
                f"  {name:14} canary {signal.canary.events}/{signal.canary.n}, champion {signal.champion.events}/"
                f"{signal.champion.n}, harm e = {_e(signal.log_harm)}, within {signal.fine.margin:g}: "
                f"e = {_e(signal.log_fine)} of {1 / policy.alpha:g}"
            )
    if state.phase not in ENDED:
        unproven = evidence.unproven(policy.alpha)
        lines.append(f"unproven: {', '.join(unproven) or 'nothing'}")
        left = state.started_s + policy.deadline_hours * 3600 - now
        lines.append(f"deadline in {max(0.0, left) / 3600:.1f} h")
    for event in saved.events:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.at_s))
        lines.append(f"{moment} {event.phase} {event.share:.0%}: {event.reason}")
        if event.detectable:
            found = ", ".join(f"{name} +{rise:.3f}" for name, rise in sorted(event.detectable.items()))
            lines.append(f"  finds with 80 % power: {found}")
    return "\n".join(lines)


def _newest(store: Store) -> str:
    champion = store.aliases().get("champion")
    found = [record.key for record in store.records() if record.kind == Release.kind and record.key != champion]
    if not found:
        raise FmopsError(f"there is no release {f'beside {champion}' if champion else 'yet'}. `fmops run` makes one.")
    return found[-1]


def _e(log_e: float) -> str:
    return f"{math.exp(min(log_e, 700)):.3g}"
