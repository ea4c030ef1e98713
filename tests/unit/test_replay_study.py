"""The replay study says what it measured: differences to the start, intervals over seeds, a whole picture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def replay():
    spec = importlib.util.spec_from_file_location("replay_study", ROOT / "benchmarks" / "replay.py")
    module = importlib.util.module_from_spec(spec)
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    patch.undo()


def cell(seed, share, arrival, *, new, old):
    return {
        "seed": seed, "share": share, "arrival": arrival, "new_bits_per_byte_before": 3.0 + seed,
        "old_bits_per_byte_before": 4.0, "new_bits_per_byte_after": 3.0 + seed - new,
        "old_bits_per_byte_after": 4.0 + old,
    }  # fmt: skip


def test_gain_and_rise_are_against_the_start_of_the_same_seed(replay):
    plan = replay.Plan(shares=(0.0, 0.5), seeds=(0, 1), tokens=1, learning_rate=0.1, batch_tokens=64)
    rows = [cell(seed, 0.0, 1, new=0.1, old=0.2) for seed in (0, 1)]
    rows += [cell(0, 0.0, 2, new=0.3, old=0.5), cell(1, 0.0, 2, new=0.5, old=0.7), cell(0, 0.5, 1, new=0.1, old=0.0)]
    points = replay.summary(plan, rows)
    # A share that only some seeds have reached is not shown yet.
    assert [(point["share"], point["arrival"]) for point in points] == [(0.0, 1), (0.0, 2)]
    assert points[1]["new_gain"] == pytest.approx(0.4)
    assert points[1]["old_rise"] == pytest.approx(0.6)
    assert points[1]["new_gain_half_width"] == pytest.approx(12.706 * 0.1)
    assert replay.half_width([0.3]) is None
    # Both seeds lose as much less with replay: the difference is certain, however far apart they began.
    rows += [cell(1, 0.5, 1, new=0.1, old=0.0)]
    replayed = replay.summary(plan, rows)[2]
    assert (replayed["share"], replayed["old_rise_against_none"]) == (0.5, pytest.approx(-0.2))
    assert replayed["old_rise_against_none_half_width"] == pytest.approx(0)
    assert replayed["new_gain_against_none"] == pytest.approx(0)


def test_the_picture_has_every_point_and_its_figures(replay):
    points = [
        {"share": share, "arrival": arrival, "new_gain": 0.1 * arrival, "old_rise": 0.2 * arrival * (1 - share),
         "new_gain_against_none_half_width": 0.01, "old_rise_half_width": None}
        for share in (0.0, 0.25)
        for arrival in (1, 2, 3)
    ]  # fmt: skip
    picture = ElementTree.fromstring(replay.draw(points, "Replay & forgetting"))
    dots = picture.findall("{*}circle")
    assert len(dots) == 6
    assert dots[-1].find("{*}title").text == "share 0.25, arrival 3: old +0.4500, new +0.3000"
    assert len(picture.findall("{*}polyline")) == 2
    # More gain is higher up, less forgetting further left.
    assert float(dots[2].get("cy")) < float(dots[0].get("cy"))
    assert float(dots[5].get("cx")) < float(dots[2].get("cx"))
