"""Fixtures that every kind of test shares: a real, tiny model; a silent stage context."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "quickstart"))
sys.path.insert(0, str(ROOT / "tests"))  # example_run, fake_engine
sys.path.append(str(ROOT / "end-to-end/vision-language"))  # tiny_vlm; behind, as it has a `prepare` of its own

# helm and promtool, where `make -C infra tools` put them.
os.environ["PATH"] = f"{ROOT / 'infra/.tools'}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# moto reads this once, when the first test of a worker imports it; Terraform attaches AWS's own policies.
os.environ.setdefault("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
# Workers share two cores; more threads each would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what their module made (a server, a trained model) go to one worker: two would make it twice."""
    for item in items:
        found = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - pytest has no public name for it
        shares = any(definitions[-1].scope == "module" for definitions in found.values())
        if shares and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a small random Llama and its tokenizer. Read only."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def context():
    """A stage context whose reports are kept in `context.stream`."""
    from fmops.stage import StageContext

    return StageContext(stream=io.StringIO())
