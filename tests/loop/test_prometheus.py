"""The alerts on a real gateway: Prometheus scrapes it, Alertmanager tells, sixty times as fast as in production."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from gateway_process import asking, gateway, until

from benchmarks.gateway import free_port
from fmops.deployment.monitoring import dashboard

RULES = Path(dashboard.__file__).parent / "prometheus" / "alerts.yaml"
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or ALERTMANAGER is None,
    reason="Prometheus and Alertmanager are not here (Debian: apt-get install prometheus prometheus-alertmanager)",
)
CHAT = "/v1/chat/completions"
SECONDS = {"m": 1, "h": 60}


def sped_up(rules: str) -> str:
    """The rules with every duration of minutes and hours divided by sixty; nothing else is touched."""
    return re.sub(r"(for: |\[)(\d+)([mh])\b", lambda found: f"{found[1]}{int(found[2]) * SECONDS[found[3]]}s", rules)


class Pager:
    """Who is told: `firing` holds the alerts that were told and not called off, `told` all that ever were."""

    def __init__(self) -> None:
        self.firing: set[str] = set()
        self.told: set[str] = set()
        pager = self

        class Ear(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]:
                    name = alert["labels"]["alertname"]
                    if alert["status"] == "firing":
                        pager.firing.add(name)
                        pager.told.add(name)
                    else:
                        pager.firing.discard(name)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@contextmanager
def watched(folder: Path, metrics_url: str):
    """Prometheus and Alertmanager over one gateway; yields Prometheus' URL and the pager."""
    pager, told_at, seen_at = Pager(), free_port(), free_port()
    threading.Thread(target=pager.server.serve_forever, daemon=True).start()
    (folder / "alerts.yaml").write_text(sped_up(RULES.read_text()))
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": ["alerts.yaml"],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{told_at}"]}]}]},
                "scrape_configs": [
                    {
                        "job_name": "gateway",
                        "static_configs": [{"targets": [metrics_url.removeprefix("http://")]}],
                    }
                ],
            }
        )
    )
    (folder / "alertmanager.yml").write_text(
        yaml.safe_dump(
            {
                "route": {
                    "receiver": "pager",
                    "group_by": ["alertname"],
                    "group_wait": "0s",
                    "group_interval": "1s",
                },
                "receivers": [{"name": "pager", "webhook_configs": [{"url": pager.url, "send_resolved": True}]}],
            }
        )
    )
    commands = [
        [
            ALERTMANAGER,
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/told",
            f"--web.listen-address=127.0.0.1:{told_at}",
            "--cluster.listen-address=",
        ],
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/seen",
            f"--web.listen-address=127.0.0.1:{seen_at}",
            "--rules.alert.resend-delay=1s",
        ],
    ]
    with (folder / "log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    try:
        yield f"http://127.0.0.1:{seen_at}", pager
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)
        pager.server.shutdown()
        pager.server.server_close()


def test_alerts_fire_and_are_called_off_on_a_real_gateway(tmp_path):
    with FakeEngine("release-old") as engine:
        watch = None
        try:
            with gateway(tmp_path / "house", engine) as door:
                watch = watched(tmp_path, door.admin)
                prometheus, pager = watch.__enter__()

                def asking_until(text: str, condition) -> None:
                    def told() -> bool:
                        door.client.post(CHAT, json=asking(text))
                        return condition()

                    until(told, within_s=60)

                # Two minutes without a scrape are two seconds here, which a busy machine needs to start: it must end.
                alarms = {"FmopsErrorBudgetBurnsFast", "FmopsSecretInAnswer", "FmopsGatewayGone"}
                asking_until("hello", lambda: pager.firing >= {"FmopsWatchdog"} and not pager.firing & alarms)
                assert not pager.told & (alarms - {"FmopsGatewayGone"})
                # The engine fails; then its circuit opens, which is a failure to the client as well.
                asking_until("[500]", lambda: "FmopsErrorBudgetBurnsFast" in pager.firing)
                asking_until("hello", lambda: "FmopsErrorBudgetBurnsFast" not in pager.firing)
                engine.words = ["It is AKIAIOSFODNN7EXAMPLE."]
                asking_until("What is my key?", lambda: "FmopsSecretInAnswer" in pager.firing)
                engine.words = None

                def errors() -> list[float]:
                    """What the recording rule says; empty for a moment when a scrape was missed."""
                    query = {"query": "fmops:request_errors:ratio_rate5m"}
                    found = httpx.get(f"{prometheus}/api/v1/query", params=query).json()["data"]["result"]
                    return [float(series["value"][1]) for series in found]

                until(lambda: errors() == [0.0], within_s=60)
            # Nobody looks at the answers here, and now the gateway is gone, too.
            until(lambda: {"FmopsGatewayGone", "FmopsMonitorSilent"} <= pager.firing, within_s=60)
        finally:
            if watch:
                watch.__exit__(None, None, None)
    assert "FmopsWatchdog" in pager.firing, "who receives alerts still hears that alerting works"


def test_only_durations_are_sped_up():
    before, after = RULES.read_text().splitlines(), sped_up(RULES.read_text()).splitlines()
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    assert ("for: 2m", "for: 2s") in changed
    assert all(re.sub(r"\d+[smh]", "", old) == re.sub(r"\d+[smh]", "", new) for old, new in changed)
    assert not re.search(r"(for: |\[)\d+[mh]", "\n".join(after))
