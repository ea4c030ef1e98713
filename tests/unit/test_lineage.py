"""Why two artifacts differ, and what stands above and below one."""

from __future__ import annotations

import pytest
from example_run import write_example

from fmops.orchestration.lineage import diff, render_diff, render_trace, show_record
from fmops.orchestration.provenance import flatten, trace
from fmops.store import FileEntry, Store


@pytest.fixture
def store(tmp_path) -> Store:
    return write_example(tmp_path)[0]


def changed(store: Store, **spec) -> Store:
    """The same workspace after a second run with another spec."""
    return write_example(store.root.parent / "again", spec=spec)[0]


def merged(first: Store, second: Store) -> Store:
    for record in second.records():
        if first.find(record.stage, record.fingerprint) is None:
            folder = first.folder(record.stage, record.fingerprint)
            second.folder(record.stage, record.fingerprint).rename(folder)
    return first


def test_an_artifact_does_not_differ_from_itself(store):
    record = store.by_key("align")
    assert diff(store, record, record) == []
    assert "are the same: equal recipe, equal content." in render_diff(record, record, [])


def test_a_changed_rate_is_named_as_the_first_cause_two_stages_below(store):
    second = changed(store, pretrain={"tokens": 16_384, "learning_rate": 0.0002})
    before, after = store.by_key("pretrain"), second.by_key("pretrain")
    after_instruct = second.by_key("instruct")
    before_instruct = store.by_key("instruct")
    # The example's weights do not depend on the rate; real ones do.
    after_digest = after.model_copy(update={"digest": "d" * 64})
    inputs = {**after_instruct.inputs}
    inputs["checkpoint"] = inputs["checkpoint"].model_copy(update={"digest": after_digest.digest})
    after_instruct = after_instruct.model_copy(update={"inputs": inputs})
    found = diff(merged(store, second), before_instruct, after_instruct)
    causes = [item for item in found if item.cause]
    assert ("inputs.checkpoint.config.learning_rate", "0.0001", "0.0002") in [
        (item.field, item.before, item.after) for item in causes
    ]
    assert before.key != after.key
    text = render_diff(before_instruct, after_instruct, found)
    assert "First cause: inputs.checkpoint.config" in text


def test_an_edited_source_is_a_cause(store):
    record = store.by_key("conversations")
    edited = record.inputs["source"].model_copy(update={"digest": "0" * 64})
    other = record.model_copy(update={"inputs": {**record.inputs, "source": edited}})
    found = diff(store, record, other)
    assert [(item.group, item.field, item.cause) for item in found] == [("source", "inputs.source", True)]
    assert "conversations.jsonl (000000000000)" in found[0].after


def test_other_content_from_the_same_recipe_is_called_not_reproducible(store):
    record = store.by_key("pretrain")
    weights = {**record.files, "model/config.json": FileEntry(sha256="1" * 64, bytes=3)}
    environment = {**record.environment, "threads": 4, "command": "fmops stage pretrain --fingerprint x"}
    other = record.model_copy(update={"files": weights, "environment": environment, "digest": "2" * 64})
    found = diff(store, record, other)
    assert {(item.group, item.field) for item in found} == {
        ("environment", "environment.threads"),
        ("file", "model/config.json"),
    }
    assert "this stage is not reproducible across what is listed under environment" in render_diff(record, other, found)


def test_code_version_and_seed_are_causes(store):
    record = store.by_key("gate")
    found = diff(store, record, record.model_copy(update={"version": 99, "seed": 7}))
    assert [(item.field, item.cause) for item in found] == [("code version", True), ("seed", True)]


def test_a_file_that_only_one_side_has_is_listed(store):
    record = store.by_key("gate")
    other = record.model_copy(update={"files": {}})
    assert [(item.field, item.after) for item in diff(store, record, other)] == [("gate.json", "—")]


def test_a_release_leads_back_to_every_source_with_its_digest(store):
    sources = trace(store.by_key("release"), store.records()).sources()
    assert {"./base-model", "docs/*.txt", "general.jsonl", "conversations.jsonl", "preferences.jsonl"} <= set(sources)
    assert all(len(digest) == 64 for digest in sources.values())


def test_a_release_leads_back_to_the_verdict_and_to_where_every_document_is_listed(store):
    text = render_trace(store, store.by_key("release"))
    gate, corpus = store.by_key("gate"), store.by_key("corpus")
    assert f"{gate.key}  {gate.artifact['verdict']}" in text
    assert f"{corpus.key}  {corpus.artifact['documents']:,} documents" in text
    assert f"each is named in {store.folder(corpus.stage, corpus.fingerprint)}/documents.jsonl" in text


def test_a_corpus_leads_on_to_everything_built_on_it(store):
    text = render_trace(store, store.by_key("corpus"))
    below = text[text.index("and used by") :]
    for node in ("pretrain", "instruct", "align", "evaluate-candidate", "gate", "release"):
        assert f"  {node}" in below
    assert "conversations" not in below


def test_an_input_whose_record_is_gone_is_named_as_gone(store):
    corpus = store.by_key("corpus")
    (store.folder(corpus.stage, corpus.fingerprint) / "record.json").unlink()
    assert f"{corpus.key}  (its record is gone)" in render_trace(store, store.by_key("pretrain"))


def test_show_tells_result_config_inputs_cost_and_files(store):
    record = store.by_key("pretrain")
    text = show_record(store, record)
    for part in (record.key, record.digest, "learning_rate", "0.0001", "loss_first", "151.0 s", "curve.jsonl", "torch"):
        assert part in text
    assert "\x1b[" not in text, "piped text has no colour codes"


def test_shown_text_is_never_read_as_markup(store):
    record = store.by_key("gate").model_copy(update={"environment": {"host": "[red]box[/red]"}})
    assert "[red]box[/red]" in show_record(store, record)


def test_lists_are_named_by_what_they_are_about():
    flat = flatten({"metrics": [{"task": "mmlu", "name": "acc", "value": 0.5}], "n": {"x": 1}, "plain": [1, 2]})
    assert flat == {
        "metrics.mmlu.acc.task": "mmlu",
        "metrics.mmlu.acc.name": "acc",
        "metrics.mmlu.acc.value": 0.5,
        "n.x": 1,
        "plain": [1, 2],
    }
