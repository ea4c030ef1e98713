"""Ask the running Prometheus and Alertmanager whether they see what they should; wait for it two minutes at most.

Enters: their URLs. Leaves: a line a finding, exit code 0 when all hold.
Refuses: a query of the dashboard that is an error.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from importlib.resources import files
from typing import Any

PATIENCE_S = 120
WITH_TRAFFIC = ("Requests by arm", "Failed requests", "Tokens", "Requests under way", "Alarms")
"""Panels that must show something once a few questions were answered; others wait for a rollout, an alarm, a vote."""


def get(url: str) -> Any:
    """The JSON at a URL; Prometheus answers a bad query with 400 and its reason."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)


def problems(prometheus: str, alertmanager: str) -> tuple[list[str], list[str]]:
    """What holds, and what does not (yet)."""
    holds, wrong = [], []

    def note(text: str, *, well: bool) -> None:
        (holds if well else wrong).append(text)

    for target in get(f"{prometheus}/api/v1/targets")["data"]["activeTargets"]:
        error = f" ({target['lastError']})" if target["lastError"] else ""
        note(f"target {target['scrapeUrl']} is {target['health']}{error}", well=target["health"] == "up")
    rules = [rule for group in get(f"{prometheus}/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    sick = [f"{rule['name']}: {rule['health']}" for rule in rules if rule["health"] != "ok"]
    note(f"{len(rules)} rules, of which not well: {', '.join(sick) or 'none'}", well=bool(rules) and not sick)
    dashboard = json.loads(files("fmops.deployment.monitoring").joinpath("prometheus/dashboard.json").read_text())
    queries = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown: dict[str, int] = {}
    for title, query in queries:
        answer = get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        if answer["status"] != "success":
            note(f"the query of {title!r} is an error: {answer['error']}", well=False)
            continue
        shown[title] = shown.get(title, 0) + len(answer["data"]["result"])
    empty = [title for title in WITH_TRAFFIC if not shown.get(title)]
    note(f"{len(queries)} queries of the dashboard; no data where some should be: {', '.join(empty) or 'nowhere'}",
         well=not empty)  # fmt: skip
    alerts = {alert["labels"]["alertname"] for alert in get(f"{alertmanager}/api/v2/alerts")}
    note(f"alerts at the Alertmanager: {', '.join(sorted(alerts)) or 'none'}", well=alerts == {"FmopsWatchdog"})
    return holds, wrong


def main(prometheus: str, alertmanager: str) -> int:
    """Poll until everything holds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            holds, wrong = problems(prometheus, alertmanager)
        except urllib.error.URLError as error:
            holds, wrong = [], [f"nobody answers yet: {error.reason}"]
        if not wrong or time.monotonic() > deadline:
            break
        time.sleep(1)
    print("\n".join([*(f"ok    {text}" for text in holds), *(f"WRONG {text}" for text in wrong)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
