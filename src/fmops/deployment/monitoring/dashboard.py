"""The Grafana dashboard, as code: `python -m fmops.deployment.monitoring.dashboard > dashboard.json`.

Enters: nothing. Leaves: dashboard JSON for Grafana 10 and later, with a Prometheus data source to choose.
Refuses: nothing.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

CLIENTS = 'arm!="shadow"'
"""Shadow requests have no client; they count only where arms are compared."""


class Panel(NamedTuple):
    """One picture: a title, its queries with their legends, a unit of Grafana's."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    text: str = ""
    threshold: float | None = None
    """A line to watch."""


ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel(
            "Requests by arm",
            {"{{arm}} {{release}}": "sum by (arm, release) (rate(gen_ai_server_request_duration_seconds_count[5m]))"},
            "reqps",
        ),
        Panel(
            "Failed requests",
            {"5 min": "fmops:request_errors:ratio_rate5m", "1 h": "fmops:request_errors:ratio_rate1h"},
            "percentunit", "Objective 0.5 %; 7.2 % for an hour pages.", 0.005,
        ),
        Panel(
            "First token, 95 %",
            {
                "{{arm}}": "histogram_quantile(0.95, sum by (le, arm) "
                "(rate(gen_ai_server_time_to_first_token_seconds_bucket[5m])))"
            },
            "s",
        ),
        Panel(
            "Tokens",
            {"{{gen_ai_token_type}}": f"sum by (gen_ai_token_type) (rate(fmops_tokens_total{{{CLIENTS}}}[5m]))"},
        ),
        Panel("Refused before an engine", {"{{reason}}": "sum by (reason) (rate(fmops_requests_refused_total[5m]))"}),
        Panel(
            "Requests under way",
            {"all": "fmops_gateway_requests_in_flight", "in line": "fmops_gateway_requests_waiting"},
        ),
    ),
    "Rollout": (
        Panel("Canary share", {"share": "fmops_rollout_canary_share"}, "percentunit"),
        Panel(
            "Evidence of harm",
            {"{{signal}}": 'fmops_rollout_log_e{test="harm"}'},
            text="Log e-value. All signals together reach 3.2: rolled back. Looking often costs nothing.",
            threshold=3.22,
        ),
        Panel(
            "Proof of being within the margins",
            {"{{signal}}": 'fmops_rollout_log_e{test="within margin"}'},
            text="Log e-value. Every signal above 3.0, at the last step: promoted.", threshold=3.0,
        ),
    ),
    "Answers": (
        Panel(
            "Output signals",
            {
                "{{signal}} {{arm}}": "sum by (signal, arm) (rate(fmops_answers_with_signal_total[15m])) / on (arm) "
                "group_left sum by (arm) (rate(gen_ai_server_request_duration_seconds_count[15m]))"
            },
            "percentunit",
        ),
        Panel(
            "Detectors",
            {"{{signal}}": "fmops_drift_level"},
            text="Share of the threshold; when the average over all reaches 1 it is an alarm.",
            threshold=1.0,
        ),
        Panel("Rates since normal was measured", {"{{signal}}": "fmops_signal_rate"}, "percentunit"),
        Panel("Golden prompts as certified", {"share": "fmops_golden_agreement"}, "percentunit", threshold=0.9),
        Panel("Feedback", {"{{kind}}": "sum by (kind) (rate(fmops_feedback_total[1h]))"}),
        Panel("Alarms", {"{{kind}}": "fmops_alarms"}),
    ),
}  # fmt: skip
WIDTH, HEIGHT = 8, 8
"""Of a panel, in Grafana's grid of 24 columns."""


def dashboard() -> dict[str, Any]:
    """The whole dashboard, rows from top to bottom, three panels beside each other."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, members in ROWS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "gridPos": _place(top, 0, 24, 1)}
        )
        top += 1
        for number, panel in enumerate(members):
            line, column = divmod(number, 24 // WIDTH)
            panels.append(_panel(panel, len(panels) + 1, _place(top + line * HEIGHT, column * WIDTH, WIDTH, HEIGHT)))
        top += HEIGHT * -(-len(members) // (24 // WIDTH))
    source = {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "fmops", "title": "FMOps", "tags": ["fmops"], "schemaVersion": 39, "version": 1, "refresh": "30s",
        "timezone": "browser", "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source]}, "annotations": {"list": []}, "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.threshold is not None:
        steps.append({"color": "red", "value": panel.threshold})
    style = {"thresholdsStyle": {"mode": "line" if panel.threshold is not None else "off"}, "lineWidth": 1}
    return {
        "id": number, "type": "timeseries", "title": panel.title, "description": panel.text, "gridPos": place,
        "datasource": source,
        "targets": [
            {"refId": chr(65 + index), "expr": query, "legendFormat": legend, "datasource": source}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}, "custom": style},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }  # fmt: skip


def _place(y: int, x: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def dashboard_json() -> str:
    """The text of dashboard.json."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    print(dashboard_json(), end="")
