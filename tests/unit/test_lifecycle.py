"""A spec is read whole or refused, with every mistake, its line and the nearest valid name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmops.errors import FmopsError
from fmops.lifecycle import Lifecycle, read_lifecycle
from fmops.orchestration.project import Project
from fmops.starter import SCHEMA, lifecycle_schema, write_starter

GOOD = """\
name: assistant
base: ./base
data:
  corpora:
    docs: {source: ./docs/*.txt}
pretrain:
  tokens: 16_000
"""


def read(tmp_path: Path, text: str) -> Lifecycle:
    path = tmp_path / "lifecycle.yaml"
    path.write_text(text, encoding="utf-8")
    return read_lifecycle(path)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(FmopsError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_a_spec_becomes_a_typed_object(tmp_path):
    spec = read(tmp_path, GOOD)
    assert spec.pretrain is not None
    assert spec.pretrain.tokens == 16_000
    assert spec.data.corpora["docs"].source == ("./docs/*.txt",)
    assert spec.instruct is None


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    spec = read(tmp_path, GOOD.replace("16_000", "1e9") + "  learning_rate: 3e-5\n")
    assert spec.pretrain is not None
    assert spec.pretrain.tokens == 1_000_000_000
    assert spec.pretrain.learning_rate == 3e-5


def test_an_unknown_key_names_the_nearest_one_and_its_line(tmp_path):
    message = refused(tmp_path, GOOD + "  learnig_rate: 1e-4\n")
    assert "lifecycle.yaml:8: unknown key 'learnig_rate' in pretrain. Did you mean 'learning_rate'?" in message


def test_an_unknown_key_inside_a_named_corpus_is_found(tmp_path):
    message = refused(tmp_path, GOOD.replace("{source: ./docs/*.txt}", "{source: a, wieght: 0.2}"))
    assert "lifecycle.yaml:5: unknown key 'wieght' in data.corpora.docs. Did you mean 'weight'?" in message


def test_every_mistake_is_told_at_once(tmp_path):
    message = refused(tmp_path, GOOD.replace("16_000", "many") + "colour: blue\n")
    assert "lifecycle.yaml:7: pretrain.tokens must be a whole number" in message
    assert "got 'many'" in message
    assert "lifecycle.yaml:8: unknown key 'colour'." in message


def test_a_wrong_choice_names_the_nearest(tmp_path):
    message = refused(tmp_path, GOOD + "  tuning: lara\n")
    assert "lifecycle.yaml:8: pretrain.tuning must be 'full' or 'lora'" in message
    assert "Did you mean 'lora'?" in message


def test_a_missing_key_is_named(tmp_path):
    assert "base is missing" in refused(tmp_path, "name: a\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nbase: b\npretrain: {tokens: 5}\n", "pretrain needs a corpus with role train"),
        (GOOD + "  old_domain_ceiling: 0.1\n", "old_domain_ceiling needs a corpus with role replay"),
        (GOOD + "  patience: 2\n", "pretrain.patience waits for better weights: add `keep: best`, or drop it"),
        (GOOD + "  metric: old_bits_per_byte\n", "pretrain.metric old_bits_per_byte needs a corpus with role replay"),
        (GOOD + "  warmup: 0.6\n  decay: 0.6\n", "exceed the whole run"),
        (GOOD + "instruct: {}\n", "instruct needs data.conversations"),
        (GOOD + "align: {}\n", "align needs data.preferences"),
        ("name: x\nbase: b\ndata: {conversations: {source: c}}\ninstruct: {documents: 0.2}\n", "Add a corpus"),
        (GOOD + "gate: {}\n", "gate needs evaluate"),
        ("name: a\nbase: b\nevaluate: {suites: [domain]}\n", "the suite domain is made from held-out documents"),
        (GOOD + "evaluate: {suites: [forgetting]}\n", "the suite forgetting is made from held-out old documents"),
        (GOOD + "evaluate: {suites: [bias]}\ngate: {}\n", "gate.primary asks for domain, which no suite measures"),
        (GOOD.replace("{source: ./docs/*.txt}", "{source: a, weight: 0.2}"), "sum to 0.2"),
        (GOOD + "evaluate: {suites: [bias, bias]}\n", "suites named twice: bias"),
    ],
)
def test_what_could_not_run_is_refused_with_the_remedy(tmp_path, text, problem):
    assert problem in refused(tmp_path, text)


def test_all_that_could_not_run_is_told_at_once_each_with_its_line(tmp_path):
    message = refused(tmp_path, GOOD + "  old_domain_ceiling: 0.1\ninstruct: {}\ngate: {}\n")
    assert "lifecycle.yaml:8: pretrain.old_domain_ceiling needs a corpus with role replay" in message
    assert "lifecycle.yaml:9: instruct needs data.conversations" in message
    assert "lifecycle.yaml:10: gate needs evaluate" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("evaluate: {suites: [capabilty]}", "unknown suite 'capabilty'. Did you mean 'capability'?"),
        (
            "evaluate: {suites: bias}\ngate: {primary: [], margins: {bais: 1}}",
            "unknown family under gate.margins 'bais'. Did you mean 'bias'?",
        ),
        (
            "evaluate: {suites: capability}\ngate: {primary: [], guards: {mmlo: 0.1}}",
            "unknown task under gate.guards 'mmlo'. Did you mean 'mmlu'? Known: boolq, commonsenseqa,",
        ),
        ("rollout: {margins: {refusd: 0.1}}", "unknown signal under rollout.margins 'refusd'. Did you mean 'refused'?"),
        ("monitor: {tolerances: {slo: 0.1}}", "unknown signal under monitor.tolerances 'slo'. Did you mean 'slow'?"),
    ],
)
def test_a_name_that_there_is_not_is_told_with_its_line_before_anything_runs(tmp_path, text, told):
    path = tmp_path / "lifecycle.yaml"
    path.write_text(GOOD + text)
    with pytest.raises(FmopsError) as caught:
        Project.open(path)
    assert f"lifecycle.yaml:{8 + text.count(chr(10))}: {told}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: no\nbase: b", "lifecycle.yaml:1: name must be text, got false. YAML reads it otherwise"),
        ("name: My Model\nbase: b", "name does not fit: Lower-case letters, digits, hyphens, got 'My Model'"),
        (
            "name: a\nbase: b\ninstruct: true",
            "yaml:3: instruct must be a mapping of keys to values, got true",
        ),
        ("name: a\nbase: ''", "yaml:2: base must not be empty, got ''"),
        ("name: a\nbase: b\ndata: {conversations: {source: ['']}}", "source.0 must not be empty, got ''"),
        ("name: a\nbase: b\ninstruct:", "yaml:3: instruct: there is nothing below it. Leave the key out to skip it"),
        ("name: a\nbase: b\nrollout: {steps: [0.5, 0.1]}", "yaml:3: rollout.steps: the shares must rise: 0.5, 0.1."),
        ("name: a\nbase: b\ndata: {corpora: {5: {source: a}}}", "data.corpora.5 must be text, got 5"),
        ("name: a\nbase: b\npretrain: {tokens: 1.5}", "pretrain.tokens must be a whole number, got 1.5"),
    ],
)
def test_a_wrong_type_is_told_in_words_of_yaml(tmp_path, text, told):
    assert told in refused(tmp_path, text)


def test_one_name_may_stand_without_a_list(tmp_path):
    spec = read(tmp_path, GOOD + "evaluate: {suites: domain}\ngate: {primary: domain}\n")
    assert spec.evaluate is not None
    assert spec.evaluate.suites == ("domain",)


def test_a_spec_elsewhere_is_named_by_its_path(tmp_path, monkeypatch):
    text = GOOD + "colour: blue\n"
    assert refused(tmp_path, text).startswith(f"{tmp_path}/lifecycle.yaml:8: ")
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path, text).startswith("lifecycle.yaml:8: ")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    message = refused(tmp_path, GOOD + "name: other\n")
    assert "lifecycle.yaml:8: key 'name' stands twice; first on line 1" in message


def test_broken_yaml_is_refused_with_its_line(tmp_path):
    assert "lifecycle.yaml:2: not valid YAML" in refused(tmp_path, "name: a\nbase: b: c\n")


def test_yaml_that_builds_objects_is_refused(tmp_path):
    message = refused(tmp_path, "name: !!python/object/apply:os.system ['true']\nbase: b\n")
    assert "lifecycle.yaml:1:" in message
    assert "plain values only" in message


def test_a_missing_spec_says_how_to_get_one(tmp_path):
    with pytest.raises(FmopsError, match="fmops init"):
        read_lifecycle(tmp_path / "none.yaml")


def test_a_file_instead_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "lifecycle.yaml").write_text(GOOD)
    with pytest.raises(FmopsError, match=r"file is a file. Name a folder for the spec: `fmops init FOLDER`"):
        write_starter(tmp_path / "file")
    with pytest.raises(FmopsError, match=r"the workspace .*file is a file. Name a folder with --workspace"):
        Project.open(tmp_path / "lifecycle.yaml", workspace=tmp_path / "file")
    with pytest.raises(FmopsError, match=r"the workspace .*file/in cannot lie in .*file, which is a file"):
        Project.open(tmp_path / "lifecycle.yaml", workspace=tmp_path / "file" / "in")


def test_a_folder_instead_of_a_spec_is_told_apart(tmp_path):
    with pytest.raises(FmopsError, match=r"is a folder. Name the spec in it with --spec, as in .*/lifecycle.yaml"):
        read_lifecycle(tmp_path)


def test_a_spec_that_may_not_be_read_is_not_said_to_be_unwritable(tmp_path, monkeypatch):
    (tmp_path / "lifecycle.yaml").write_text(GOOD)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(FmopsError, match=r"lifecycle.yaml cannot be read \(Permission denied\)"):
        read_lifecycle(tmp_path / "lifecycle.yaml")


def test_the_starter_is_a_valid_spec_and_is_never_overwritten(tmp_path):
    path = write_starter(tmp_path / "My Model")
    assert read_lifecycle(path).name == "my-model"
    assert (path.parent / ".fmops" / "lifecycle.schema.json").is_file()
    path.write_text("mine")
    with pytest.raises(FmopsError, match="is there already"):
        write_starter(path.parent)
    assert path.read_text() == "mine"


def test_the_shipped_schema_is_the_model_s_own():
    refresh = "run: fmops schema > src/fmops/lifecycle.schema.json"
    assert SCHEMA.read_text(encoding="utf-8") == lifecycle_schema(), refresh


def test_every_key_of_the_schema_says_what_it_does():
    schema = json.loads(lifecycle_schema())
    silent = [
        f"{name}.{field}"
        for name, model in schema["$defs"].items()
        for field, about in model.get("properties", {}).items()
        if "description" not in about and "$ref" not in str(about) and field not in ("framework", "method", "engine")
    ]
    assert len(silent) <= 8, silent


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("? [a, b]\n: 1\n", r"lifecycle.yaml:1: a key must be a plain word"),
        ("name: &a [*a]\n", r"lifecycle.yaml:1: an alias holds itself"),
        ("seed: 2026-99-99\n", r"month must be in 1..12, in a value that looks like a date. Put it into quotes"),
        ("name: a\x00b\n", r"the character .* is not allowed. Remove it"),
    ],
)
def test_yaml_that_is_no_spec_is_told_without_a_traceback(tmp_path, text, told):
    path = tmp_path / "lifecycle.yaml"
    path.write_text(text)
    with pytest.raises(FmopsError, match=told):
        read_lifecycle(path)
