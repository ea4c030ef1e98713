"""Thumbs and prompts are read as pairs are: in the forms that people have, and what is unfit is counted."""

from __future__ import annotations

import json

import pytest

from fmops.artifacts import Checkpoint
from fmops.data.preferences import prepare_preferences
from fmops.errors import FmopsError
from fmops.finetuning.preferences import read_votes
from fmops.jobs import ExampleJob
from fmops.lifecycle import Align, Lifecycle
from fmops.orchestration.graph import build
from fmops.sources import resolve


@pytest.fixture
def read(tiny_model, tmp_path, context):
    """Runs the preferences stage over rows; returns the artifact and its training rows."""
    base = Checkpoint(path=tiny_model.parent, stage="base", parameters=1, trained_tokens=0)

    def run(form, rows, **job):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = resolve("rows.jsonl", root=tmp_path, cache=tmp_path / "cache")
        config = ExampleJob(form=form, held_out=1e-9, **job)
        made = prepare_preferences(config, base=base, source=source, out=tmp_path / "out", context=context)
        return made, [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]

    return run


ASKED = [{"role": "user", "content": "What is a set?"}]


def test_votes_come_as_trl_writes_them_as_our_feedback_does_and_as_pairs(read):
    made, rows = read(
        "votes",
        [
            {"prompt": "What is a set?", "completion": "A collection.", "label": True},
            {"prompt": ASKED, "completion": [{"role": "assistant", "content": "No idea."}], "label": False},
            {"id": "t1", "prompt": "What is a set?", "response": "Unordered.", "thumb": "up"},
            {"prompt": "What is a set?", "chosen": "No duplicates.", "rejected": "A number."},
        ],
    )
    assert (made.pairs, made.form) == (4, "votes")
    assert [row["prompt"] for row in rows] == [ASKED] * 4
    votes = [(row["completion"], row["label"]) for row in rows[:3]]
    assert votes == [("A collection.", True), ("No idea.", False), ("Unordered.", True)]
    assert (rows[3]["chosen"], rows[3]["rejected"]) == ("No duplicates.", "A number.")


def test_what_cannot_be_a_vote_is_counted(read):
    made, _ = read(
        "votes",
        [
            {"prompt": "What is a set?", "completion": "A collection.", "label": True},
            {"prompt": "What is a set?", "completion": "a collection", "label": True},
            {"prompt": "What is a set?", "completion": "A collection.", "label": False},
            {"prompt": "What is a set?", "completion": "Mine.", "label": "perhaps"},
            {"prompt": "What is a set?", "completion": " ", "label": True},
            {"prompt": "What is a set?", "completion": "word " * 300, "label": True},
        ],
        max_tokens=100,
    )
    dropped = {item.step: item.documents for item in made.dropped}
    # Two people may disagree about one answer; the same vote twice says nothing new.
    assert made.pairs == 2
    assert dropped == {"exact-duplicate": 1, "no-vote": 1, "empty-answer": 1, "too-long": 1}


def test_a_file_without_votes_is_refused_with_the_forms(read):
    with pytest.raises(FmopsError, match=r"its keys: completion, prompt. Known forms: prompt, completion .or response"):
        read("votes", [{"prompt": "What?", "completion": "That."}])
    with pytest.raises(FmopsError, match=r"Known forms: prompt, a string or messages; every other key"):
        read("prompts", [{"question": "What?"}])


def test_a_prompt_keeps_what_its_reward_may_ask_for_without_personal_data(read):
    made, rows = read("prompts", [{"prompt": "Who wrote it?", "expected": "ann.lee@gmail.com", "points": [1, "two"]}])
    assert rows[0]["prompt"] == [{"role": "user", "content": "Who wrote it?"}]
    assert rows[0]["columns"]["points"] == [1, "two"]
    assert "ann.lee@gmail.com" not in json.dumps(rows)
    assert made.redactions


def test_a_pair_is_two_votes(tmp_path, tiny_model, context):
    from fmops.adapters.model_files import load_tokenizer

    row = {"id": "x", "prompt": ASKED, "chosen": "A collection.", "rejected": "No idea."}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(tiny_model)
    votes = read_votes(tmp_path / "votes.jsonl", Align(), tokenizer=tokenizer, context=context)
    assert [vote.liked for vote in votes] == [True, False]
    assert [tokenizer.decode(vote.answer) for vote in votes] == ["A collection.<|im_end|>", "No idea.<|im_end|>"]


@pytest.mark.parametrize(
    ("method", "form"), [("dpo", "pairs"), ("orpo", "pairs"), ("kto", "votes"), ("grpo", "prompts")]
)
def test_the_method_decides_what_the_data_is_read_as(method, form, tmp_path):
    rewards = {"reward": {"rewards.py:f": 1.0, "rewards.py:g": 0.5, "other.py:h": 1.0}} if method == "grpo" else {}
    spec = Lifecycle(
        name="x", base="base", data={"preferences": {"source": "p.jsonl"}}, align={"method": method, **rewards}
    )
    nodes = build(spec, tmp_path).nodes
    assert nodes["preferences"].config.form == form
    # The digest of the reward files is part of the fingerprint: they are an input like any other.
    assert nodes["align"].sources == ({"rewards": ("other.py", "rewards.py")} if rewards else {})
