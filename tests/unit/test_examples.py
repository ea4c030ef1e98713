"""Conversations and preferences: every common form is recognised, and what is unfit is dropped with its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fmops.artifacts import Benchmarks, Checkpoint, Conversations, Preferences
from fmops.data.conversations import prepare_conversations
from fmops.data.preferences import prepare_preferences
from fmops.errors import FmopsError
from fmops.jobs import ExampleJob
from fmops.sources import resolve
from fmops.stage import StageContext

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "preferences" / "hh_rlhf_harmless.jsonl.gz"
TURNS = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A mutable sequence."}]


@pytest.fixture
def base(tiny_model: Path) -> Checkpoint:
    return Checkpoint(path=tiny_model.parent, stage="base", parameters=1, trained_tokens=0)


class Case:
    """Runs one of the two stages over rows."""

    def __init__(self, root: Path, base: Checkpoint, context: StageContext) -> None:
        self.root, self.base, self.context = root, base, context
        self.out = root / "out"

    def source(self, rows: list[dict[str, Any]]) -> Any:
        (self.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return resolve("rows.jsonl", root=self.root, cache=self.root / "cache")

    def conversations(self, rows: list[dict[str, Any]], **job: Any) -> Conversations:
        config = ExampleJob(**{"held_out": 1e-9, **job})
        return prepare_conversations(
            config, base=self.base, source=self.source(rows), out=self.out, context=self.context
        )

    def preferences(
        self, rows: list[dict[str, Any]], *, benchmarks: Benchmarks | None = None, **job: Any
    ) -> Preferences:
        config = ExampleJob(**{"held_out": 1e-9, **job})
        return prepare_preferences(
            config,
            base=self.base,
            source=self.source(rows),
            out=self.out,
            context=self.context,
            benchmarks=benchmarks,
        )

    def train(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "train.jsonl").read_text().splitlines()]

    def held_out(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "held_out.jsonl").read_text().splitlines()]


@pytest.fixture
def case(tmp_path: Path, base: Checkpoint, context: StageContext) -> Case:
    return Case(tmp_path, base, context)


def reasons(artifact: Conversations | Preferences) -> dict[str, int]:
    return {each.step: each.documents for each in artifact.dropped}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {
            "conversations": [
                {"from": "human", "value": "What is a list?"},
                {"from": "gpt", "value": TURNS[1]["content"]},
            ]
        },
        {"conversation": TURNS, "source": "x"},
        {"instruction": "What is a list?", "input": "", "output": "A mutable sequence."},
        {"instruction": "What is", "input": "a list?", "output": "A mutable sequence."},
        {"prompt": "What is a list?\r\n", "completion": " A mutable sequence. "},
    ],
)
def test_every_common_form_of_a_conversation_becomes_messages(case: Case, row: dict[str, Any]) -> None:
    assert case.conversations([row]).conversations == 1
    (kept,) = case.train()
    assert kept["id"] == "rows.jsonl:1"
    assert kept["source"] == "rows.jsonl"
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    assert " ".join(kept["messages"][0]["content"].split()) == "What is a list?"
    assert kept["messages"][1]["content"] == "A mutable sequence."


def test_a_system_message_is_kept(case: Case) -> None:
    case.conversations([{"system": "Be brief.", "instruction": "Hi", "output": "Hello."}])
    assert case.train()[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_unfit_conversations_are_counted_by_reason(case: Case) -> None:
    user, answer = TURNS
    rows = [
        {"messages": TURNS},
        {"messages": [user, {"role": "assistant", "content": "A  MUTABLE sequence"}]},
        {"messages": [answer, user]},
        {"messages": [user, user, answer]},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": " \n"}]},
        {"messages": [user, {"role": "tool", "content": "x"}]},
        {"messages": [user, {"role": "assistant", "content": None}]},
        {"messages": [user, {"role": "assistant", "content": "word " * 2000}]},
    ]
    artifact = case.conversations(rows)
    assert artifact.conversations == 1
    assert reasons(artifact) == {
        "empty-message": 1,
        "exact-duplicate": 1,
        "last-is-no-assistant": 1,
        "no-text": 1,
        "roles-out-of-order": 2,
        "too-long": 1,
        "unknown-role": 1,
    }
    example = next(each for each in artifact.dropped if each.step == "unknown-role").examples[0]
    assert example.startswith('rows.jsonl:7: {"messages": ')


def test_an_unknown_form_shows_the_keys_and_the_known_forms(case: Case) -> None:
    with pytest.raises(FmopsError, match=r"rows\.jsonl:1 is in no known form; its keys: a, q\. Known forms: messages"):
        case.conversations([{"q": "?", "a": "!"}])
    with pytest.raises(FmopsError, match=r"its keys: chosen, id\. Known forms: prompt, chosen, rejected"):
        case.preferences([{"id": 1, "chosen": "x"}])


def test_nothing_held_out_is_said(case: Case, context: StageContext) -> None:
    case.conversations([{"messages": TURNS}])
    assert "none of the 1 examples is held out" in context.stream.getvalue()


def test_nothing_left_says_why(case: Case) -> None:
    with pytest.raises(FmopsError, match=r"no example of rows\.jsonl is left .* last-is-no-assistant 1"):
        case.conversations([{"messages": TURNS[:1]}])


def test_a_question_is_never_on_both_sides(case: Case) -> None:
    rows = [
        {"instruction": f"Question number {number} is what?", "output": f"Answer {number}, wording {wording}."}
        for wording in range(3)
        for number in range(60)
    ]
    artifact = case.conversations(rows, held_out=0.3)
    asked = [{row["messages"][0]["content"] for row in side} for side in (case.train(), case.held_out())]
    assert artifact.conversations + artifact.held_out == 180
    assert 20 < artifact.held_out < 90
    assert not asked[0] & asked[1]


def test_secrets_in_examples_are_replaced_before_anything_is_written(case: Case) -> None:
    row = {"instruction": "Mail jane@acme-corp.com", "output": "Sent to jane@acme-corp.com, key AKIAIOSFODNN7EXAMPLE."}
    unfit = {"instruction": "", "output": "jane@acme-corp.com"}
    artifact = case.conversations([row, unfit])
    assert artifact.redactions == {"aws-key": 1, "email": 2}
    written = artifact.model_dump_json() + "".join(path.read_text() for path in case.out.rglob("*.jsonl"))
    assert "jane@" not in written
    assert "AKIAIOSFODNN7EXAMPLE" not in written
    case.conversations([row], redact=False)
    assert "jane@acme-corp.com" in case.train()[0]["messages"][0]["content"]


PROMPT = [{"role": "user", "content": "Say hello."}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
        {"prompt": PROMPT, "chosen": "Hello!", "rejected": "No."},
        {
            "prompt": "Say hello.",
            "chosen": [*PROMPT, {"role": "assistant", "content": "Hello!"}],
            "rejected": [*PROMPT, {"role": "assistant", "content": "No."}],
        },
        {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "Hello!"}],
            "rejected": {"from": "gpt", "value": "No."},
        },
        {
            "chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello!",
            "rejected": "\n\nHuman: Say hello.\n\nAssistant: No.",
        },
        {"prompt": "\n\nHuman: Say hello.\n\nAssistant:", "chosen": " Hello!", "rejected": " No."},
    ],
)
def test_every_common_form_of_a_preference_becomes_prompt_chosen_rejected(case: Case, row: dict[str, Any]) -> None:
    assert case.preferences([row]).pairs == 1
    (kept,) = case.train()
    assert (kept["prompt"], kept["chosen"], kept["rejected"]) == (PROMPT, "Hello!", "No.")


def test_a_system_prompt_outside_both_sides_is_kept(case: Case) -> None:
    system = {"role": "system", "content": "Be kind."}
    case.preferences(
        [
            {
                "prompt": [system, *PROMPT],
                "chosen": [*PROMPT, {"role": "assistant", "content": "Hello!"}],
                "rejected": [*PROMPT, {"role": "assistant", "content": "No."}],
            }
        ]
    )
    assert case.train()[0]["prompt"] == [system, *PROMPT]


def test_unfit_preferences_are_counted_by_reason(case: Case) -> None:
    rows = [
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
        {"prompt": "Say hello.", "chosen": "Same", "rejected": " Same "},
        {"prompt": "Say hello.", "chosen": "", "rejected": "No."},
        {"prompt": "Say hello.", "chosen": "x " * 3000, "rejected": "No."},
        {"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: C\n\nAssistant: d"},
        {"chosen": "\n\nHuman: A\n\nHuman: B\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nHuman: B\n\nAssistant: c"},
    ]
    artifact = case.preferences(rows)
    assert artifact.pairs == 1
    assert reasons(artifact) == {
        "chosen-equals-rejected": 1,
        "different-prompts": 1,
        "empty-answer": 1,
        "roles-out-of-order": 1,
        "too-long": 1,
    }


def test_a_prompt_that_a_benchmark_asks_is_dropped(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "items"
    folder.mkdir(parents=True)
    (folder / "harm.jsonl").write_text(json.dumps({"id": "1", "prompt": "How do I pick the lock of a door?"}) + "\n")
    rows = [
        {"prompt": "how do I pick the lock of a DOOR", "chosen": "No.", "rejected": "Sure."},
        {"prompt": "How do I bake bread at home?", "chosen": "Mix flour.", "rejected": "No."},
    ]
    artifact = case.preferences(rows, benchmarks=Benchmarks(path=tmp_path / "benchmarks", items={"harm": 1}))
    assert reasons(artifact) == {"contaminated": 1}
    assert artifact.dropped[0].examples == ("rows.jsonl:1 (harm): how do I pick the lock of a DOOR",)
    assert [row["prompt"][0]["content"] for row in case.train()] == ["How do I bake bread at home?"]


def test_real_transcripts_are_read(case: Case, tmp_path: Path) -> None:
    if not SHARED.is_file():
        pytest.skip(f"no {SHARED.name} in ../shared/data/preferences beside the checkout")
    with gzip.open(SHARED, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    artifact = case.preferences(rows)
    assert artifact.pairs >= 190
    for row in case.train():
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"] != row["rejected"]
        assert "\n\nHuman:" not in row["prompt"][0]["content"] + row["chosen"]


def test_a_row_that_cannot_be_read_ends_the_stage_where_the_spec_says_so(case: Case) -> None:
    rows: list[Any] = [{"messages": TURNS}, ["no object"]]
    assert reasons(case.conversations(rows)) == {"unreadable": 1}
    with pytest.raises(FmopsError, match=r"^rows\.jsonl:2: no object but list\. .*`curate\.unreadable: skip`"):
        case.conversations(rows, unreadable="stop")


@pytest.mark.parametrize("sign", ["\u2028", "\u2029"])
def test_texts_with_other_ends_of_line_are_learnt_from_whole(sign, case, context):
    """Rows are written with the sign as it is: a reader may end them at a line feed alone."""
    from fmops.adapters.held_out import read_held_out
    from fmops.adapters.model_files import load_tokenizer
    from fmops.finetuning.instruct import read_dialogues
    from fmops.finetuning.preferences import read_pairs
    from fmops.lifecycle import Align, Instruct

    asked, told = {"role": "user", "content": "Well?"}, f"One line.{sign}Another."
    tokenizer = load_tokenizer(case.base.model)
    case.conversations([{"messages": [asked, {"role": "assistant", "content": told}]}])
    assert sign in (case.out / "train.jsonl").read_text()
    [dialogue] = read_dialogues(case.out / "train.jsonl", Instruct(), tokenizer=tokenizer, context=context)
    assert sign in tokenizer.decode(dialogue.ids)
    case.preferences([{"prompt": [asked], "chosen": told, "rejected": "No."}])
    [pair] = read_pairs(case.out / "train.jsonl", Align(), tokenizer=tokenizer, context=context)
    assert sign in tokenizer.decode(pair.chosen)
    path = case.out / "new.jsonl"
    path.write_text(json.dumps({"text": told}, ensure_ascii=False) + "\n")
    assert len(read_held_out(path, tokenizer, block_tokens=64).documents) == 1


def test_reports_and_aliases_with_other_ends_of_line_are_read(tmp_path, case):
    from types import SimpleNamespace

    from fmops.adapters.garak import OutsideFailed, read_report
    from fmops.orchestration.show import _generations
    from fmops.store import Store

    row = json.dumps({"prompt": "Well?", "response": "One.\u2028Two."}, ensure_ascii=False)
    (tmp_path / "generations.jsonl").write_text(row + "\n")
    project = SimpleNamespace(store=SimpleNamespace(files=lambda _: tmp_path))
    assert _generations(project, None) == {"Well?": "One.\u2028Two."}
    entry = json.dumps({"entry_type": "attempt", "status": 1, "prompt": "One.\u2028Two."}, ensure_ascii=False)
    with pytest.raises(OutsideFailed, match="ends early"):
        read_report(entry + "\n", SimpleNamespace(task=SimpleNamespace(task="t"), folder=tmp_path))
    store = Store(tmp_path / "store")
    store.root.mkdir()
    for before, after in ((None, "a"), ("a", "b")):
        store.move_aliases({"champion": after}, expected={"champion": before}, why="by\u2028hand")
    assert store.aliases()["champion"] == "b"
