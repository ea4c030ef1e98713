"""What users say of a challenger's answers can send it back; what one of them says cannot."""

from __future__ import annotations

from fmops.deployment.rollout.evidence import Evidence, hear, observe
from fmops.deployment.rollout.machine import harm
from fmops.production import Rollout
from fmops.traces import Feedback, Trace


def served(n: int, *, every: int = 2) -> list[Trace]:
    """Healthy answers; every second one is the canary's."""
    return [
        Trace(
            id=f"r-{i}", started_s=float(i), tenant="team", arm="canary" if i % every == 0 else "champion",
            release="release-new" if i % every == 0 else "release-old", operation="chat", status=200,
            finish_reason="stop", duration_s=0.5, completion_tokens=20, prompt="?", response="!",
            signals={"empty": 0.0, "truncated": 0.0, "repeated": 0.0, "refused": 0.0},
        )
        for i in range(n)
    ]  # fmt: skip


def voted(traces: list[Trace], *, users: int, canary_down: int, champion_down: int) -> list[Feedback]:
    """A vote on each answer; one of so many is a thumb down."""
    return [
        Feedback(
            id=trace.id, at_s=trace.started_s + 1, tenant="team", user=f"u{i % users}",
            thumb="down" if (i // 2) % (canary_down if trace.arm == "canary" else champion_down) == 0 else "up",
        )
        for i, trace in enumerate(traces)
    ]  # fmt: skip


def evidence_of(traces: list[Trace], votes: list[Feedback]) -> Evidence:
    start = Evidence.none_yet("release-old", "release-new", {}).share_changed(0.0, 0.5)
    return hear(observe(start, traces), votes)


def test_a_challenger_that_users_blame_is_rolled_back_though_every_other_signal_is_healthy():
    traces = served(400)
    found = harm(evidence_of(traces, voted(traces, users=200, canary_down=2, champion_down=20)), Rollout())
    assert found is not None
    assert "disliked 100 of 200 against the champion's 10 of 200" in found


def test_equal_blame_harms_nobody_and_promotion_does_not_wait_for_votes():
    traces = served(400)
    evidence = evidence_of(traces, voted(traces, users=200, canary_down=5, champion_down=5))
    assert harm(evidence, Rollout()) is None
    assert "disliked" not in evidence.unproven(0.05)


def test_one_voice_that_blames_the_canary_alone_moves_nothing():
    traces = served(400)
    votes = voted(traces, users=1, canary_down=1, champion_down=10**6)
    assert harm(evidence_of(traces, votes), Rollout()) is None


def test_an_answer_counts_once_and_however_votes_are_cut_into_looks():
    traces = served(100)
    votes = voted(traces, users=100, canary_down=3, champion_down=10)
    whole = evidence_of(traces, [*votes, *votes])
    assert whole.signals["disliked"].canary.n == 50
    pieces = evidence_of(traces, [])
    for vote in votes:
        pieces = hear(pieces, [vote])
    assert pieces.signals == whole.signals
