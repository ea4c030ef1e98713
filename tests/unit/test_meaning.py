"""The monitor watches what prompts mean: by the serving release's own embeddings, as distances to what is usual."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.simulated import Production, write_traces
from fmops.adapters.prompt_codes import BITS, PromptCodes
from fmops.artifacts import Parity, Release
from fmops.deployment.monitoring.meaning import strangeness
from fmops.deployment.monitoring.monitor import Watcher, describe
from fmops.deployment.monitoring.topics import words_of
from fmops.deployment.monitoring.watch import MOST, Watch, watch
from fmops.errors import FmopsError
from fmops.production import Monitor
from fmops.store import Record, Store, content_digest, file_entries, utc_now

ROOT = Path(__file__).resolve().parents[2]
POLICY = Monitor(reference=400)
QUESTIONS = {
    "code": [
        f"How do I {does} a {what} by its {by}?"
        for does in ("sort", "copy", "reverse", "filter", "split", "merge", "print")
        for what in ("list", "table", "string", "dictionary", "tuple", "file")
        for by in ("name", "length", "column", "value", "index")
    ],
    "food": [
        f"How long should {what} be {done} with {extra} in the pan?"
        for what in ("potatoes", "fish", "onions", "rice", "beans", "carrots")
        for done in ("boiled", "fried", "baked", "stirred", "steamed")
        for extra in ("butter", "garlic", "salt", "pepper", "water", "cream")
    ],
    # How a list of dishes is kept: nobody asked about that, and no word is new.
    "dishes": [
        f"Should {what} with {extra} {does} by name in the {place}?"
        for what in ("fish", "onions", "potatoes", "beans")
        for extra in ("garlic", "salt", "water")
        for does in ("filter", "sort", "reverse", "copy", "print")
        for place in ("table", "column", "dictionary", "list")
    ],
}  # fmt: skip
USUAL = {"code": 0.7, "food": 0.3}


@pytest.fixture(scope="module")
def codes(tiny_model):
    return PromptCodes(tiny_model)


def apart(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def test_prompts_that_share_what_they_say_share_bits(codes):
    asked, again, other = (codes(text) for text in (QUESTIONS["code"][0], QUESTIONS["code"][1], QUESTIONS["food"][0]))
    assert len(asked) == BITS // 4
    assert asked == codes(QUESTIONS["code"][0])
    assert apart(asked, again) < BITS / 4
    assert apart(asked, other) > 1.5 * apart(asked, again)
    assert codes("") == ""


def changed(model: Path, folder: Path, change) -> Path:
    shutil.copytree(model, folder)
    weights = {name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halved_weights_say_nearly_the_same(codes, tiny_model, tmp_path, dtype):
    halved = PromptCodes(changed(tiny_model, tmp_path / "halved", lambda name, tensor: tensor.to(dtype)))
    assert max(apart(halved(text), codes(text)) for text in QUESTIONS["food"]) < BITS / 25


def no_embeddings(name, tensor):
    return None if name.endswith("embed_tokens.weight") else tensor


def whole_numbers(name, tensor):
    return tensor.to(torch.int8) if name.endswith("embed_tokens.weight") else tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_embeddings, r"holds no safetensors with embed_tokens.weight or wte.weight"),
        (whole_numbers, r"model.embed_tokens.weight is I8, and F32, F16, BF16 can be read"),
    ],
)
def test_a_folder_that_states_no_embeddings_is_refused(tiny_model, tmp_path, change, said):
    with pytest.raises(FmopsError, match=said):
        PromptCodes(changed(tiny_model, tmp_path / "other", change))


@pytest.mark.parametrize(("text", "said"), [(None, "has no tokenizer.json"), ("{}", "cannot be read")])
def test_a_folder_without_a_tokenizer_is_refused(tiny_model, tmp_path, text, said):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(FmopsError, match=said):
        PromptCodes(folder)


def test_the_monitor_loads_no_torch(tiny_model):
    code = "import sys; from pathlib import Path; from fmops.adapters.prompt_codes import PromptCodes"
    code += "; PromptCodes(Path(sys.argv[1]))('What is it?'); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tiny_model)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def cloud(chance: np.random.Generator, centre: np.ndarray, flips: float, count: int) -> list[str]:
    """Codes that differ from a centre in about this share of their bits."""
    return [np.packbits(centre ^ (chance.random(BITS) < flips)).tobytes().hex() for _ in range(count)]


def test_a_wide_topic_is_not_far_away_because_it_is_wide():
    chance = np.random.default_rng(0)
    narrow, wide, new = (chance.random(BITS) < 0.5 for _ in range(3))
    known = (*cloud(chance, narrow, 0.05, 200), *cloud(chance, wide, 0.2, 100))

    def usual(centre: np.ndarray, flips: float) -> float:
        return float(np.mean([strangeness(code, known) for code in cloud(chance, centre, flips, 200)]))

    # Distances differ by a factor of three; 256 independent bits are far more dimensions than prompts have.
    assert usual(narrow, 0.05) == pytest.approx(usual(wide, 0.2), abs=0.3)
    assert usual(new, 0.05) > 0.95
    assert strangeness(known[0], known) < 0.5
    assert strangeness(known[0], known[:3]) is None


def stream(seed: int, codes: PromptCodes):
    """Users of two topics, and what takes in their questions."""
    talk = Production(seed=seed, topics=USUAL, questions=QUESTIONS, log_probability=-1.0)

    def taken(state: Watch, count: int, policy: Monitor = POLICY) -> Watch:
        traces = [*talk.serve(count)]
        return watch(state, traces, (), policy, {trace.id: codes(trace.prompt) for trace in traces})

    return talk, taken


def shifted(state: Watch) -> set[str]:
    return {alarm.signal for alarm in state.alarms if alarm.kind == "shift"}


@pytest.mark.parametrize("topics", [{"food": 0.7, "code": 0.3}, {"food": 1.0}, {"code": 1.0}])
def test_a_known_topic_asked_more_often_is_nothing_new(codes, topics):
    talk, taken = stream(1, codes)
    state = taken(Watch(release=talk.champion), 600)
    talk.topics = topics
    assert not {"meaning", "topic"} & shifted(taken(state, 400))


def test_a_new_subject_in_known_words_is_seen_by_its_meaning_alone(codes):
    known = {word for topic in USUAL for text in QUESTIONS[topic] for word in words_of(text)}
    assert all(words_of(text) <= known for text in QUESTIONS["dishes"])
    talk, taken = stream(2, codes)
    state = taken(Watch(release=talk.champion), 600)
    assert not state.alarms
    talk.topics = {"code": 0.35, "food": 0.15, "dishes": 0.5}
    seen = shifted(taken(state, 400))
    assert "meaning" in seen
    assert "topic" not in seen


def test_of_a_long_reference_a_sample_is_remembered(codes):
    chance = random.Random(3)
    talk, taken = stream(3, codes)
    talk.questions = {"code": [f"{text} {chance.random()}" for text in QUESTIONS["code"] for _ in range(40)]}
    talk.topics = {"code": 1.0}
    state = taken(Watch(release=talk.champion), 2 * MOST, Monitor(reference=2 * MOST))
    assert 0.9 * MOST < len(state.known_codes) < 1.1 * MOST


@pytest.fixture
def store(tmp_path, tiny_model):
    """A workspace whose champion has the tiny model's files."""
    store = Store(tmp_path / ".fmops")
    folder = store.folder("release", "c" * 64)
    shutil.copytree(tiny_model, folder / "model")
    parity = Parity(
        passed=True, prompts=2, engine="transformers", token_ids_equal=True, template_equal=True, greedy_equal=True,
        max_logprob_difference=0.0, tolerance=1e-3,
    )  # fmt: skip
    release = Release(path=folder, name="tiny", parity=parity, licence=None, verdict="promote")
    files = file_entries(folder)
    record = Record(
        node="release", stage="release", kind="release", version=1, fingerprint="c" * 64,
        digest=content_digest(files), seed=0, config={}, inputs={}, files=files,
        artifact=release.model_dump(mode="json"), created=utc_now(),
    )  # fmt: skip
    store.commit(record)
    store.move_aliases({"champion": record.key}, expected={"champion": None}, why="test")
    return store


def talk_of(store: Store) -> Production:
    return Production(
        seed=4, champion=store.aliases()["champion"], topics=USUAL, questions=QUESTIONS, log_probability=-1.0
    )


def test_a_look_codes_the_prompts_and_a_new_subject_is_new_topics(store):
    talk = talk_of(store)
    watcher = Watcher(store, POLICY, clock=lambda: talk.now_s)
    write_traces(store.root, talk, 600)
    report = watcher.look()
    assert report.meaning_error is None
    assert "meaning" in report.pictures
    talk.topics = {"dishes": 1.0}
    write_traces(store.root, talk, 300)
    # Another process, as after a restart, knows the same prompts.
    report = Watcher(store, POLICY, clock=lambda: talk.now_s).look()
    assert "meaning" in {alarm.signal for alarm in report.alarms}
    assert "users ask about other things" in report.diagnosis.because
    assert report.diagnosis.cause == "traffic changed"


def test_without_the_release_s_files_everything_else_is_watched_and_the_report_says_so(store):
    talk = talk_of(store)
    shutil.rmtree(store.folder("release", "c" * 64) / "model")
    watcher = Watcher(store, POLICY, clock=lambda: talk.now_s)
    write_traces(store.root, talk, 600)
    report = watcher.look()
    assert {"topic", "words"} <= set(report.pictures)
    assert "meaning" not in report.pictures
    assert "what prompts mean is not watched: " in describe(report)
    assert "has no tokenizer.json" in report.meaning_error


def looked_before_meanings(store: Store, answers: int) -> tuple[Production, Watcher]:
    """So many answers were looked at, and the state is as it was written before meanings were watched."""
    talk = talk_of(store)
    watcher = Watcher(store, POLICY, clock=lambda: talk.now_s)
    write_traces(store.root, talk, answers)
    watcher.look()
    path = store.root / "monitor.json"
    state = json.loads(path.read_text())
    del state["meaning_error"], state["watch"]["known_codes"], state["watch"]["measures"]["meaning"]
    path.write_text(json.dumps(state))
    return talk, watcher


def test_a_state_from_before_goes_on_and_is_silent_about_meaning_until_the_next_release(store):
    talk, watcher = looked_before_meanings(store, 600)
    talk.topics = {"dishes": 1.0}
    write_traces(store.root, talk, 300)
    report = watcher.look()
    assert report.answers == 900
    assert "topic" in report.pictures
    assert "meaning" not in report.pictures
    assert "no prompt of the reference was put into a code; the next release's will be" in describe(report)


def test_a_state_from_before_whose_reference_is_not_complete_remembers_the_rest_of_it(store):
    talk, watcher = looked_before_meanings(store, 300)
    write_traces(store.root, talk, 300)
    report = watcher.look()
    assert report.meaning_error is None
    assert "meaning" in report.pictures


LOOK = """
import sys
from pathlib import Path
from fmops.deployment.monitoring.monitor import Watcher
from fmops.production import Monitor
from fmops.store import Store
Watcher(Store(Path(sys.argv[1])), Monitor(reference=400), clock=lambda: 1.8e9).look()
"""


@pytest.mark.parametrize("site", ["monitor-before-save:1", "monitor-after-save:1"])
def test_killed_inside_a_look_the_same_prompts_are_known(store, site):
    talk = talk_of(store)
    watcher, path = Watcher(store, POLICY, clock=lambda: 1.8e9), store.root / "monitor.json"
    write_traces(store.root, talk, 300)
    watcher.look()
    begun = path.read_bytes()
    write_traces(store.root, talk, 300)
    watcher.look()
    whole = watcher.read()
    path.write_bytes(begun)
    command = [sys.executable, "-c", LOOK, str(store.root)]
    done = subprocess.run(command, env={**os.environ, "FMOPS_FAULT": site}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    watcher.look()
    assert watcher.read() == whole
    assert len(whole.watch.known_codes) > 200
