"""The report page: it says what happened, it shows what was measured, and nothing in it can run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from example_run import HOSTILE, write_example

from fmops.orchestration.charts import line_chart, margin_interval, thin, ticks
from fmops.orchestration.history import read_history
from fmops.orchestration.report import write_report
from fmops.orchestration.report_parts import duration, interval


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.loads += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page_of(tmp_path, **how) -> Page:
    store, folder = write_example(tmp_path, **how)
    return Page(write_report(store, folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("ends", "verdict", "sentence"),
    [
        ("promote", "Promoted", "is released; 11 of 14 stages were run, the others kept."),
        ("reject", "Rejected", "Nothing is released: forgetting: worse by 0.090"),
        ("failed", "Failed at pretrain", "loss is not finite at step 5. Lower learning_rate."),
        ("killed", "Cut off in pretrain", "`fmops run` goes on from where it was."),
        ("cached", "Promoted", "1 of 14 stages were run, the others kept."),
        ("empty", "Nothing has run", "This run ended before its first stage"),
    ],
)
def test_the_headline_says_how_the_run_ended(tmp_path, ends, verdict, sentence):
    page = page_of(tmp_path, ends=ends)
    assert verdict in page.text
    assert sentence in page.text
    assert not page.open


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path):
    store, folder = write_example(tmp_path)
    text = write_report(store, folder).read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") >= 3, "samples, model card and dropped documents all hold the hostile text"
    assert "script" not in Page(text).tags


def test_the_page_fetches_nothing_and_forbids_scripts(tmp_path):
    store, folder = write_example(tmp_path)
    text = write_report(store, folder).read_text(encoding="utf-8")
    assert all(target.startswith("#") for target in Page(text).loads)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)
    assert len(text.encode()) < 1_000_000


def test_every_box_of_the_picture_leads_to_its_stage(tmp_path):
    store, folder = write_example(tmp_path)
    text = write_report(store, folder).read_text(encoding="utf-8")
    targets = {target.removeprefix("#") for target in Page(text).loads}
    assert {f"stage-{name}" for name in read_history(store, folder).nodes} <= targets
    assert targets <= set(re.findall(r'id="([^"]+)"', text))


def test_numbers_stand_with_their_intervals(tmp_path):
    page = page_of(tmp_path)
    assert "0.912 → 0.808 bits per byte (−0.104)" in page.text
    assert "0.262 (0.215–0.315)" in page.text
    assert "+0.081 to +0.121" in page.text
    assert "358 documents read: 312 kept for training, 8 held out of the new domain and 27 of the old, 11" in page.text
    assert "email 4, ip-address 1" in page.text


def test_a_failed_stage_shows_the_curve_it_reported(tmp_path):
    page = page_of(tmp_path, ends="failed")
    assert "Pretrain, training loss" in page.text
    assert "not reached" in page.text
    assert "Before and after" not in page.text


def test_equal_runs_give_equal_pages(tmp_path):
    store, folder = write_example(tmp_path)
    first = write_report(store, folder).read_bytes()
    assert write_report(store, folder).read_bytes() == first


def test_a_stage_that_the_spec_leaves_out_is_not_drawn(tmp_path):
    page = page_of(tmp_path, spec={"align": None, "gate": None})
    assert "#stage-instruct" in page.loads
    assert "#stage-align" not in page.loads
    assert "without a gate" in page.text


def test_answers_of_any_length_keep_the_page_small(tmp_path):
    store, folder = write_example(tmp_path)
    for record in store.records():
        if record.stage == "evaluate":
            rows = [{"prompt": f"p{n}", "response": "long " * 40_000} for n in range(30)]
            path = store.folder(record.stage, record.fingerprint) / "generations.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(write_report(store, folder).read_bytes()) < 1_000_000


def test_empty_lines_of_a_rambling_model_do_not_fill_the_page(tmp_path):
    store, folder = write_example(tmp_path)
    for name, response in (("evaluate-base", "\n" * 500), ("evaluate-candidate", "First.\n\n\n \n\nSecond.\n\n")):
        record = store.by_key(name)
        path = store.folder(record.stage, record.fingerprint) / "generations.jsonl"
        path.write_text(json.dumps({"prompt": "Explain.", "response": response}) + "\n")
    page = write_report(store, folder).read_text(encoding="utf-8")
    assert "(500 characters of white space)" in page
    assert "First.\n\nSecond.</p>" in page


def test_a_cut_off_event_is_left_out_and_the_rest_is_told(tmp_path):
    store, folder = write_example(tmp_path)
    with (folder / "events.jsonl").open("a") as events:
        events.write('{"time": 1, "node": "rel')
    assert read_history(store, folder).nodes["release"].state == "done"


def test_cached_nodes_are_known_by_what_was_made_from_them(tmp_path):
    store, folder = write_example(tmp_path)
    events = folder / "events.jsonl"
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    for row in rows:
        if row["event"] == "planned":
            row.pop("fingerprint")
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(store, folder)
    assert history.nodes["base"].record == store.by_key("base")
    assert history.nodes["benchmarks"].state == "cached"


def test_a_curve_without_a_finite_point_is_refused():
    with pytest.raises(ValueError, match="a curve needs a finite point"):
        line_chart([(0.0, math.nan)], css="base", x_label="tokens", y_label="loss")


def test_a_value_that_is_not_finite_is_counted_in_the_caption(tmp_path):
    store, folder = write_example(tmp_path)
    record = store.by_key("instruct")
    curve = store.folder(record.stage, record.fingerprint) / "curve.jsonl"
    curve.write_text(curve.read_text() + '{"step": 99, "tokens": 99000, "loss": NaN}\n')
    page = Page(write_report(store, folder).read_text(encoding="utf-8"))
    assert "1 values were not finite" in page.text


def test_a_score_of_a_suite_is_drawn_like_any_column(tmp_path):
    store, folder = write_example(tmp_path)
    record = store.by_key("instruct")
    curve = store.folder(record.stage, record.fingerprint) / "curve.jsonl"
    rows = [{**json.loads(line), "grammar": 0.5 + 0.02 * n} for n, line in enumerate(curve.read_text().splitlines())]
    curve.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(store, folder).read_text(encoding="utf-8"))
    assert "Instruct, grammar" in page.text
    assert "0.500 → 0.720 score (+0.220)" in page.text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.8123, 0.8129), (5.0, 5.0), (-3.0, 12_000.0), (0.0, 0.0)])
def test_ticks_are_few_round_and_hold_the_data(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(float(step), 1.0) for step in range(100_001)]
    thinned = thin(points)
    assert len(thinned) <= 400
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]


def test_an_interval_beyond_the_picture_has_an_arrow():
    assert "arrow" in margin_interval(0.2, 0.3, 0.4, margin=0.02, css="good")
    assert "arrow" not in margin_interval(-0.01, 0.0, 0.01, margin=0.02, css="good")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7512, "2 h 05 min")]
)
def test_durations_read_like_a_clock(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "error", "n", "told"),
    [(0.0, 0.0, 12, (0.0, 0.243)), (1.0, 0.0, 12, (0.757, 1.0)), (0.5, 0.1, 100, (0.318, 0.682))],
)
def test_the_interval_of_a_share_stays_a_share_and_is_no_point(value, error, n, told):
    item = {"name": "acc", "value": value, "standard_error": error, "n": n}
    assert interval(item) == pytest.approx(told, abs=5e-3)
