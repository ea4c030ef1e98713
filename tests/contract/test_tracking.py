"""MLflow: every run is there once, whatever was killed; aliases move for one of two, never for both."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from example_run import write_example

from fmops.errors import FmopsError
from fmops.store import Store

mlflow = pytest.importorskip("fmops.adapters.mlflow")


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """An empty database: making its tables takes longer than any test here."""
    store = Store(tmp_path_factory.mktemp("tables") / ".fmops")
    with mlflow._client(store):
        return store.root / "mlflow.db"


@pytest.fixture
def workspace(tmp_path, tables) -> tuple[Store, Path]:
    return prepared(tmp_path, tables)


def prepared(root: Path, tables: Path, **how) -> tuple[Store, Path]:
    # MLflow keeps an engine for each path it has seen; pytest gives the path of a passed test to the next one.
    root = Path(tempfile.mkdtemp(dir=root))
    store, folder = write_example(root, **how)
    copy_database(tables, store.root / "mlflow.db")
    return store, folder


def copy_database(source: Path, target: Path) -> None:
    for stale in target.parent.glob("mlflow.db*"):
        stale.unlink()
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as write:
        read.backup(write)


def all_runs(store: Store) -> dict[str, object]:
    with mlflow._client(store) as client:
        experiments = [item.experiment_id for item in client.search_experiments()]
        return {run.info.run_name: run for run in client.search_runs(experiments)}


def history_of(store: Store, run, metric: str) -> list[tuple[int, float]]:
    with mlflow._client(store) as client:
        return [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, metric)]


def test_a_run_has_a_child_for_each_stage_that_was_executed(workspace):
    store, folder = workspace
    parent = mlflow.log_run(store, folder)
    runs = all_runs(store)
    children = {name for name, run in runs.items() if run.data.tags.get("mlflow.parentRunId") == parent}
    assert children == {record.node for record in store.records()} - {"base", "benchmarks"}
    assert set(runs) - children == {folder.name}
    assert runs[folder.name].info.status == "FINISHED"


def test_a_stage_is_logged_with_config_curve_cost_and_identity(workspace):
    store, folder = workspace
    mlflow.log_run(store, folder)
    run, record = all_runs(store)["pretrain"], store.by_key("pretrain")
    assert run.data.params["learning_rate"] == "0.0001"
    assert run.data.metrics["cost/wall_s"] == 151.0
    assert run.data.tags["fmops.fingerprint"] == record.fingerprint
    assert run.data.tags["fmops.digest"] == record.digest
    curve = history_of(store, run, "loss")
    assert [step for step, _ in curve] == list(range(9))
    assert curve[0][1] > curve[-1][1]


def test_logging_a_run_again_adds_nothing(workspace):
    store, folder = workspace
    assert mlflow.log_run(store, folder) == mlflow.log_run(store, folder)
    runs = all_runs(store)
    assert len(runs) == 12
    assert len(history_of(store, runs["pretrain"], "loss")) == 9


def test_a_run_whose_logging_was_cut_off_is_completed_without_doubles(workspace, monkeypatch):
    store, folder = workspace
    metrics = mlflow._metrics

    def dies_at_align(store, node, **how):
        if node.name == "align":
            raise KeyboardInterrupt
        return metrics(store, node, **how)

    monkeypatch.setattr(mlflow, "_metrics", dies_at_align)
    with pytest.raises(KeyboardInterrupt):
        mlflow.log_run(store, folder)
    assert "release" not in all_runs(store)
    monkeypatch.setattr(mlflow, "_metrics", metrics)
    mlflow.log_run(store, folder)
    runs = all_runs(store)
    assert len(runs) == 12
    assert len(history_of(store, runs["pretrain"], "loss")) == 9
    assert runs["align"].info.status == "FINISHED"


@pytest.mark.parametrize(("ends", "status"), [("failed", "FAILED"), ("reject", "FINISHED"), ("killed", "KILLED")])
def test_the_status_says_how_the_run_ended(tmp_path, tables, ends, status):
    store, folder = prepared(tmp_path, tables, ends=ends)
    mlflow.log_run(store, folder)
    runs = all_runs(store)
    assert runs[folder.name].info.status == status
    if ends == "failed":
        assert runs["pretrain"].info.status == "FAILED"
        assert "loss is not finite" in runs["pretrain"].data.tags["fmops.error"]


def test_a_release_becomes_one_version_however_often_it_is_registered(workspace):
    store, folder = workspace
    mlflow.log_run(store, folder)
    release = store.by_key("release")
    assert mlflow.register(store, release) == mlflow.register(store, release) == 1
    with mlflow._client(store) as client:
        version = client.get_model_version("python-assistant", "1")
    assert version.source == store.folder(release.stage, release.fingerprint).as_uri()
    assert version.tags["digest"] == release.digest
    assert version.tags["verdict"] == "promote"
    assert version.run_id == all_runs(store)["release"].info.run_id


def test_the_weights_stay_where_they_are(workspace):
    store, folder = workspace
    mlflow.log_run(store, folder)
    mlflow.register(store, store.by_key("release"))
    copied = {path.name for path in (store.root / "mlflow-artifacts").rglob("*") if path.is_file()}
    assert copied <= {"record.json", "run.json", "report.html"}


def test_the_registry_follows_the_aliases_of_the_workspace(workspace):
    store, _ = workspace
    release = store.by_key("release")
    store.move_aliases({"champion": release.key}, expected={"champion": None}, why="a test")
    mlflow.mirror_release(store, release)
    assert aliases(store) == {"champion": 1}


def two_versions(store: Store) -> None:
    release = store.by_key("release")
    mlflow.register(store, release)
    mlflow.register(store, release.model_copy(update={"fingerprint": "2" * 64}))


def aliases(store: Store) -> dict[str, int]:
    with mlflow._client(store) as client:
        return mlflow._aliases(client, "python-assistant")


def test_promoting_makes_the_old_champion_previous(workspace):
    store, _ = workspace
    two_versions(store)
    mlflow.promote(store, "python-assistant", expected=None, version=1)
    mlflow.promote(store, "python-assistant", expected=1, version=2)
    assert aliases(store) == {"champion": 2, "previous": 1}


def test_a_move_from_a_stale_view_is_refused_and_says_who_moved_it(workspace):
    store, _ = workspace
    two_versions(store)
    mlflow.move_alias(store, "python-assistant", "challenger", expected=None, version=1, why="the nightly round")
    with pytest.raises(FmopsError) as refused:
        mlflow.move_alias(store, "python-assistant", "challenger", expected=None, version=2)
    text = str(refused.value)
    assert "alias 'challenger' of python-assistant points at version 1, expected none" in text
    assert "by pid" in text
    assert "the nightly round" in text
    assert aliases(store) == {"challenger": 1}


RACER = """
import sys
from pathlib import Path
from fmops.adapters.mlflow import promote
from fmops.errors import FmopsError
from fmops.store import Store
root, version = Path(sys.argv[1]), int(sys.argv[2])
try:
    print("ready", flush=True)
    sys.stdin.readline()
    promote(Store(root), "python-assistant", expected=None, version=version)
    print("moved")
except FmopsError as error:
    print("refused", error)
"""


def test_of_two_processes_that_promote_at_once_exactly_one_wins(workspace):
    store, _ = workspace
    two_versions(store)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(store.root), version], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        for version in ("1", "2")
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    outcomes = [racer.communicate(timeout=60)[0] for racer in racers]
    won = [place for place, text in enumerate(outcomes) if text.startswith("moved")]
    assert len(won) == 1, outcomes
    assert "expected none" in outcomes[1 - won[0]]
    assert aliases(store) == {"champion": won[0] + 1}


REBUILD = """
import sys
from pathlib import Path
from fmops.adapters.mlflow import rebuild
from fmops.store import Store
rebuild(Store(Path(sys.argv[1])))
"""


def test_a_lost_database_is_rebuilt_from_records(workspace, tables):
    store, folder = workspace
    release = store.by_key("release")
    store.move_aliases({"champion": release.key}, expected={"champion": None}, why="a test")
    mlflow.log_run(store, folder)
    mlflow.rebuild(store)
    before = {name: (run.data.params, run.data.metrics) for name, run in all_runs(store).items()}
    lost = Store(store.root.rename(store.root.parent / "moved"))
    copy_database(tables, lost.root / "mlflow.db")
    subprocess.run([sys.executable, "-c", REBUILD, str(lost.root)], check=True)
    after = {name: (run.data.params, run.data.metrics) for name, run in all_runs(lost).items()}
    assert after == before
    assert set(after) == {folder.name, *(record.node for record in lost.records())}
    assert aliases(lost) == {"champion": 1}
