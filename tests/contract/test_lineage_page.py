"""Dagster: stages run in the lifecycle's order, the gate blocks, errors come out as they are, the pages show it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from example_run import write_example

from fmops.errors import FmopsError, GateRejected
from fmops.orchestration import code_location
from fmops.orchestration.project import Project
from fmops.store import Record

dagster = pytest.importorskip("fmops.adapters.dagster")
QUESTION = """{
  assetsOrError { ... on AssetConnection { nodes { key { path } assetMaterializations(limit: 1) { runId } } } }
  assetNodes { assetKey { path } groupName dependencyKeys { path } }
  runsOrError { ... on Runs { results { runId status } } }
}"""


def opened(root: Path, **how) -> tuple[Project, dict[str, Record]]:
    store, _ = write_example(root, **how)
    records = {record.node: record for record in store.records()}
    # Before the first release the champion is the base.
    return Project.open(root / "lifecycle.yaml"), {**records, "evaluate-champion": records.get("evaluate-base")}


def run(project: Project, execute, *nodes: str) -> bool:
    home = project.store.root / "dagster"
    return dagster.run_in_process(
        project.graph, execute, dagster_home=home, selection=nodes or list(project.graph.nodes)
    )


def test_stages_run_once_each_in_the_order_of_the_lifecycle(tmp_path):
    project, records = opened(tmp_path)
    seen: list[str] = []
    assert run(project, lambda name: seen.append(name) or records[name])
    assert seen == list(project.graph.nodes)
    assert statuses(project) == ["SUCCESS"]


def test_a_run_in_the_background_can_be_ended(tmp_path):
    # A shell gives its background jobs SIGINT ignored; Dagster binds SIGTERM to SIGINT. Engines would inherit both.
    project, records = opened(tmp_path)
    # Ray binds SIGTERM, too, in a worker that tested it before.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run(project, lambda name: records[name], "pretrain")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_only_the_selection_runs(tmp_path):
    project, records = opened(tmp_path)
    seen: list[str] = []
    assert run(project, lambda name: seen.append(name) or records[name], "pretrain", "evaluate-pretrain")
    assert seen == ["pretrain", "evaluate-pretrain"]


def test_a_gate_that_rejects_blocks_the_release(tmp_path):
    project, records = opened(tmp_path, ends="reject")
    seen: list[str] = []
    assert not run(project, lambda name: seen.append(name) or records[name])
    assert seen[-1] == "gate"
    assert statuses(project) == ["FAILURE"]


def test_what_a_stage_raises_comes_out_unchanged(tmp_path):
    project, records = opened(tmp_path)
    mistake = FmopsError("pretrain: lower learning_rate")
    seen: list[str] = []

    def execute(name: str) -> Record:
        seen.append(name)
        if name == "pretrain":
            raise mistake
        return records[name]

    with pytest.raises(FmopsError) as caught:
        run(project, execute)
    assert caught.value is mistake
    assert seen[-1] == "pretrain", "no later stage starts"
    assert statuses(project) == ["FAILURE"]


def statuses(project: Project) -> list[str]:
    with dagster.open_instance(project.store.root / "dagster") as instance:
        return [found.status.value for found in instance.get_runs()]


def test_ctrl_c_ends_the_stage_and_the_run(tmp_path):
    project, records = opened(tmp_path)

    def execute(name: str) -> Record:
        if name == "corpus":
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        return records[name]

    with pytest.raises(KeyboardInterrupt):
        run(project, execute)
    assert statuses(project)[0] in ("FAILURE", "CANCELED")


def test_a_materialisation_holds_what_the_record_holds(tmp_path):
    project, records = opened(tmp_path)
    run(project, records.__getitem__)
    with dagster.open_instance(project.store.root / "dagster") as instance:
        shown = instance.get_latest_materialization_event(dagster.asset_key("align")).asset_materialization
    assert shown.metadata["fingerprint"].value == records["align"].fingerprint
    assert shown.metadata["cost/wall_s"].value == 61.0
    assert shown.metadata["trained_tokens"].value == 16_500


def test_a_lost_database_is_told_again_from_records(tmp_path):
    project, records = opened(tmp_path)
    run(project, records.__getitem__, "base")
    home = project.store.root / "dagster"
    assert dagster.rebuild(project.store, dagster_home=home) == len(project.store.records()) - 1
    assert dagster.rebuild(project.store, dagster_home=home) == 0


def test_nodes_and_sources_are_assets_with_their_dependencies(tmp_path):
    project, _ = opened(tmp_path)
    defs = dagster.definitions(project.graph, lambda name: pytest.fail(name), project.store)
    graph = defs.resolve_asset_graph()
    corpus = graph.get(dagster.asset_key("corpus"))
    parents = {key.to_user_string() for key in corpus.parent_keys}
    assert {"base", "benchmarks", "source/docs_.txt", "source/general.jsonl"} == parents
    assert graph.get(dagster.source_key("general.jsonl")).is_external
    assert {key.name for key in graph.asset_check_keys} == {"promote"}


def test_the_page_does_not_release_what_the_gate_rejected(tmp_path, monkeypatch):
    project, records = opened(tmp_path, ends="reject")
    steps = {name: Planned(records.get(name)) for name in project.graph.nodes}
    monkeypatch.setattr(Project, "planner", lambda self: Plans(steps))
    with pytest.raises(GateRejected, match="the gate says reject; release is not made"):
        code_location.materialise(project, "release")
    assert code_location.materialise(project, "corpus") == records["corpus"]


class Planned:
    def __init__(self, record: Record | None) -> None:
        self.record, self.fingerprint, self.reason = record, "f" * 64, "never run"


class Plans:
    def __init__(self, steps: dict[str, Planned]) -> None:
        self.steps = steps

    def plan(self) -> dict[str, Planned]:
        return self.steps


def test_a_taken_port_is_refused_by_name(tmp_path):
    import socket

    from fmops.orchestration.ui import serve_ui

    project, _ = opened(tmp_path, ends="empty")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FmopsError, match=rf"port {port} on 127.0.0.1 cannot be used .* Name another with --port"):
            serve_ui(project, port=port)


def ask(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def session_members(leader: int) -> list[int]:
    """Processes of this machine whose parent was `leader`."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == leader:
            members.append(int(status.parent.name))
    return members


@pytest.mark.slow
def test_both_pages_show_these_very_runs_and_end_on_ctrl_c(tmp_path):
    project, records = opened(tmp_path)
    run(project, records.__getitem__)
    code = "import sys; from pathlib import Path; from fmops.orchestration.project import Project; "
    code += "from fmops.orchestration.ui import serve_ui; import functools; "
    code += "serve_ui(Project.open(Path(sys.argv[1])), port=0, say=functools.partial(print, flush=True))"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(project.spec_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = [server.stdout.readline() for _ in range(3)]
        lineage, tracking = lines[0].split()[1].removesuffix("/asset-groups"), lines[1].split()[1]
        assert "1 run and 13 artifacts" in lines[2]
        children = session_members(server.pid)
        data = ask(f"{lineage}/graphql", {"query": QUESTION})["data"]
        made = {
            "/".join(node["key"]["path"]) for node in data["assetsOrError"]["nodes"] if node["assetMaterializations"]
        }
        assert made == set(project.graph.nodes)
        assert {node["groupName"] for node in data["assetNodes"]} >= {"data", "pretraining", "finetuning", "sources"}
        assert [row["status"] for row in data["runsOrError"]["results"]] == ["SUCCESS"]
        runs = ask(f"{tracking}/api/2.0/mlflow/runs/search", {"experiment_ids": ["1", "2"]})["runs"]
        assert {"pretrain", "20260921-142640-0a1b"} <= {row["info"]["run_name"] for row in runs}
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        server.stdout.close()
    assert server.returncode == 0
    assert len(children) == 2
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_the_loop_is_a_job_whose_schedule_a_person_switches_on(tmp_path):
    project, _ = opened(tmp_path)
    said: list[str] = []
    defs = dagster.definitions(
        project.graph, lambda name: pytest.fail(name), project.store, look=lambda: said.append("looked") or ["done"]
    )
    assert defs.resolve_job_def("loop").execute_in_process().success
    assert said == ["looked"]
    schedule = defs.resolve_schedule_def("loop_schedule")
    assert schedule.default_status.value == "STOPPED"
