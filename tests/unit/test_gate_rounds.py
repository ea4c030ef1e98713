"""A stream of candidates cannot wear the gate down: α is spent, and what was asked once is not asked again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmops.artifacts import Judged
from fmops.errors import GateRejected, NeedMoreData
from fmops.evaluation import spending
from fmops.jobs import GateJob
from fmops.lifecycle import read_lifecycle
from fmops.orchestration.graph import build
from fmops.orchestration.plan import Planner, Step
from fmops.orchestration.run import _raise_unless_promoted
from fmops.store import InputRef, Record, Store

ALPHA = 0.05


def judged(level: float, *, promoted: bool = False) -> Judged:
    return Judged(candidate="c", level=level, p_value=0.5, promoted=promoted)


def stream(p_values: list[float], alpha: float = ALPHA) -> list[Judged]:
    """The rounds that these p-values lead to."""
    rounds: list[Judged] = []
    for p in p_values:
        level = spending.level(rounds, alpha)
        rounds.append(Judged(candidate="c", level=level, p_value=p, promoted=p <= level))
    return rounds


def test_shares_of_a_grant_never_exceed_it():
    assert sum(spending.share(place) for place in range(1, 20_000)) < 1
    assert spending.share(0) == 0


@given(st.lists(st.floats(0, 1), max_size=60))
def test_wealth_is_never_overdrawn(p_values):
    rounds = stream(p_values)
    for count in range(len(rounds) + 1):
        assert spending.wealth(rounds[:count], ALPHA) >= -1e-12
    # What LORD++ holds on to: the levels sum to at most α for each promotion.
    promotions = max(1, sum(each.promoted for each in rounds))
    assert sum(each.level for each in rounds) <= ALPHA * promotions + 1e-12


def test_a_promotion_earns_and_idle_rounds_cost():
    idle, first = stream([0.9] * 10), stream([0.0, *[0.9] * 9])
    levels = [each.level for each in idle]
    assert levels == sorted(levels, reverse=True)
    assert first[1].level > idle[1].level
    assert first[0].level == idle[0].level == pytest.approx(0.01094, abs=1e-5)


def test_a_hundred_noise_candidates_are_promoted_no_more_often_than_the_budget():
    # E04: 2,000 streams of 100 candidates that are equal to the champion; α = 0.05 promises at most α/2 before any
    # true promotion. Without spending, 99.4 % of the streams would promote one.
    rng = random.Random(4)
    streams = 2000
    fooled = sum(any(each.promoted for each in stream([rng.random() for _ in range(100)])) for _ in range(streams))
    from scipy.special import betaincinv

    lower = 0.0 if fooled == 0 else float(betaincinv(fooled, streams - fooled + 1, 0.001))
    assert lower <= ALPHA / 2
    assert fooled > 0, "a test that spends nothing cannot be fooled, and finds nothing either"


SPEC = """\
name: tiny
base: base
data:
  corpora:
    docs: {source: docs.txt}
instruct: {}
evaluate: {suites: [domain], limit: 10}
gate: {}
"""


@pytest.fixture
def planner(tmp_path):
    """A planner over a spec with a gate; no source is needed for what is asked here."""
    path = tmp_path / "lifecycle.yaml"
    path.write_text(SPEC.replace("instruct: {}", "pretrain: {tokens: 1000}"))
    spec = read_lifecycle(path)
    return Planner(build(spec, tmp_path), Store(tmp_path / "store"), {})


def decision(
    planner: Planner, inputs: dict[str, InputRef], rounds: tuple[Judged, ...], earlier=(), created="1"
) -> Record:
    node = planner.graph.nodes["gate"]
    record = Record(
        node="gate", stage="gate", kind="gate", version=2, fingerprint=f"{created * 20}", digest="d", seed=0,
        config=GateJob(**{**node.config.model_dump(), "earlier": earlier}).model_dump(mode="json"), inputs=inputs,
        files={}, created=created,
        artifact={"verdict": "reject", "reasons": [], "rounds": [each.model_dump() for each in rounds]},
    )  # fmt: skip
    (planner.store.artifacts / record.key).mkdir(parents=True)
    planner.store.commit(record)
    return record


def given_inputs(challenger: str) -> dict[str, InputRef]:
    return {
        name: InputRef(kind="artifact", ref="evaluate-x", digest=digest)
        for name, digest in (("champion", "a"), ("challenger", challenger))
    }


def earlier(planner: Planner, inputs: dict[str, InputRef]) -> tuple[Judged, ...]:
    config = planner._of_this_round(planner.graph.nodes["gate"], inputs).config
    assert isinstance(config, GateJob)
    return config.earlier


def test_the_next_candidate_finds_the_rounds_before_it(planner):
    assert earlier(planner, given_inputs("b")) == ()
    first = judged(0.01)
    decision(planner, given_inputs("b"), (first,))
    assert earlier(planner, given_inputs("c")) == (first,)


def test_the_same_comparison_keeps_its_place_and_costs_nothing(planner):
    first, second = judged(0.01), judged(0.004)
    decision(planner, given_inputs("b"), (first,))
    decision(planner, given_inputs("c"), (first, second), earlier=(first,), created="2")
    assert earlier(planner, given_inputs("b")) == ()
    assert earlier(planner, given_inputs("c")) == (first,)


def test_another_margin_for_the_same_candidate_is_another_round(planner):
    decision(planner, given_inputs("b"), (judged(0.01),))
    node = planner.graph.nodes["gate"]
    wider = replace(node, config=node.config.model_copy(update={"margins": {"domain": 9.0}}))
    config = planner._of_this_round(wider, given_inputs("b")).config
    assert config.earlier == (judged(0.01),)


def test_who_is_told_to_bring_more_data_is_told_what_another_try_costs(planner):
    first = judged(spending.level((), ALPHA))
    gate = decision(planner, given_inputs("b"), (first,))
    gate.artifact.update(verdict="need more data", alpha=ALPHA, reasons=["domain is undecided"])
    steps = {"gate": Step(node=planner.graph.nodes["gate"], state="cached", reason="", record=gate)}
    with pytest.raises(NeedMoreData) as told:
        _raise_unless_promoted(steps, None)
    coming, _ = planner.next_level(ALPHA)
    assert f"is round 2, tested at level {coming:.4f} of α 0.05; this one had {first.level:.4f}" in str(told.value)
    assert coming < first.level
    assert "do not just run again: raise evaluate.limit" in str(told.value)
    gate.artifact["verdict"] = "reject"
    with pytest.raises(GateRejected, match="the gate says reject"):
        _raise_unless_promoted(steps, None)


def test_refused_evidence_is_no_round(planner):
    decision(planner, given_inputs("b"), ())
    assert earlier(planner, given_inputs("c")) == ()


def test_a_rotating_round_asks_items_that_depend_on_everything_in_it(tmp_path):
    def rotation(text: str) -> str:
        path = tmp_path / "lifecycle.yaml"
        path.write_text(text)
        graph = build(read_lifecycle(path), tmp_path)
        from fmops.artifacts import Source

        sources = {uris: Source(uri="x", files=()) for node in graph.nodes.values() for uris in node.sources.values()}
        step: Step = Planner(graph, Store(tmp_path / "s"), sources).plan()["base"]
        planner = Planner(graph, Store(tmp_path / "s"), sources)
        assert step.state == "run"
        return planner._of_this_round(graph.nodes["evaluate-base"], {}).config.rotation

    spec = SPEC.replace("limit: 10", "limit: 10, rotate: true").replace("instruct: {}", "pretrain: {tokens: 1000}")
    one = rotation(spec)
    assert one == rotation(spec.replace("gate: {}", "gate: {alpha: 0.01}"))  # judged otherwise, the same candidate
    assert one != rotation(spec.replace("tokens: 1000", "tokens: 1001"))
    assert rotation(spec.replace(", rotate: true", "")) is None
