"""Two machines, one bucket: what one has made the other has, and a kill between upload and record costs nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import local_s3
import pytest

from fmops.errors import FmopsError
from fmops.orchestration.project import Project
from fmops.orchestration.show import find_release

from .conftest import fmops

pytestmark = pytest.mark.xdist_group("lifecycle")

STORE = f"s3://{local_s3.BUCKET}/tiny"


def events(spec: Path) -> list[dict]:
    last = max((spec.parent / ".fmops" / "runs").iterdir())
    return [json.loads(line) for line in (last / "events.jsonl").read_text().splitlines()]


def test_what_one_machine_made_is_there_for_the_other(copied, tmp_path, monkeypatch):
    with local_s3.serve() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        # The workspace was made before anybody named a bucket: it is sent, not made again.
        killed = fmops("run", "--store", STORE, spec=copied, fault="bucket-before-record:1")
        assert killed.returncode == 1
        assert s3.names("tiny/records/") == []
        done = fmops("run", "--store", STORE, spec=copied)
        assert done.returncode == 0, done.stderr
        assert not [event for event in events(copied) if event["event"] == "progress"]
        champion = json.loads((copied.parent / ".fmops" / "aliases.json").read_text())["champion"]

        other = tmp_path / "other machine"
        shutil.copytree(copied.parent, other, ignore=shutil.ignore_patterns(".fmops"))
        spec = other / "lifecycle.yaml"
        again = fmops("run", "--store", STORE, spec=spec)
        assert "nothing to do: 14 stages are up to date" in again.stdout, again.stderr
        assert f"champion: {champion}" in again.stdout
        assert f"store: {STORE}" in fmops("status", "--store", STORE, spec=spec).stdout
        # No weights had to come for that; they do when the release is served, and its signature with them.
        artifacts = other / ".fmops" / "artifacts"
        assert not list(artifacts.rglob("*.safetensors"))
        monkeypatch.setenv("FMOPS_STORE", STORE)
        with pytest.raises(FmopsError, match=r"has no keys/signing\.pub.*export FMOPS_VERIFY_KEY="):
            find_release(Project.open(spec), "champion")
        monkeypatch.setenv("FMOPS_VERIFY_KEY", os.fspath(copied.parent / ".fmops" / "keys" / "signing.pub"))
        record, release = find_release(Project.open(spec), "champion")
        assert record.key == champion
        assert release.model.is_relative_to(artifacts)
        assert (release.model / "model.safetensors").is_file()
