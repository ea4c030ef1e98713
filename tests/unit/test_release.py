"""What may be released, what the release says of itself, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmops.artifacts import (
    Checkpoint,
    Conversations,
    Corpus,
    Dropped,
    EvalReport,
    FamilyResult,
    GateDecision,
    GuardResult,
    Metric,
    Preferences,
)
from fmops.deployment.parity import check_parity
from fmops.deployment.release import ParityFailed, release
from fmops.deployment.verify import verify_release
from fmops.errors import FmopsError, GateRejected, IntegrityError, NeedMoreData
from fmops.integrity import sha256
from fmops.jobs import Origin, ReleaseJob

JOB = ReleaseJob(
    name="tiny",
    base="hf://some/base@main",
    data={
        "corpora.python|docs": Origin(source=("docs/*.txt",), licence="PSF-2.0"),
        "conversations": Origin(source=("talks.jsonl",)),
    },
)


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "align" / "model")
    return Checkpoint(
        path=tmp_path / "align", stage="align", parameters=1_300_000, trained_tokens=4096, metrics={"loss_last": 1.25},
        licence="Apache-2.0",
    )  # fmt: skip


def metric(value: float, **changes) -> Metric:
    return Metric.model_validate(
        {
            "suite": "domain", "task": "docs", "family": "domain", "name": "bits_per_byte", "value": value,
            "standard_error": 0.01, "n": 200, "higher_is_better": False, **changes,
        }
    )  # fmt: skip


def decision(path: Path, verdict: str, *reasons: str) -> GateDecision:
    family = FamilyResult(
        family="domain", n=200, clusters=20, difference=0.1, standard_error=0.02, lower=0.067, upper=0.133, margin=0.02,
        minimum_detectable=0.05, verdict="non-inferior",
    )  # fmt: skip
    guards = tuple(
        GuardResult(task=task, family="domain", n=100, clusters=10, difference=0.1, lower=0.0, upper=0.2, guard=0.04)
        for task in ("new", "old")
    )
    return GateDecision(
        path=path, verdict=verdict, reasons=reasons, alpha=0.05, families=(family,), improved=("domain",), guards=guards
    )


def evidence(path: Path) -> dict:
    return {
        "base": Checkpoint(path=path, stage="base", parameters=1_300_000, trained_tokens=0, licence="Apache-2.0"),
        "pretrained": Checkpoint(path=path, stage="pretrain", parameters=1_300_000, trained_tokens=16_000),
        "gate": decision(path, "promote", "no family regressed beyond its margin"),
        "champion_report": EvalReport(path=path, metrics=(metric(1.5),), fingerprint="f"),
        "challenger_report": EvalReport(path=path, metrics=(metric(1.4), metric(0.5, task="new")), fingerprint="f"),
        "corpus": Corpus(
            path=path, documents=70, tokens=16_000, blocks=20, block_tokens=1024, replay_share=0.2, held_out_new=7,
            held_out_old=3, redactions={"email": 4}, dropped=(Dropped(step="near-duplicate", documents=5),),
            sources={"python|docs": {"documents": 70, "tokens": 16_000, "weight": 0.8}},
        ),
        "conversations": Conversations(path=path, conversations=120, held_out=12),
        "preferences": Preferences(path=path, pairs=30, held_out=3),
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def make(checkpoint, out: Path, context, **given):
    out.mkdir(exist_ok=True)
    return release(JOB, checkpoint=checkpoint, out=out, context=context, **given)


def test_a_release_holds_the_model_its_card_and_a_passed_parity(checkpoint, tmp_path, context):
    made = make(checkpoint, tmp_path / "out", context, **evidence(tmp_path))
    assert made.parity.passed
    assert made.parity.max_logprob_difference <= made.parity.tolerance
    assert made.parity.prompts >= 10
    assert (made.name, made.verdict, made.licence) == ("tiny", "promote", "Apache-2.0")
    assert sha256(made.model / "model.safetensors") == sha256(checkpoint.model / "model.safetensors")
    assert verify_release(made.path, digests(made.path)) == made.parity


def test_the_card_says_what_the_artifacts_say(checkpoint, tmp_path, context):
    made = make(checkpoint, tmp_path / "out", context, **evidence(tmp_path))
    card = (made.path / "MODEL_CARD.md").read_text()
    for line in (
        "license: apache-2.0",
        "The stage `align` trained on 4,096 tokens.",
        "| loss_last | 1.25 |",
        "Corpus: 70 documents, 16,000 training tokens, 20.0% of them replayed",
        "| python\\|docs | 70 | 16,000 | 0.8 | PSF-2.0 |",
        "Removed from the corpus: 5 near-duplicate. Redacted: 4 email.",
        "- Base model: `hf://some/base@main`",
        "The stage `pretrain` trained on 16,000 tokens.",
        "Conversations: 120 for training, 12 held out. Licence: not stated.",
        "Preferences: 30 pairs for training, 3 held out. Licence: not stated.",
        "Some training data states no licence",
        "| domain | docs | bits_per_byte ↓ | 1.5000 ± 0.0100 (200) | 1.4000 ± 0.0100 (200) |",
        "| domain | new | bits_per_byte ↓ | – | 0.5000 ± 0.0100 (200) |",
        "Verdict: **promote** at α = 0.05.",
        "| domain | 200 | +0.1000 ± 0.0200 | +0.0670 … +0.1330 | 0.02 | non-inferior |",
        "Of 2 guarded benchmarks, surely worse by more than their guard: none.",
        "Primary families that improved (Holm): domain.",
        "would most likely not have been seen: domain 0.05.",
    ):
        assert line in card, line
    listed = json.loads((made.path / "data.json").read_text())
    assert listed["corpus"]["dropped"] == {"near-duplicate": 5}
    assert listed["corpus"]["redactions"] == {"email": 4}
    assert made.facts["scores"][0]["base"] == 1.5


def test_a_release_without_evidence_says_that_nothing_is_known(checkpoint, tmp_path, context):
    made = make(checkpoint, tmp_path / "out", context)
    card = (made.path / "MODEL_CARD.md").read_text()
    assert made.verdict == "ungated"
    assert "Not evaluated." in card
    assert "No benchmark was run: nothing is known about quality or harm." in card


def test_equal_inputs_give_equal_bytes_even_after_a_killed_attempt(checkpoint, tmp_path, context):
    first = make(checkpoint, tmp_path / "one", context, **evidence(tmp_path))
    half = tmp_path / "two" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "left-over.json").write_text("{}")
    second = make(checkpoint, tmp_path / "two", context, **evidence(tmp_path))
    assert digests(first.path) == digests(second.path)
    assert not list(second.path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("verdict", "error", "code"), [("reject", GateRejected, 3), ("need more data", NeedMoreData, 4)]
)
def test_only_a_promotion_is_released(checkpoint, tmp_path, context, verdict, error, code):
    with pytest.raises(error, match=r"harm regressed by 0\.1") as raised:
        make(checkpoint, tmp_path / "out", context, gate=decision(tmp_path, verdict, "harm regressed by 0.1"))
    assert raised.value.exit_code == code
    assert not list((tmp_path / "out").iterdir())


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "extra.safetensors", "sub/x.ckpt", "notes"])
def test_a_pickle_under_any_name_is_refused_and_never_opened(checkpoint, tmp_path, context, name):
    trap = tmp_path / "opened"
    path = checkpoint.model / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Touch(trap), protocol=4))
    with pytest.raises(IntegrityError, match=Path(name).name):
        make(checkpoint, tmp_path / "out", context)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "extra.safetensors", "notes"])
def test_a_pickle_inside_a_zip_is_refused_and_never_opened(checkpoint, tmp_path, context, name):
    trap = tmp_path / "opened"
    with zipfile.ZipFile(checkpoint.model / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(trap), protocol=4))
    with pytest.raises(IntegrityError, match=name):
        make(checkpoint, tmp_path / "out", context)
    assert not trap.exists()


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def link(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(folder / "config.json")


def code(folder: Path) -> None:
    (folder / "modeling_tiny.py").write_text("print('hello')")


def auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_tiny.Tiny"}}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (poison, "model.norm.weight holds NaN or infinity"),
        (link, "merges.txt in the model folder is a symbolic link"),
        (code, "modeling_tiny.py in the model folder is code"),
        (auto_map, "asks for custom code"),
        (no_weights, "needs config.json and weights in safetensors"),
    ],
)
def test_a_model_that_must_not_be_served_is_refused(checkpoint, tmp_path, context, spoil, text):
    spoil(checkpoint.model)
    with pytest.raises(FmopsError, match=text):
        make(checkpoint, tmp_path / "out", context)


def test_what_is_not_needed_to_serve_stays_behind_and_is_named(checkpoint, tmp_path, context):
    (checkpoint.model / "README.md").write_text("notes")
    made = make(checkpoint, tmp_path / "out", context)
    assert not (made.model / "README.md").exists()
    assert "left behind, not needed to serve: README.md" in context.stream.getvalue()


def shuffle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name][torch.randperm(weights[name].shape[0])].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\n", "assistant: "))


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    stated = json.loads(path.read_text())
    stated["model"]["merges"] = stated["model"]["merges"][:-500]
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("spoil", "field", "reason"),
    [
        (shuffle, "max_logprob_difference", "log-probabilities differ by"),
        (other_template, "template_equal", "rendered chat templates differ"),
        (other_tokenizer, "token_ids_equal", "token ids differ"),
    ],
)
def test_parity_finds_a_server_that_holds_another_model(tiny_model, tmp_path, spoil, field, reason):
    shutil.copytree(tiny_model, tmp_path / "served")
    spoil(tmp_path / "served")
    parity, probes = check_parity(tiny_model, tmp_path / "served", engine="transformers", threads=1)
    assert not parity.passed
    assert any(reason in text for text in parity.reasons)
    bad = parity.max_logprob_difference > parity.tolerance if field.startswith("max") else not getattr(parity, field)
    assert bad
    assert len(probes) == parity.prompts


def test_a_release_whose_server_disagrees_is_refused(checkpoint, tmp_path, context, monkeypatch):
    def bring_spoiled(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if source.name == "model.safetensors":
            shuffle(target.parent)

    monkeypatch.setattr("fmops.deployment.release.bring", bring_spoiled)
    with pytest.raises(ParityFailed, match=r"trainer and server \(transformers\) disagree, so tiny is not released"):
        make(checkpoint, tmp_path / "out", context)
