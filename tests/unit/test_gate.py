"""What lets a model go on: the gate's policy, its error rates, and evidence that must not be believed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmops.artifacts import Conversations, EvalReport
from fmops.errors import FmopsError
from fmops.evaluation.evidence import Evidence, Pairs
from fmops.evaluation.gate import decide, gate
from fmops.evaluation.protocol import PinnedTask, Protocol, digest, prompts_digest, write_json, write_lines
from fmops.evaluation.suites import TaskConfig
from fmops.integrity import read_lines
from fmops.jobs import GateJob

MARGIN = 0.1


def pinned(family: str, *, items: int, higher: bool = True) -> PinnedTask:
    return PinnedTask(
        task=f"{family}-task", suite=family, family=family, margin=MARGIN, unit="accuracy", higher_is_better=higher,
        metrics=("acc",), chat=False, corpus=None, characters=None, items=items, licence="MIT",
        config=TaskConfig(output_type="multiple_choice", doc_to_choice="choices", doc_to_target="label"),
    )  # fmt: skip


def report(
    folder: Path, scores: dict[str, list[float]], *, higher: bool = True, tolerance: float = 0.0, **engine: str
) -> EvalReport:
    """A report on disk with one task a family."""
    folder.mkdir()
    rows = [
        {"family": family, "suite": family, "task": f"{family}-task", "sample": f"{family}-{index}",
         "cluster": str(index), "metric": "acc", "score": score, "prompt_sha256": f"{family}{index}"}
        for family, values in scores.items() for index, score in enumerate(values)
    ]  # fmt: skip
    protocol = Protocol(
        tasks=tuple(pinned(family, items=len(values), higher=higher) for family, values in scores.items()),
        engine={"torch": "2", **engine}, template_sha256=None, prompts_sha256=prompts_digest(rows), seed=0,
        batch_tolerance=tolerance,
    )  # fmt: skip
    write_lines(folder / "samples.jsonl", rows)
    write_json(folder / "protocol.json", protocol.model_dump(mode="json"))
    return EvalReport(path=folder, metrics=(), fingerprint=protocol.fingerprint)


@pytest.fixture
def judge(tmp_path, context):
    """Run the gate on two reports with no gain asked for, unless said."""

    def run(champion: EvalReport, challenger: EvalReport, data=None, **config):
        out = tmp_path / "gate"
        out.mkdir(exist_ok=True)
        config = {"primary": (), **config}
        return gate(
            GateJob(**config), champion=champion, challenger=challenger, out=out, context=context, **(data or {})
        )

    return run


def half(n: int) -> list[float]:
    return [float(index % 2) for index in range(n)]


def test_a_better_model_is_promoted_and_the_reason_has_numbers(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(200), "other": half(200)})
    challenger = report(tmp_path / "b", {"skill": [1.0] * 200, "other": half(200)})
    decision = judge(champion, challenger, primary=("skill",))
    assert decision.verdict == "promote"
    assert decision.improved == ("skill",)
    assert decision.reasons[0].startswith("skill improved: +0.5000 accuracy (one-sided 98.91 % bounds")
    assert "n = 200" in decision.reasons[0]
    written = json.loads((tmp_path / "gate" / "decision.json").read_text())
    assert written["verdict"] == "promote"
    assert "path" not in written


def test_a_regression_in_one_family_outweighs_every_gain(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(400), "harm": [1.0] * 400})
    challenger = report(tmp_path / "b", {"skill": [1.0] * 400, "harm": half(400)})
    decision = judge(champion, challenger, primary=("skill",))
    assert decision.verdict == "reject"
    assert decision.reasons[0].startswith("harm regressed: -0.5000")
    assert len(decision.reasons) == 1


def test_resistance_without_over_refusal_is_named(tmp_path, judge):
    lonely = [report(tmp_path / name, {"harm": half(300)}) for name in ("a", "b")]
    assert "over-refusal was not measured" in judge(*lonely).reasons[-1]
    paired = [report(tmp_path / name, {"harm": half(300), "over-refusal": half(300)}) for name in ("c", "d")]
    assert not any("not measured" in reason for reason in judge(*paired).reasons)


def test_too_few_items_ask_for_more(tmp_path, judge):
    decision = judge(report(tmp_path / "a", {"skill": half(10)}), report(tmp_path / "b", {"skill": half(10)}))
    assert decision.verdict == "need more data"
    assert "skill is undecided" in decision.reasons[0]
    assert "add items or widen the margin" in decision.reasons[0]


def test_an_equal_model_is_no_gain(tmp_path, judge):
    scores = {"loss": [1.0 + 0.01 * index for index in range(50)]}
    decision = judge(report(tmp_path / "a", scores), report(tmp_path / "b", scores), primary=("loss",))
    assert decision.verdict == "reject"
    assert "a gain in loss is ruled out" in decision.reasons[0]


def test_lower_is_better_where_the_suite_says_so(tmp_path, judge):
    before = [1.0 + 0.01 * index for index in range(50)]
    after = [value - 0.05 - 0.001 * (index % 3) for index, value in enumerate(before)]
    champion = report(tmp_path / "a", {"loss": before}, higher=False)
    challenger = report(tmp_path / "b", {"loss": after}, higher=False)
    assert judge(champion, challenger, primary=("loss",)).verdict == "promote"
    assert judge(challenger, champion, primary=("loss",)).verdict == "reject"


def test_the_specs_margin_wins_over_the_suites(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(200)})
    challenger = report(tmp_path / "b", {"skill": [0.0] * 40 + half(160)})
    assert judge(champion, challenger).verdict == "need more data"
    assert judge(champion, challenger, margins={"skill": 0.2}).verdict == "promote"
    assert judge(champion, challenger, margins={"skill": 0.01}).verdict == "reject"


def test_a_margin_for_nothing_is_a_mistake(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(20)})
    with pytest.raises(FmopsError, match=r"unknown family under gate.margins: 'skil'. Did you mean 'skill'\?"):
        judge(champion, champion, margins={"skil": 0.1})


def test_an_unmeasured_primary_family_rejects(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(500)})
    decision = judge(champion, champion, primary=("domain",))
    assert decision.verdict == "reject"
    assert "the primary family domain was not measured" in decision.reasons[0]


def rewrite(folder: Path, change) -> None:
    rows = read_lines(folder / "samples.jsonl")
    write_lines(folder / "samples.jsonl", change(rows))


TAMPERED = {
    "nan": (lambda rows: [{**rows[0], "score": math.nan}, *rows[1:]], "scores that are no finite number"),
    "text": (lambda rows: [{**rows[0], "score": "1"}, *rows[1:]], "scores that are no finite number"),
    "fewer": (lambda rows: rows[:-1], "has 499 of 500 registered acc scores of skill-task"),
    "none": (lambda rows: [], "has 0 of 500 registered acc scores of skill-task"),
    "twice": (lambda rows: [*rows, rows[0]], "scored skill-task/skill-0/acc twice"),
    "prompt": (lambda rows: [{**rows[0], "prompt_sha256": "x"}, *rows[1:]], "items or prompts are not those"),
    "clusters": (lambda rows: [{**row, "cluster": str(n)} for n, row in enumerate(rows, 1)], "prompts are not those"),
    "field": (lambda rows: [{"task": "skill-task"}], "samples.jsonl:1 lacks a field"),
    "huge": (lambda rows: [{**rows[0], "score": 10**400}, *rows[1:]], "scores that are no finite number"),
    "null": (lambda rows: [None, *rows[1:]], "samples.jsonl:1 is no object but null"),
    "list": (lambda rows: [rows[0], [1], *rows[2:]], "samples.jsonl:2 is no object but [1]"),
    "sample": (lambda rows: [{**rows[0], "sample": ["x"]}, *rows[1:]], "samples.jsonl:1 has a sample that is no text"),
    "slack text": (lambda rows: [{**rows[0], "slack": "1"}, *rows[1:]], "has a slack that is no number"),
    "slack null": (lambda rows: [{**rows[0], "slack": None}, *rows[1:]], "has a slack that is no number"),
    "slack nan": (lambda rows: [{**rows[0], "slack": math.nan}, *rows[1:]], "has a slack that is no number"),
}  # fmt: skip


@pytest.mark.parametrize("defect", TAMPERED)
@pytest.mark.parametrize("who", ["champion", "challenger"])
def test_evidence_with_a_defect_rejects(tmp_path, judge, defect, who):
    change, told = TAMPERED[defect]
    reports = {name: report(tmp_path / name, {"skill": half(500)}) for name in ("champion", "challenger")}
    assert judge(**reports).verdict == "promote"
    rewrite(tmp_path / who, change)
    decision = judge(**reports)
    assert decision.verdict == "reject"
    assert any(f"the {who}" in reason and told in reason for reason in decision.reasons), decision.reasons
    assert decision.families == ()


PROTOCOLS = {
    "template": ({"template_sha256": "0" * 64}, "the chat templates differ"),
    "tolerance": ({"batch_tolerance": 0.01}, "the batch tolerances differ: 0.0 and 0.01"),
    "seed": ({"seed": 1}, "the seeds differ: 0 and 1"),
    "scorers": ({"engine": {"torch": "2", "scorers": "new"}}, "with scorers None, the challenger with new"),
    "torch": ({"engine": {"torch": "3"}}, "was measured with torch 2, the challenger with 3"),
    "items": ({"prompts_sha256": "0" * 64}, "the items or prompts differ"),
    "no task": ({"tasks": []}, "was asked of the champion alone"),
}  # fmt: skip


def change_protocol(made: EvalReport, **changes) -> EvalReport:
    """The report as an evaluation under another protocol would have left it."""
    path = made.path / "protocol.json"
    write_json(path, json.loads(path.read_text()) | changes)
    return with_fingerprint(made)


@pytest.mark.parametrize("defect", PROTOCOLS)
def test_two_protocols_reject_and_the_reason_names_the_field(tmp_path, judge, defect):
    changes, told = PROTOCOLS[defect]
    champion, challenger = (report(tmp_path / name, {"skill": half(500)}) for name in ("a", "b"))
    assert judge(champion, challenger).verdict == "promote"
    decision = judge(champion, change_protocol(challenger, **changes))
    assert decision.verdict == "reject"
    assert any(told in reason for reason in decision.reasons), decision.reasons
    assert decision.families == ()


def test_a_difference_that_no_named_field_explains_rejects(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(500), "more": half(500)}) for name in ("a", "b"))
    written = json.loads((tmp_path / "b" / "protocol.json").read_text())
    turned = change_protocol(challenger, tasks=written["tasks"][::-1])
    assert judge(champion, turned).reasons == (
        "the protocols differ in tasks; evaluate both with the same items, prompts and engine",
    )


def test_missing_samples_reject(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(500)}) for name in ("a", "b"))
    (tmp_path / "b" / "samples.jsonl").unlink()
    decision = judge(champion, challenger)
    assert decision.verdict == "reject"
    assert "the challenger's evaluation cannot be read" in decision.reasons[0]
    assert str(tmp_path) not in decision.reasons[0]


def test_another_engine_or_task_rejects_and_says_which(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(500)}, transformers="5.24")
    challenger = report(tmp_path / "b", {"skill": half(500)}, transformers="5.25")
    assert judge(champion, challenger).reasons == (
        "the champion was measured with transformers 5.24, the challenger with 5.25; "
        "evaluate both with the same items, prompts and engine",
    )
    more = report(tmp_path / "c", {"skill": half(500), "harm": half(500)}, transformers="5.24")
    assert "task harm-task was asked of the challenger alone" in judge(champion, more).reasons[0]


def test_a_report_that_lost_its_protocol_rejects(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(500)}) for name in ("a", "b"))
    forged = challenger.model_copy(update={"fingerprint": "0" * 64})
    assert "protocol.json is not the one" in judge(champion, forged).reasons[0]


def test_reports_of_an_fmops_that_knew_fewer_fields_are_compared(tmp_path, judge):
    new, old = (report(tmp_path / name, {"skill": half(500)}) for name in ("a", "b"))
    written = json.loads((tmp_path / "b" / "protocol.json").read_text())
    for task in written["tasks"]:
        del task["examples"]
    write_json(tmp_path / "b" / "protocol.json", written)
    assert judge(new, old.model_copy(update={"fingerprint": digest(written)})).verdict == "promote"
    assert "protocol.json is not the one" in judge(new, old).reasons[0]


def test_one_document_is_no_evidence(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"loss": [1.5]}) for name in ("a", "b"))
    decision = judge(champion, challenger)
    assert decision.verdict == "reject"
    assert "family loss has one cluster" in decision.reasons[0]


def test_items_that_the_training_data_held_judge_nothing_and_are_shown(tmp_path, judge):
    # A13: the challenger has learnt fifty of the items by heart and is worse on all others.
    champion = report(tmp_path / "a", {"skill": half(400)})
    challenger = report(tmp_path / "b", {"skill": [1.0] * 100 + [0.0] * 20 + half(280)})
    assert judge(champion, challenger, primary=("skill",)).verdict == "promote"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    held = [{"task": "skill-task", "sample": f"skill-{index}"} for index in range(100)]
    write_lines(corpus / "contaminated.jsonl", held)
    data = Conversations(path=corpus, conversations=1, held_out=0)
    decision = judge(champion, challenger, primary=("skill",), data={"conversations": data})
    family = decision.families[0]
    assert decision.verdict != "promote"
    assert (family.n, family.contaminated) == (300, 100)
    assert family.difference == pytest.approx(-10 / 300)
    assert family.raw_difference == pytest.approx(40 / 400)
    assert "100 left out: in the training data; with them +0.1000" in decision.reasons[0]


def test_a_family_that_was_wholly_trained_on_rejects(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(50)}) for name in ("a", "b"))
    write_lines(tmp_path / "contaminated.jsonl", [{"task": "skill-task", "sample": f"skill-{n}"} for n in range(50)])
    data = Conversations(path=tmp_path, conversations=1, held_out=0)
    decision = judge(champion, challenger, data={"conversations": data})
    assert decision.verdict == "reject"
    assert decision.reasons == ("family skill: the training data held all of its 50 items; measure it on others",)
    assert decision.rounds == ()


def test_an_answer_that_a_batch_could_turn_counts_against_the_challenger(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(200)}, tolerance=1e-3) for name in ("a", "b"))
    assert judge(champion, challenger).verdict == "promote"
    rewrite(tmp_path / "b", lambda rows: [{**row, "slack": 1e-4 if n < 30 else 1.0} for n, row in enumerate(rows)])
    decision = judge(champion, challenger)
    assert decision.verdict == "need more data"
    assert decision.families[0].fragile == 30
    assert "30 within the batch tolerance, counted as lost" in decision.reasons[0]


def rewritten(folder: Path, **fields) -> None:
    """Give every task of a report these fields."""
    path = folder / "protocol.json"
    protocol = json.loads(path.read_text())
    write_json(path, {**protocol, "tasks": [{**task, **fields} for task in protocol["tasks"]]})


@pytest.mark.parametrize(("champion_falls", "verdict"), [(0, "reject"), (1, "promote")])
def test_a_critical_attack_that_the_champion_withstood_blocks_be_it_one(tmp_path, judge, champion_falls, verdict):
    before, after = [1.0] * 200, [1.0] * 200
    after[7] = 0.0
    before[:champion_falls] = [0.0] * champion_falls
    folders = [tmp_path / name for name in ("a", "b")]
    reports = [report(folder, {"attacks": scores}) for folder, scores in zip(folders, (before, after), strict=True)]
    assert judge(*reports).verdict == "promote", "one of 200 is within the margin"
    for folder in folders:
        rewritten(folder, critical=True)
    decision = judge(*(with_fingerprint(each) for each in reports))
    assert decision.verdict == verdict
    if verdict == "reject":
        assert decision.reasons == (
            "attacks-task is critical: the champion withstood all 200, the challenger gave way to 1, first attacks-7",
        )


def with_fingerprint(made: EvalReport) -> EvalReport:
    protocol = Protocol.model_validate_json((made.path / "protocol.json").read_bytes())
    return made.model_copy(update={"fingerprint": protocol.fingerprint})


@pytest.fixture
def pooled(tmp_path):
    """Two reports whose benchmarks are one family, `all`."""

    def make(before: dict[str, list[float]], after: dict[str, list[float]], **given) -> list[EvalReport]:
        made = []
        for name, scores in (("before", before), ("after", after)):
            folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
            found = report(folder, scores, **given)
            rewritten(folder, family="all")
            made.append(with_fingerprint(found))
        return made

    return make


def test_a_benchmark_that_falls_inside_a_family_that_holds_is_named_and_rejects(tmp_path, judge, pooled):
    # One of five loses 40 of its 100 items: 0.033 of the family's 1,200, whose margin is 0.1.
    before = {"small": half(100), **{f"large-{n}": half(275) for n in range(4)}}
    reports = pooled(before, {**before, "small": [0.0] * 80 + half(20)})
    decision = judge(*reports)
    assert decision.families[0].verdict == "non-inferior"
    assert decision.verdict == "reject"
    assert decision.reasons == (
        "small-task of all fell by more than its guard: -0.4000 accuracy (one-sided 99 % bounds -0.5163 and -0.2940, "
        "guard 0.2, n = 100)",
    )
    written = json.loads((tmp_path / "gate" / "decision.json").read_text())["guards"]
    assert [(each["task"], each["fallen"]) for each in written][:2] == [("small-task", True), ("large-0-task", False)]
    assert judge(*reports, guards={"small-task": 0.3}).verdict == "promote", "its optimistic end is -0.29"
    assert judge(*reports, margins={"all": 0.2}).verdict == "promote", "left out, a guard is twice the margin"


def test_a_guard_that_is_undecided_blocks_nothing(judge, pooled):
    # Three of ten items lost, and the family holds: ten items say too little.
    before = {"small": [1.0] * 10, "large": half(500)}
    decision = judge(*pooled(before, {**before, "small": [0.0] * 3 + [1.0] * 7}))
    small = decision.guards[0]
    assert (small.difference, small.fallen) == (pytest.approx(-0.3), False)
    assert small.lower < -small.guard < small.upper
    assert decision.verdict == "promote"


def test_guards_keep_their_alpha_when_the_rounds_have_spent_theirs(judge, pooled):
    before = {name: half(400) for name in ("a", "b", "c", "d", "e")}
    reports = pooled(before, {**before, "a": [0.0] * 240 + half(160)})
    first = judge(*reports)
    late = judge(*reports, earlier=(first.rounds[0],) * 30)
    assert late.level < first.level
    assert late.guards == first.guards
    assert late.verdict == "reject"


def test_guards_hold_in_bits_per_byte(judge, pooled):
    before = {name: [1.0 + 0.01 * n for n in range(40)] for name in ("law", "code", "news", "talk")}
    worse = [value + 0.3 + 0.001 * (n % 3) for n, value in enumerate(before["law"])]
    gained = [value - 0.1 - 0.001 * (n % 3) for n, value in enumerate(before["code"])]
    decision = judge(*pooled(before, {**before, "law": worse, "code": gained}, higher=False))
    assert [each.task for each in decision.guards if each.fallen] == ["law-task"]
    assert decision.guards[0].difference == pytest.approx(-0.301, abs=1e-4)
    assert decision.verdict == "reject"


def test_a_benchmark_alone_in_its_family_has_the_margin_and_may_be_given_a_guard(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(200)})
    challenger = report(tmp_path / "b", {"skill": [0.0] * 40 + half(160)})
    assert judge(champion, challenger, margins={"skill": 0.2}).guards == ()
    assert judge(champion, challenger, margins={"skill": 0.2}, guards={"skill-task": 0.02}).verdict == "reject"


def test_items_that_the_training_data_held_guard_nothing(tmp_path, judge, pooled):
    before = {"small": half(100), "large": half(800)}
    reports = pooled(before, {**before, "small": [0.0] * 80 + half(20)})
    assert judge(*reports).verdict == "reject"
    write_lines(
        tmp_path / "contaminated.jsonl", [{"task": "small-task", "sample": f"small-{index}"} for index in range(80)]
    )
    decision = judge(*reports, data={"conversations": Conversations(path=tmp_path, conversations=1, held_out=0)})
    assert [each.n for each in decision.guards] == [20, 800]
    assert decision.verdict == "promote"


def test_a_guard_for_nothing_is_a_mistake(tmp_path, judge):
    champion = report(tmp_path / "a", {"skill": half(20)})
    told = r"unknown task under gate.guards: 'skil-task'. Did you mean 'skill-task'\? Known: skill-task."
    with pytest.raises(FmopsError, match=told):
        judge(champion, champion, guards={"skil-task": 0.1})


def test_a_scale_is_not_surer_than_its_tolerance(tmp_path, judge):
    scores = {"loss": [1.0 + 0.01 * index for index in range(50)]}
    champion, challenger = (report(tmp_path / name, scores, tolerance=0.2) for name in ("a", "b"))
    family = judge(champion, challenger).families[0]
    assert (family.lower, family.upper) == (pytest.approx(-0.2), 0.0)


def test_the_level_falls_with_the_rounds_before(tmp_path, judge):
    champion, challenger = (report(tmp_path / name, {"skill": half(60)}) for name in ("a", "b"))
    first = judge(champion, challenger)
    assert first.verdict == "promote"
    assert first.level == pytest.approx(0.01094, abs=1e-5)
    assert first.p_value is not None
    assert first.p_value <= first.level
    rejected = first.rounds[0].model_copy(update={"promoted": False})
    late = judge(champion, challenger, earlier=(rejected,) * 30)
    assert late.verdict == "need more data"
    assert len(late.rounds) == 31
    assert late.wealth < 0.025


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=4), min_size=1))
def test_the_p_value_says_what_the_verdict_says(families):
    for alpha in (0.05, 0.01, 0.3):
        decided = decide(evidence(families), alpha=alpha, margins={}, primary=("a",) if "a" in families else ())
        assert decided.p_value is not None
        if abs(decided.p_value - alpha) > 1e-9:
            assert (decided.verdict == "promote") == (decided.p_value < alpha)


def evidence(families: dict[str, list[float]], *, binary: bool = True) -> Evidence:
    pairs = {
        name: Pairs(
            name,
            differences,
            [str(index) for index in range(len(differences))],
            binary,
            tasks=[f"{name}-task"] * len(differences),
        )
        for name, differences in families.items()
    }
    return Evidence((), tuple(pinned(name, items=len(values)) for name, values in families.items()), pairs)


def draw(rng: random.Random, n: int, *, shift: float, disagreement: float = 0.2) -> list[float]:
    won = (disagreement + shift) / 2
    draws = [rng.random() for _ in range(n)]
    return [1.0 if value < won else -1.0 if value < disagreement else 0.0 for value in draws]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=2), min_size=1))
def test_promotion_always_means_every_family_cleared_its_margin(families):
    decision = decide(evidence(families), alpha=0.05, margins={}, primary=())
    cleared = all(result.lower > -result.margin for result in decision.families)
    assert (decision.verdict == "promote") == cleared
    assert all(result.lower <= result.difference <= result.upper for result in decision.families)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=5, max_size=80), st.integers(0, 79))
def test_a_better_answer_never_hurts(differences, index):
    index %= len(differences)
    better = [min(1.0, value + 1) if place == index else value for place, value in enumerate(differences)]
    before, after = (
        decide(evidence({"a": values}), alpha=0.05, margins={}, primary=()).families[0]
        for values in (differences, better)
    )
    assert after.lower >= before.lower - 1e-9


FAMILIES = ("capability", "domain", "forgetting", "harm", "over-refusal", "bias")


def promotions(trials: int, shifts: dict[str, float], *, n: int, primary: tuple[str, ...], seed: int) -> int:
    rng = random.Random(seed)
    promoted = 0
    for _ in range(trials):
        found = evidence({name: draw(rng, n, shift=shifts.get(name, 0.0)) for name in FAMILIES})
        promoted += decide(found, alpha=0.05, margins={}, primary=primary).verdict == "promote"
    return promoted


def at_least(hits: int, n: int, level: float = 0.999) -> float:
    """Clopper–Pearson: what the rate is at least."""
    from scipy.special import betaincinv

    return 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, 1 - level))


def test_noise_is_promoted_no_more_often_than_alpha():
    # Two primaries of equal models, 600 pairs of reports, six families of 300 items.
    promoted = promotions(600, {}, n=300, primary=("domain", "capability"), seed=3)
    assert at_least(promoted, 600) <= 0.05


@pytest.mark.parametrize("worse", ["harm", "bias"])
def test_a_true_regression_at_the_margin_is_blocked(worse):
    # The domain gains much, so only the regressed family stands in the way; at the margin it passes with at most α.
    promoted = promotions(400, {"domain": 0.18, worse: -MARGIN}, n=300, primary=("domain",), seed=4)
    assert at_least(promoted, 400) <= 0.05


def test_a_good_model_is_promoted():
    promoted = promotions(200, {"domain": 0.15}, n=600, primary=("domain",), seed=5)
    assert promoted / 200 > 0.95


def test_clustered_gains_count_documents_not_sentences():
    # Forty sentences of two documents: the sentences agree, the documents are too few to conclude anything.
    differences = [1.0] * 20 + [0.0] * 20
    pairs = Pairs("domain", differences, ["a"] * 20 + ["b"] * 20, True, tasks=["domain-task"] * 40)
    found = Evidence((), (pinned("domain", items=40),), {"domain": pairs})
    decision = decide(found, alpha=0.05, margins={}, primary=("domain",))
    assert decision.verdict == "need more data"
    assert "2 clusters" in decision.reasons[0]


def one_of_twenty(trials: int, loss: float, *, seed: int) -> int:
    """How often twenty benchmarks of 400 items pass, one of which is worse by `loss`."""
    rng = random.Random(seed)
    passed = 0
    for _ in range(trials):
        worse = f"b{rng.randrange(20)}"
        found = evidence(
            {name: draw(rng, 400, shift=-loss if name == worse else 0.0) for name in (f"b{n}" for n in range(20))}
        )
        passed += decide(found, alpha=0.05, margins={}, primary=()).verdict == "promote"
    return passed


def test_one_regressed_benchmark_of_twenty_is_found():
    # E02: worse by the margin passes at most α of the times, an equal model nearly always.
    assert at_least(one_of_twenty(120, MARGIN, seed=6), 120) <= 0.05
    assert one_of_twenty(20, 2 * MARGIN, seed=7) == 0
    assert one_of_twenty(20, 0.0, seed=8) >= 15
