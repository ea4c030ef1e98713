"""The shape of the house: rooms meet only in artifacts, frameworks stay in adapters, the core is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SOURCE / "fmops"
ROOMS = ("data", "pretraining", "finetuning", "evaluation", "deployment", "feedback")
FRAMEWORKS = {
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "datatrove", "lm_eval", "mlflow", "dagster",
    "ray", "pyarrow", "openvino", "openvino_genai", "vllm", "rensa", "py3langid", "gguf", "safetensors", "tokenizers",
}  # fmt: skip


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not top_level_only else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_framework_is_imported_by_adapters_only(path):
    if room_of(path) == "adapters":
        return
    used = {name.partition(".")[0] for name in imports(path)} & FRAMEWORKS
    assert not used, f"{path.name} imports {used}; move that part into src/fmops/adapters"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_never_enters_another(path):
    room = room_of(path)
    if room not in ROOMS:
        return
    others = {other for other in (*ROOMS, "orchestration", "console") if other != room}
    entered = {name for name in imports(path) for other in others if name.startswith(f"fmops.{other}")}
    assert not entered, f"{path.name} imports {entered}; rooms meet only in artifacts"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_console_stands_above_the_house(path):
    if room_of(path) == "console" or path.parent == PACKAGE:
        return
    entered = {name for name in imports(path) if name.startswith("fmops.console")}
    assert not entered, f"{path.name} imports {entered}; the console reads the house, nothing in the house reads it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_adapters_are_imported_where_they_are_used(path):
    if room_of(path) == "adapters":
        return
    early = {name for name in imports(path, top_level_only=True) if name.startswith("fmops.adapters")}
    assert not early, f"{path.name} imports {early} at its top; import it inside the function that needs it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_and_stays_readable(path):
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no module docstring"
    assert text.count("\n") <= 400, f"{path.name} has {text.count(chr(10))} lines; split it"


@pytest.mark.parametrize("module", ["fmops", "fmops.cli", "fmops.lifecycle", "fmops.orchestration.run"])
def test_the_core_loads_no_framework(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & (FRAMEWORKS | {"numpy", "scipy"})
