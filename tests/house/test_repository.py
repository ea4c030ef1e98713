"""What a stranger would trip over: paths of one machine, registry hosts, stale pins, code blocks that do not run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
).stdout.splitlines()
TEXT = [name for name in TRACKED if not name.endswith((".png", ".ico", ".gz", ".parquet"))]
# Written apart, so that this file does not find itself.
FORBIDDEN = ["/wo" + "rk/", "/tmp" + "/t/", "pypi." + "org", "pythonhosted." + "org", "registry.npm" + "js"]
FORBIDDEN += ["/ro" + "ot/"]


@pytest.mark.parametrize("name", TEXT)
def test_no_file_names_this_machine_or_a_registry(name):
    path = ROOT / name
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    assert not [word for word in FORBIDDEN if word in text]


def test_every_dependency_is_pinned_in_the_constraints():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for name, extra in project["project"]["optional-dependencies"].items():
        wanted += extra if name != "all" else []
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0].lower())
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=\[; ]", line)[0].lower()) for line in wanted}
    assert names - pinned - {"pip", "fmops"} == set()


def test_the_readme_opens_with_one_sentence_and_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head = text[: text.index("## ")]
    assert "make quickstart" in head
    assert "make test" in head


def test_local_links_in_the_docs_lead_somewhere():
    broken = []
    for page in [ROOT / name for name in TRACKED if name.endswith(".md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} → {target}")
    assert not broken


@pytest.mark.xdist_group("here")
def test_groups_of_tests_reach_the_workers(request):
    """Without, each worker would make what a group shares: the small lifecycle, a Ray cluster, an applied cluster."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("no workers, or no --dist loadgroup")
    assert request.node.nodeid.endswith("@here")
