"""A release is checked again where it is loaded: what changed since it was certified is not served."""

from __future__ import annotations

import json

import pytest

from fmops.artifacts import Parity, Release
from fmops.deployment.serving.app import serve
from fmops.deployment.verify import verify_release
from fmops.errors import FmopsError, IntegrityError
from fmops.integrity import sha256
from fmops.production import Serve

PASSED = Parity(
    passed=True, prompts=11, engine="transformers", token_ids_equal=True, template_equal=True, greedy_equal=True,
    max_logprob_difference=1e-4, tolerance=1e-3,
)  # fmt: skip


class Folder:
    """A release folder with whatever weights, and the digests its record would hold."""

    def __init__(self, path, parity=PASSED, certified=None):
        self.path = path / "release-0123"
        (self.path / "model").mkdir(parents=True)
        (self.path / "model/config.json").write_text("{}")
        (self.path / "model/model.safetensors").write_bytes(b"weights")
        (self.path / "record.json").write_text("{}")
        model = {f"model/{item.name}": sha256(item) for item in (self.path / "model").iterdir()}
        stated = {"parity": parity.model_dump(), "files": model if certified is None else certified}
        (self.path / "parity.json").write_text(json.dumps(stated))
        self.files = {**model, "parity.json": sha256(self.path / "parity.json")}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_an_untouched_release_passes(folder):
    assert verify_release(folder.path, folder.files) == PASSED


def flip(path):
    raw = bytearray((path / "model/model.safetensors").read_bytes())
    raw[3] ^= 1
    (path / "model/model.safetensors").write_bytes(raw)


def relink(path):
    (path / "model/model.safetensors").rename(path.parent / "elsewhere")
    (path / "model/model.safetensors").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (flip, r"release-0123/model/model\.safetensors is not what its record says"),
        (relink, "is a symbolic link"),
        (lambda path: (path / "model/extra.json").write_text("{}"), r"holds 'model/extra\.json', which its record"),
        (lambda path: (path / "linked").symlink_to(path / "model"), "'?linked'? is a symbolic link"),
        (lambda path: (path / "model/config.json").unlink(), r"lacks 'model/config\.json'"),
    ],
)
def test_what_changed_on_disk_is_refused(folder, spoil, text):
    spoil(folder.path)
    with pytest.raises(IntegrityError, match=text) as raised:
        verify_release(folder.path, folder.files)
    assert "`fmops run` sets the artifact aside and makes it again" in str(raised.value)


def test_a_release_without_parity_is_refused(folder):
    (folder.path / "parity.json").unlink()
    del folder.files["parity.json"]
    with pytest.raises(IntegrityError, match=r"has no parity\.json: nobody compared trainer and server"):
        verify_release(folder.path, folder.files)


def test_a_release_that_failed_parity_is_refused(tmp_path):
    failed = PASSED.model_copy(update={"passed": False, "reasons": ("chat/code: greedy tokens differ",)})
    folder = Folder(tmp_path, failed)
    with pytest.raises(IntegrityError, match="failed parity: chat/code: greedy tokens differ"):
        verify_release(folder.path, folder.files)


def test_parity_of_other_weights_certifies_nothing(tmp_path):
    folder = Folder(tmp_path, certified={"model/model.safetensors": "0" * 64})
    with pytest.raises(IntegrityError, match=r"certifies other files: model/config\.json, model/model\.safetensors"):
        verify_release(folder.path, folder.files)


@pytest.mark.parametrize("text", ["", "[]", '{"parity": {"passed": true}, "files": {}}'])
def test_a_parity_report_that_is_none_is_refused(folder, text):
    (folder.path / "parity.json").write_text(text)
    folder.files["parity.json"] = sha256(folder.path / "parity.json")
    with pytest.raises(IntegrityError, match="is not a parity report"):
        verify_release(folder.path, folder.files)


def released(folder) -> Release:
    return Release(path=folder.path, name="tiny", parity=PASSED, licence=None, verdict="promote")


def test_serving_verifies_before_it_loads(folder):
    flip(folder.path)
    with pytest.raises(IntegrityError, match="is not what its record says"):
        serve(released(folder), Serve(port=0), files=folder.files, threads=1, version="tiny@0123")


def test_serving_refuses_an_engine_that_parity_was_not_proved_on(tmp_path):
    folder = Folder(tmp_path, PASSED.model_copy(update={"engine": "vllm"}))
    with pytest.raises(FmopsError, match="certified on the engine 'vllm', the spec serves with 'transformers'"):
        serve(
            released(folder), Serve(port=0, engine="transformers"), files=folder.files, threads=1, version="tiny@0123"
        )
