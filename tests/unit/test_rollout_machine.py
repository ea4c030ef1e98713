"""A rollout goes on only with evidence, and stops for harm, silence, the deadline and people."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.simulated import RATES, Production
from fmops.deployment.rollout.evidence import SIGNALS, Evidence, observe
from fmops.deployment.rollout.machine import (
    MoveChampion,
    RolloutConflict,
    SetTraffic,
    State,
    advance,
    detectable,
    wanted,
)
from fmops.errors import FmopsError
from fmops.production import Rollout

POLICY = Rollout(steps=(0.1, 0.5), shadow=0.0, answers=60)


def begin(production: Production, policy: Rollout = POLICY) -> tuple[State, Evidence]:
    state = State(
        id="r1", champion=production.champion, challenger=production.challenger, started_s=production.now_s,
        entered_s=production.now_s,
    )  # fmt: skip
    return state, Evidence.none_yet(production.champion, production.challenger, policy.margins)


def play(production: Production, policy: Rollout = POLICY, *, look: int = 100, looks: int = 150):
    """Serve and look until the rollout ends; returns state, evidence and the number of looks."""
    state, evidence = begin(production, policy)
    for number in range(looks):
        state, actions = advance(state, evidence, policy, production.now_s, refused=())
        traffic = actions[-1]
        assert isinstance(traffic, SetTraffic)
        if state.phase in ("promoted", "rolled back"):
            return state, evidence, number
        if traffic.canary != (evidence.shares[-1][1] if evidence.shares else 0.0):
            evidence = evidence.share_changed(production.now_s, traffic.canary)
        evidence = observe(evidence, production.serve(look, canary=traffic.canary, shadow=traffic.shadow))
    return state, evidence, looks


def test_an_equal_challenger_climbs_the_ramp_and_is_promoted():
    state, evidence, _ = play(Production(seed=1))
    assert state.phase == "promoted"
    assert state.reason == "not worse beyond any margin (α = 0.05), ramp complete"
    assert [share for _, share in evidence.shares] == [0.1, 0.5]
    move, traffic = wanted(state, POLICY)
    assert move == MoveChampion(before="release-champion", after="release-challenger", why=f"r1: {state.reason}")
    assert traffic == SetTraffic(champion="release-challenger", challenger=None)


def test_five_percent_worse_answers_with_equal_latency_are_rolled_back():
    """S08."""
    for seed in range(5):
        state, evidence, _ = play(Production(seed=seed, harm={"refused": 0.05}), look=50)
        assert state.phase == "rolled back"
        assert "refused" in state.reason
        assert evidence.canary_answers < 1500


def test_a_secret_now_and_then_is_harm():
    state, _, _ = play(Production(seed=3, harm={"secret": 0.03}))
    assert state.phase == "rolled back"
    assert "secret" in state.reason


def test_a_slow_challenger_is_rolled_back():
    state, _, _ = play(Production(seed=4, slower=2.0))
    assert state.phase == "rolled back"
    assert state.reason.startswith("slower: 50% of first_token_s is at least 0.")


def test_a_challenger_whose_latency_is_not_known_is_not_promoted():
    class Untimed(Production):
        def _answer(self, id_, arm, *, shadow_of=None):
            trace = super()._answer(id_, arm, shadow_of=shadow_of)
            return trace if arm == "champion" else trace.model_copy(update={"first_token_s": None})

    state, evidence, _ = play(Untimed(seed=16), looks=60)
    assert state.phase == "canary"
    assert evidence.unproven(0.05) == ("first_token_s",)


def test_shadow_pairs_find_harm_before_any_client_sees_it():
    policy = POLICY.model_copy(update={"shadow": 0.5, "answers": 400})
    state, evidence, _ = play(Production(seed=5, harm={"empty": 0.2}), policy)
    assert state.phase == "rolled back"
    assert evidence.canary_answers == 0
    assert "empty +" in state.reason
    assert "shadow pairs" in state.reason


def test_how_often_one_looks_changes_nothing():
    traces = list(Production(seed=6, harm={"refused": 0.02}).serve(3000, canary=0.3, shadow=0.2))
    _, start = begin(Production(seed=6))
    start = start.share_changed(0.0, 0.3)
    whole = observe(start, traces)
    pieces = start
    for piece in itertools.batched(traces, 7) if hasattr(itertools, "batched") else _batched(traces, 7):
        pieces = observe(pieces, piece)
    assert pieces == whole
    assert whole.canary_answers == sum(trace.arm == "canary" for trace in traces)


def _batched(rows, size):
    return (rows[start : start + size] for start in range(0, len(rows), size))


def test_no_metrics_hold_and_at_the_deadline_roll_back():
    """S10: never promoted."""
    production = Production(seed=7)
    state, evidence = begin(production)
    now = production.now_s
    state, _ = advance(state, evidence, POLICY, now, refused=())
    assert state.phase == "canary"
    evidence = evidence.share_changed(now, 0.1)
    state, actions = advance(state, evidence, POLICY, now + 1801, refused=())
    assert (state.phase, state.held_by) == ("held", "silence")
    assert "no answer of the challenger for 30 minutes" in state.reason
    assert actions[-1].canary == 0.1  # its traffic stays, or it could never answer again
    state, _ = advance(state, evidence, POLICY, now + 71 * 3600, refused=())
    assert state.phase == "held"
    state, actions = advance(state, evidence, POLICY, now + 72 * 3600, refused=())
    assert state.phase == "rolled back"
    assert state.reason.startswith("deadline of 72 h without proof on failed, empty")
    assert actions == (SetTraffic(champion="release-champion", challenger=None),)


def test_answers_that_come_again_end_the_silence():
    production = Production(seed=8)
    state, evidence = begin(production)
    state, _ = advance(state, evidence, POLICY, production.now_s, refused=())
    evidence = evidence.share_changed(production.now_s, 0.1)
    state, _ = advance(state, evidence, POLICY, production.now_s + 2000, refused=())
    assert state.phase == "held"
    production.now_s += 2100
    evidence = observe(evidence, production.serve(100, canary=0.1))
    state, _ = advance(state, evidence, POLICY, production.now_s, refused=())
    assert (state.phase, state.reason) == ("canary", "answers came again")


def test_answers_without_signals_promote_nothing():
    production = Production(seed=9, rates={"failed": 0.0})
    state, evidence, _ = play(production, looks=60)
    assert state.phase == "canary"
    assert {"empty", "refused"} <= set(evidence.unproven(0.05))


def test_a_signal_that_only_the_champion_shows_blocks_the_promotion():
    class Half(Production):
        def _answer(self, id_, arm, *, shadow_of=None):
            trace = super()._answer(id_, arm, shadow_of=shadow_of)
            if arm == "champion":
                return trace
            return trace.model_copy(update={"signals": {k: v for k, v in trace.signals.items() if k != "prompt_leak"}})

    state, evidence, _ = play(Half(seed=10), looks=60)
    assert state.phase == "canary"
    assert evidence.unproven(0.05) == ("prompt_leak",)


def test_a_refused_check_ends_it_before_any_traffic():
    production = Production(seed=11)
    state, evidence = begin(production)
    waiting, actions = advance(state, evidence, POLICY, production.now_s + 5, refused=None)
    assert waiting == state
    assert actions[-1].canary == actions[-1].shadow == 0
    state, actions = advance(state, evidence, POLICY, production.now_s, refused=("parity failed",))
    assert (state.phase, state.reason) == ("rolled back", "refused before any traffic: parity failed")
    assert actions[-1].challenger is None


def test_people_hold_resume_promote_and_roll_back():
    production = Production(seed=12)
    state, evidence = begin(production)
    with pytest.raises(RolloutConflict, match="has not passed its checks yet"):
        advance(state, evidence, POLICY, production.now_s, refused=None, order="promote")
    state, _ = advance(state, evidence, POLICY, production.now_s, refused=())
    with pytest.raises(RolloutConflict, match="is not held; it is in phase canary"):
        advance(state, evidence, POLICY, production.now_s, refused=(), order="resume")
    held, _ = advance(state, evidence, POLICY, production.now_s, refused=(), order="hold")
    evidence = observe(evidence.share_changed(production.now_s, 0.1), production.serve(50, canary=0.1))
    still, _ = advance(held, evidence, POLICY, production.now_s, refused=())
    assert still == held  # a person's hold is not ended by answers
    resumed, _ = advance(held, evidence, POLICY, production.now_s, refused=(), order="resume")
    assert (resumed.phase, resumed.reason) == ("canary", "resumed by hand")
    promoted, _ = advance(held, evidence, POLICY, production.now_s, refused=(), order="promote")
    assert promoted.reason.startswith("by hand, without proof on failed, empty")
    gone, _ = advance(held, evidence, POLICY, production.now_s, refused=(), order="rollback")
    assert gone.phase == "rolled back"
    with pytest.raises(RolloutConflict, match=r"rollout r1 has ended: rolled back \(by hand\)"):
        advance(gone, evidence, POLICY, production.now_s, refused=(), order="promote")


def test_harm_wins_over_a_person_who_promotes():
    production = Production(seed=13, harm={"empty": 0.5})
    state, evidence = begin(production)
    state, _ = advance(state, evidence, POLICY, production.now_s, refused=())
    evidence = observe(evidence.share_changed(0.0, 0.5), production.serve(300, canary=0.5))
    state, _ = advance(state, evidence, POLICY, production.now_s, refused=(), order="promote")
    assert state.phase == "rolled back"


def test_traces_of_other_releases_and_of_spoilt_requests_do_not_count():
    production = Production(seed=14)
    _, start = begin(production)
    start = start.share_changed(0.0, 0.5)
    traces = list(production.serve(50, canary=0.5))
    others = [trace.model_copy(update={"release": "release-old"}) for trace in traces]
    spoilt = [trace.model_copy(update={"status": 429, "signals": {}}) for trace in traces]
    left = [trace.model_copy(update={"status": 499, "finish_reason": "cancelled"}) for trace in traces]
    retried = [trace.model_copy(update={"retry_of": "r0"}) for trace in traces]
    assert observe(start, [*others, *spoilt, *left, *retried]) == start


def test_each_step_says_what_it_can_see():
    production = Production(seed=15)
    _, evidence = begin(production)
    evidence = observe(evidence.share_changed(0.0, 0.5), production.serve(2000, canary=0.5))
    first, last = (detectable(evidence, Rollout(), step) for step in (0, 2))
    assert 0.1 < first["refused"] < 0.5
    assert 0 < last["refused"] < first["refused"]
    assert set(last) == set(RATES) & set(SIGNALS)


def test_a_ramp_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"the shares must rise: 0.5, 0.1"):
        Rollout(steps=(0.5, 0.1))
    assert issubclass(RolloutConflict, FmopsError)
