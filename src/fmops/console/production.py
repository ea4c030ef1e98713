"""What production does, in figures: rollout and its evidence, signals, processes, traffic; what is wrong, in words.

Enters: what controller, monitor, supervisor and gateway left on disk or answer. Leaves: plain values for the page.
Refuses: to decide. Orders that fit, and what would follow, are asked of the rollout's own pure functions.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, get_args

from fmops.artifacts import DriftReport
from fmops.deployment.monitoring.process import STALE_S
from fmops.deployment.rollout.controller import Saved
from fmops.deployment.rollout.evidence import REQUIRED, SHOWN
from fmops.deployment.rollout.machine import ENDED, LATENCY_BUDGET, Order, RolloutConflict, advance
from fmops.deployment.serving.routes import ROUTES, RoutesFile
from fmops.deployment.serving.supervisor import FOLDER, is_running, read_state
from fmops.orchestration.project import Project
from fmops.orchestration.up import gateway_url, metrics_url
from fmops.production import Monitor

PROBE_S = 1.0
PERCENTILES = {"p50": 0.5, "p95": 0.95}
Part = dict[str, Any]


def rollout(saved: Saved | None, now: float) -> Part | None:
    """The rollout and its evidence; logs are natural."""
    if saved is None:
        return None
    state, evidence, policy = saved.state, saved.evidence, saved.policy
    ended = state.phase in ENDED
    unproven = evidence.unproven(policy.alpha)
    signals = [
        {
            "name": name,
            "champion": [one.champion.events, one.champion.n],
            "canary": [one.canary.events, one.canary.n],
            "pairs": one.shadow_harm.n,
            "log_harm": one.log_harm,
            "log_fine": one.log_fine,
            "margin": one.fine.margin,
            "needed": name in REQUIRED or one.champion.n >= SHOWN,
            "proven": name not in unproven,
        }
        for name, one in evidence.signals.items()
    ]
    return {
        **state.model_dump(mode="json"),
        "share": evidence.shares[-1][1] if evidence.shares and not ended else 0.0,
        "steps": policy.steps,
        "answers": evidence.canary_answers,
        "step_answers": evidence.step_answers,
        "answers_a_step": policy.answers,
        "pairs": evidence.pairs,
        "deadline_s": state.started_s + policy.deadline_hours * 3600,
        "alpha": policy.alpha,
        "log_harm": evidence.log_harm,
        "harm_limit": math.log(1 / (policy.alpha * (1 - LATENCY_BUDGET))),
        "fine_limit": math.log(1 / policy.alpha),
        "signals": signals,
        "unproven": unproven,
        "marks": [mark.model_dump(mode="json") for mark in saved.marks],
        "events": [event.model_dump(mode="json") for event in saved.events],
        "orders": {} if ended else _orders(saved, now),
    }


def _orders(saved: Saved, now: float) -> dict[str, Part]:
    """Orders that fit now → what each would lead to, as the state machine says."""
    found: dict[str, Part] = {}
    orders: tuple[Order, ...] = get_args(Order)
    for order in orders:
        if order == "hold" and saved.state.phase == "held":
            continue
        try:
            after, _ = advance(saved.state, saved.evidence, saved.policy, now, refused=saved.refused, order=order)
        except RolloutConflict:
            continue
        found[order] = {"phase": after.phase, "reason": after.reason}
    return found


def monitor(report: DriftReport | None, policy: Monitor, now: float, *, up: bool) -> Part | None:
    """What is watched, how near each detector is to its alarm, and the diagnosis."""
    if report is None:
        return None
    rows = []
    for name in dict.fromkeys((*report.rates, *report.levels)):
        picture = report.pictures.get(name, {})
        rows.append({
            "name": name, "level": _finite(report.levels.get(name)), "now": report.rates.get(name),
            "normal": report.reference.get(name), "psi": _finite(picture.get("psi")), "ks": _finite(picture.get("ks")),
        })  # fmt: skip
    return {
        "release": report.release,
        "at_s": report.at_s,
        "stale": up and now - report.at_s > STALE_S,
        "answers": report.answers,
        "reference": policy.reference,
        "promise": policy.observations_per_false_alarm,
        "rows": rows,
        "golden": report.golden,
        "golden_error": report.golden_error,
        "alarms": [alarm.model_dump(mode="json") for alarm in reversed(report.alarms)],
        "diagnosis": report.diagnosis.model_dump(mode="json") if report.diagnosis else None,
    }


def serving(project: Project) -> Part:
    """Processes of `fmops up`, the gateway as it says itself, and its traffic."""
    root = project.store.root
    state = read_state(root / FOLDER)
    alive = state is not None and is_running(state.pid, state.created)
    routes = RoutesFile(root / ROUTES).current()
    arms = {target.release: arm for arm in ("champion", "challenger") if (target := getattr(routes, arm))}
    processes = [
        {
            **one.model_dump(mode="json", include={"name", "url", "release", "restarts"}),
            "healthy": one.healthy and is_running(one.pid, one.created),
            "arm": arms.get(one.release or "", "ending" if one.release else None),
            "log": str((root / FOLDER / f"{one.name.replace(' ', '-')}.log").relative_to(root)),
        }
        for one in (state.processes if state else ())
    ]
    gateway = _health(gateway_url(project.spec.serve))
    return {
        "up": alive or gateway != "dead",
        "supervised": alive,
        "gateway": gateway,
        "processes": processes,
        "canary_share": routes.canary_share,
        "shadow_share": routes.shadow_share,
        "traffic": None if gateway == "dead" else traffic(_fetch(metrics_url(project.spec.serve))),
    }


def problems(parts: Mapping[str, Any], *, options: str) -> list[Part]:
    """What keeps users from answers, and what to do; the worst first."""
    found = []
    serving, monitor, champion = parts["serving"], parts["monitor"], parts["aliases"].get("champion")
    for name in ("serving", "rollout", "monitor", "rounds"):
        if parts[name] and "error" in parts[name]:
            found.append((f"{name} cannot be read", parts[name]["error"]))
    if "error" not in serving:
        found += _serving_problems(serving, champion, options)
    if monitor and monitor.get("stale"):
        remedy = f"Why is in up/monitor.log of the workspace; `fmops up {options}` starts it."
        found.append(("The monitor has stopped looking", remedy))
    if parts["run"] and parts["run"]["state"] == "failed":
        found.append((f"Run {parts['run']['id']} ended without a release", parts["run"]["error"]))
    return [{"what": what, "remedy": remedy} for what, remedy in found]


def _serving_problems(serving: Part, champion: str | None, options: str) -> list[tuple[str, str]]:
    if champion is None:
        return [("Nothing is released yet", f"`fmops run {options}` makes a release and lets the gate judge it.")]
    if not serving["up"] and not serving["processes"]:
        return [("Nothing serves the champion", f"Start it with `fmops up {options}`.")]
    found = []
    if serving["processes"] and not serving["supervised"]:
        found.append(("The supervisor has died", f"`fmops up {options}` takes over what still runs."))
    if serving["gateway"] == "dead":
        found.append(("The gateway does not answer", _wait("gateway", serving, options)))
    for one in serving["processes"]:
        if one["release"] and not one["healthy"]:
            found.append((f"The engine of the {one['arm']} does not answer", _wait(one["name"], serving, options)))
    if serving["gateway"] in ("engine failing", "no champion"):
        found.append(
            ("Users get errors", f"The gateway says: {serving['gateway']}. See the engine's line under Serving.")
        )
    return found


def _wait(name: str, serving: Part, options: str) -> str:
    one = next((one for one in serving["processes"] if one["name"] == name), None)
    if one is None or not serving["supervised"]:
        return f"Start it with `fmops up {options}`."
    times = f", {one['restarts']} times so far" if one["restarts"] else ""
    return f"The supervisor starts it again{times}. Why it ended is in {one['log']} of the workspace."


def headline(parts: Mapping[str, Any]) -> str:
    """One sentence: what serves, what it is challenged by."""
    champion = parts["aliases"].get("champion")
    if champion is None:
        return "No release yet."
    serving, rollout = parts["serving"], parts["rollout"]
    verb = "serves" if serving.get("gateway") == "ok" else "is the champion, and does not serve"
    words = f"{champion} {verb}"
    if rollout and rollout.get("phase") in ("checking", "shadow", "canary", "held"):
        share = f", answering {rollout['share'] * 100:g} %" if rollout["share"] else ""
        return f"{words}; {rollout['challenger']} is challenging it{share}."
    return f"{words}."


def traffic(text: str | None) -> list[Part] | None:
    """The gateway's counters by arm: requests, errors, tokens, and percentiles of the first token, in seconds."""
    if text is None:
        return None
    from prometheus_client.parser import text_string_to_metric_families

    arms: dict[tuple[str, str], Part] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "arm" not in sample.labels:
                continue
            who = (sample.labels["arm"], sample.labels["release"])
            arm = arms.setdefault(who, {"requests": 0, "failed": 0, "tokens": 0, "first": {}, "token": {}})
            _add(arm, sample.name, sample.labels, sample.value)
    return [
        {
            "arm": who[0], "release": who[1], **{name: int(arm[name]) for name in ("requests", "failed", "tokens")},
            **{f"{measure}_{name}": _percentile(arm[measure], share)
               for measure in ("first", "token") for name, share in PERCENTILES.items()},
        }
        for who, arm in sorted(arms.items())
    ]  # fmt: skip


def _add(arm: Part, name: str, labels: Mapping[str, str], value: float) -> None:
    match name:
        case "gen_ai_server_request_duration_seconds_count":
            arm["requests"] += value
            if labels["outcome"] == "error" or labels["outcome"].startswith("5"):
                arm["failed"] += value
        case "fmops_tokens_total" if labels["gen_ai_token_type"] == "output":
            arm["tokens"] += value
        case "gen_ai_server_time_to_first_token_seconds_bucket":
            arm["first"][float(labels["le"])] = arm["first"].get(float(labels["le"]), 0) + value
        case "gen_ai_server_time_per_output_token_seconds_bucket":
            arm["token"][float(labels["le"])] = arm["token"].get(float(labels["le"]), 0) + value


def _percentile(buckets: Mapping[float, float], share: float) -> float | None:
    """Linear within its bucket, like Prometheus' histogram_quantile; None without observations, past the last bound."""
    total = buckets.get(math.inf, 0.0)
    below, low = 0.0, 0.0
    for high in sorted(buckets):
        if total and buckets[high] >= share * total:
            inside = buckets[high] - below
            place = (share * total - below) / inside if inside else 1.0
            return None if math.isinf(high) else low + (high - low) * place
        below, low = buckets[high], high
    return None


def _health(url: str) -> str:
    """What the gateway says of itself: ok, draining, no champion, engine failing; `dead` when it says nothing."""
    text = _fetch(f"{url}/health")
    try:
        return str(json.loads(text)["status"]) if text else "dead"
    except (ValueError, KeyError, TypeError):
        return "dead"


def _fetch(url: str) -> str | None:
    """The body, whatever the status; None when nothing answers in time."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")
    except (OSError, ValueError):
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
