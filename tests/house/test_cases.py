"""docs/cases.md names tests that exist; and no file of the repository holds a secret (A15)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from fmops.deployment.monitoring.signals import SECRETS
from fmops.redaction import redact

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "cases.md").read_text())
    assert len(named) > 50
    missing = [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing


def test_no_file_of_the_repository_holds_a_secret():
    """Tests need made-up ones, and elsewhere AWS's own example stands for all."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = {}
    for name in listed.decode().split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            text = (ROOT / name).read_bytes().decode("utf-8", "replace").replace("AKIAIOSFODNN7EXAMPLE", "")
            if kinds := [kind for kind, count in redact(text)[1].items() if count and kind in SECRETS]:
                found[name] = kinds
    assert not found
