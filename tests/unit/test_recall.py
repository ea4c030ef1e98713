"""From a bad document to what serves it; from an answer to its documents; who vouches for a release."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from fmops.adapters.signing import make_keys
from fmops.deployment.serving.routes import ROUTES, Routes, RoutesFile, Target
from fmops.errors import FmopsError, IntegrityError
from fmops.orchestration.lineage import render_answer, render_bom
from fmops.orchestration.recall import recall, render_recall
from fmops.orchestration.signatures import PRIVATE_KEY, PUBLIC_KEY, check_release, sign_release, signature_path
from fmops.traces import DayLog, Trace
from tests.example_run import write_example


@pytest.fixture
def store(tmp_path):
    return write_example(tmp_path / "project")[0]


@pytest.fixture
def release(store):
    return store.by_key("release")


def add_rows(store, node: str, name: str, *rows: dict) -> None:
    record = store.by_key(node)
    (store.folder(record.stage, record.fingerprint) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_document_leads_to_every_model_and_release_built_on_it_and_to_who_serves_them(store, release):
    add_rows(store, "corpus", "documents.jsonl", {"id": "docs/bad.txt", "source": "docs", "sha256": "ab" * 32})
    store.move_aliases({"champion": release.key}, expected={"champion": None}, why="test")
    found = recall(store, "docs/bad.txt")
    assert {record.node for record in found.affected} >= {"corpus", "pretrain", "instruct", "align", "gate", "release"}
    assert not {record.node for record in found.affected} & {"base", "benchmarks", "conversations", "preferences"}
    assert found.served == {"champion": release.key}
    text = render_recall(found)
    assert f"champion → {release.key}" in text
    assert "stop serving (`fmops down`): no release here is free of it" in text
    assert "remove it from its source (docs), then `fmops run`" in text


@pytest.mark.parametrize("name", ["ab" * 32, "bad.txt", "docs"])
def test_a_document_is_found_by_digest_path_and_source(store, name):
    add_rows(store, "corpus", "documents.jsonl", {"id": "docs/bad.txt", "source": "docs", "sha256": "ab" * 32})
    assert [match.document for match in recall(store, name).matches] == ["docs/bad.txt"]


def test_an_artifact_is_recalled_by_its_node_where_no_document_is_called_so(store):
    assert recall(store, "conversations").affected[0].node == "conversations"
    with pytest.raises(FmopsError, match="is called 'conversation'"):
        recall(store, "conversation")


def test_only_a_release_is_signed(store):
    with pytest.raises(FmopsError, match=r"pretrain-\w+ is a checkpoint. Only a release is signed"):
        sign_release(store, store.by_key("pretrain"))


def test_an_example_of_instruction_tuning_leaves_pretraining_alone(store):
    add_rows(store, "conversations", "train.jsonl", {"id": "talks.jsonl:7", "source": "talks.jsonl", "messages": []})
    nodes = {record.node for record in recall(store, "talks.jsonl:7").affected}
    assert "instruct" in nodes
    assert "pretrain" not in nodes


def test_the_answer_that_somebody_corrected_leads_to_what_learnt_the_correction(store):
    row = {"id": "conversations.jsonl:1", "source": "conversations.jsonl", "of": "chatcmpl-9", "messages": []}
    add_rows(store, "conversations", "train.jsonl", row)
    found = recall(store, "chatcmpl-9")
    assert [match.document for match in found.matches] == ["conversations.jsonl:1"]
    assert "instruct" in {record.node for record in found.affected}


def test_an_artifact_is_recalled_with_what_stands_on_it(store):
    record = store.by_key("instruct")
    found = recall(store, record.key)
    assert record.key in {each.key for each in found.affected}
    assert "pretrain" not in {each.node for each in found.affected}
    assert "`fmops show` names them" in render_recall(found)


def test_a_canary_without_an_alias_is_served_too_and_goes_back(store, release):
    champion = Target(release="release-clean", url="http://127.0.0.1:9001")
    canary = Target(release=release.key, url="http://127.0.0.1:9002")
    routes = RoutesFile(store.root / ROUTES)
    routes.compare_and_swap(Routes(champion=champion, challenger=canary, canary_share=0.1), expected=0)
    found = recall(store, store.by_key("instruct").key)
    assert [(arm.arm, arm.release, arm.share, arm.up) for arm in found.endpoints] == [
        ("challenger", release.key, 0.1, False)
    ]
    text = render_recall(found)
    told = "the gateway's challenger, 10% of the requests, http://127.0.0.1:9002"
    assert f"  {told} → {release.key}; the gateway is down" in text
    assert "take the challenger's traffic away: `fmops rollout rollback`" in text
    assert "stop serving" not in text


def test_behind_a_gateway_another_release_comes_back_by_a_rollout(store, release):
    RoutesFile(store.root / ROUTES).compare_and_swap(Routes(champion=Target(release=release.key)), expected=0)
    found = replace(recall(store, store.by_key("instruct").key), way_back="release-other")
    text = render_recall(found)
    assert f"the gateway's champion, 100% of the requests, no engine yet → {release.key}" in text
    assert "`fmops rollout start --release release-other`, then `fmops rollout promote`" in text


def test_an_unknown_name_is_refused_with_the_nearest(store, release):
    with pytest.raises(FmopsError, match=f"no document and no artifact .* Did you mean '{release.key}'"):
        recall(store, release.key[:-1] + "x")


def test_an_answer_leads_to_its_release_and_its_sources(store, release):
    traces = DayLog(store.root / "traces", Trace)
    traces.append(
        Trace(
            id="chatcmpl-1", started_s=0, tenant="team", arm="champion", release=release.key, operation="chat",
            status=200, finish_reason="stop", duration_s=1.0, prompt="Hello", response="Hi", signals={"empty": 0.0},
        ),
        at_s=0,
    )  # fmt: skip
    traces.close()
    text = render_answer(store, "chatcmpl-1")
    assert text is not None
    for part in (release.key, "docs/*.txt", "./base-model", "Hello"):
        assert part in text
    assert render_answer(store, "chatcmpl-2") is None


def test_the_bill_of_materials_names_model_data_and_software_and_is_the_same_each_time(store, release):
    bill = json.loads(render_bom(store, release))
    assert bill["specVersion"] == "1.6"
    assert bill["metadata"]["component"]["type"] == "machine-learning-model"
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert parts["pkg:pypi/torch@2.13.0"]["version"] == "2.13.0"
    assert parts["data/corpora.python-docs"]["properties"] == [{"name": "fmops:source", "value": "docs/*.txt"}]
    assert store.by_key("corpus").key in parts
    assert render_bom(store, release) == render_bom(store, release)
    with pytest.raises(FmopsError, match="A bill of materials is of a release"):
        render_bom(store, store.by_key("corpus"))


def change(folder):
    path = folder / "MODEL_CARD.md"
    path.write_text(path.read_text().replace("SmolLM2", "SmolLM3"))


def add_hidden(folder):
    (folder / ".gitignore").write_text("*")


def link(folder):
    path = folder / "parity.json"
    shutil.copy(path, folder.parent / "elsewhere")
    path.unlink()
    path.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("tamper", [change, add_hidden, link, lambda folder: (folder / "parity.json").unlink()])
def test_a_release_that_was_touched_after_signing_is_refused(store, release, tamper):
    sign_release(store, release)
    check_release(store, release)
    tamper(store.folder(release.stage, release.fingerprint))
    with pytest.raises(IntegrityError, match="Do not serve it"):
        check_release(store, release)


def test_an_unsigned_release_is_refused_with_the_remedy(store, release):
    with pytest.raises(IntegrityError, match=f"is not signed. If you trust it, sign it: `fmops sign {release.key}`"):
        check_release(store, release)


def test_another_key_is_refused(store, release, tmp_path, monkeypatch):
    sign_release(store, release)
    mine, theirs = make_keys(tmp_path / "theirs")
    monkeypatch.setenv(PUBLIC_KEY, str(theirs))
    with pytest.raises(IntegrityError, match=r"another workspace promoted it.*FMOPS_VERIFY_KEY|not with signing\.pub"):
        check_release(store, release)
    monkeypatch.setenv(PRIVATE_KEY, str(mine))
    sign_release(store, release)
    check_release(store, release)


def test_a_workspace_without_the_signers_key_says_where_it_is(store, release, monkeypatch, tmp_path):
    sign_release(store, release)
    (store.root / "keys" / "signing.pub").unlink()
    with pytest.raises(FmopsError) as refused:
        check_release(store, release)
    text = str(refused.value)
    assert f"{release.key} is signed, and {store.root} has no keys/signing.pub" in text
    assert "Copy its keys/signing.pub here by a way that you trust" in text
    assert "`export FMOPS_VERIFY_KEY=/path/to/signing.pub`" in text
    monkeypatch.setenv(PUBLIC_KEY, str(tmp_path / "gone.pub"))
    with pytest.raises(FmopsError, match=r"FMOPS_VERIFY_KEY names .*gone\.pub, which is not there"):
        check_release(store, release)


def test_a_torn_signature_is_refused(store, release):
    sign_release(store, release)
    path = signature_path(store, release)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IntegrityError, match=r"Do not serve it|cannot be checked"):
        check_release(store, release)


def test_the_private_key_is_its_owners_alone(store, release):
    sign_release(store, release)
    assert (store.root / "keys" / "signing.key").stat().st_mode & 0o077 == 0
