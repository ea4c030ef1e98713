"""Alerts fire when they should and only then, and ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from benchmarks.simulated import Production
from fmops.artifacts import Alarm, DriftReport
from fmops.deployment.monitoring import dashboard as pictures
from fmops.deployment.monitoring.monitor import metrics_text as monitor_metrics
from fmops.deployment.rollout.controller import Saved
from fmops.deployment.rollout.controller import metrics_text as rollout_metrics
from fmops.deployment.rollout.evidence import Evidence
from fmops.deployment.rollout.machine import State
from fmops.deployment.serving.gateway.metrics import GatewayMetrics
from fmops.orchestration.run_metrics import RunMetrics
from fmops.production import Monitor, Rollout

RULES = Path(pictures.__file__).parent / "prometheus" / "alerts.yaml"
CASES = Path(__file__).parent / "alerts.promtool.yaml"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: `make -C infra promtool` takes it from Debian"
)


def promtool(folder: Path, *arguments: str, rules: str | None = None) -> subprocess.CompletedProcess:
    (folder / "alerts.yaml").write_text(rules or RULES.read_text())
    shutil.copy(CASES, folder)
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path):
    done = promtool(tmp_path, "test", "rules", CASES.name)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_cases_notice_a_changed_rule(tmp_path):
    changed = RULES.read_text().replace("14.4 * 0.005", "34.4 * 0.005")
    assert promtool(tmp_path, "test", "rules", CASES.name, rules=changed).returncode != 0


def test_every_alert_has_a_case_a_severity_and_says_what_to_do():
    alerts = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule
    ]
    tested = set(re.findall(r"alertname: (\w+)", CASES.read_text()))
    untested = {"FmopsSlowFirstToken"}  # a histogram of six series says little more than its expression
    assert {alert["alert"] for alert in alerts} - tested == untested
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket", "info", "none")
        assert alert["annotations"]["summary"]
        assert alert["alert"] == "FmopsWatchdog" or alert["annotations"]["action"]


def exported() -> str:
    """Everything that gateway, rollout, monitor and runs export, on real values."""
    gateway = GatewayMetrics(in_flight=lambda: 0, waiting=lambda: 0, routes_version=lambda: 1)
    for trace in Production(seed=0, rates={"failed": 0.0, "secret": 1.0}).serve(3, canary=0.5):
        gateway.answered(trace)
    gateway.refused.labels("overloaded").inc()
    gateway.feedback.labels("up").inc()
    report = DriftReport(
        path=Path(), release="release-a", at_s=1.0, answers=10, rates={"empty": (1, 10)}, reference={},
        levels={"empty": 0.1, "topic": float("inf")}, golden=1.0,
        alarms=(Alarm(signal="empty", kind="harm", at_s=1.0, level=2, threshold=1, answers=5),),
    )  # fmt: skip
    state = State(id="r", champion="a", challenger="b", started_s=0, entered_s=0)
    saved = Saved(policy=Rollout(), state=state, evidence=Evidence.none_yet("a", "b", {}))
    with TemporaryDirectory() as folder:
        runs = RunMetrics(Path(folder), stages=["pretrain"]).text()
    return gateway.text().decode() + monitor_metrics(report, Monitor()) + rollout_metrics(saved) + runs


def test_rules_and_dashboard_ask_for_metrics_that_exist():
    found = set(re.findall(r"^([a-z_]+)(?:\{| )", exported(), re.MULTILINE))
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    queries = [query for row in pictures.ROWS.values() for panel in row for query in panel.queries.values()]
    asked = set(re.findall(r"\b(?:fmops|gen_ai)[a-z0-9_:]+", RULES.read_text() + " ".join(queries)))
    names = {name for name in asked if name not in recorded and not name.startswith("gen_ai_token_type")}
    assert names - found == set()


@needs_promtool
def test_what_is_exported_is_prometheus_text():
    done = subprocess.run(["promtool", "check", "metrics"], input=exported(), capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "no help text" not in line]
    assert done.returncode in (0, 3), done.stderr
    assert not complaints


def test_the_committed_dashboard_is_the_code_s():
    path = RULES.parent / "dashboard.json"
    assert path.read_text() == pictures.dashboard_json(), "python -m fmops.deployment.monitoring.dashboard > " + str(
        path
    )
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
        assert place["x"] + place["w"] <= 24
