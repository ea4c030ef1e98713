"""`fmops evaluate` and `fmops compare` on a finished lifecycle: any model, measured alike, judged with an exit code."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil

import pytest

from .conftest import fmops
from .test_lifecycle import newest, store_of

pytestmark = pytest.mark.xdist_group("lifecycle")
CODES = {"promote": 0, "reject": 3, "need more data": 4}


def test_two_stages_are_judged_and_the_verdict_is_the_exit_code(finished):
    spec, _ = finished
    done = fmops("compare", "evaluate-base", "evaluate-candidate", spec=spec)
    verdict = done.stdout.splitlines()[0].rpartition(": ")[2]
    assert done.returncode == CODES[verdict], done.stderr
    assert "95 % interval" in done.stdout
    assert re.search(r"moved: \d+ items, \d+ better, \d+ worse", done.stdout)
    assert "error budget: 1 rounds tested, 1 promoted; α 0.05, 0.0391 left" in done.stdout
    # Comparing spends nothing: the next candidate finds the same budget.
    assert len(newest(spec, "gate").artifact["rounds"]) == 1


def test_the_page_runs_one_script_of_ours_and_holds_what_moved(finished, tmp_path):
    spec, _ = finished
    page = tmp_path / "page.html"
    fmops("compare", "evaluate-base", "evaluate-candidate", "--page", str(page), spec=spec)
    text = page.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "held-out-new" in text
    assert "Rounds" in text


def test_the_reverse_of_a_gain_is_no_promotion(finished):
    spec, _ = finished
    done = fmops("compare", "evaluate-candidate", "evaluate-base", spec=spec)
    assert done.returncode == 3
    assert "ruled out" in done.stdout or "regressed" in done.stdout


def test_an_unknown_name_is_a_usage_error(finished):
    spec, _ = finished
    done = fmops("compare", "evaluate-base", "evaluate-nothing", spec=spec)
    assert done.returncode == 2
    assert "no artifact 'evaluate-nothing'" in done.stderr
    done = fmops("compare", "evaluate-base", "corpus", spec=spec)
    assert done.returncode == 2
    assert "has no evaluation" in done.stderr


def test_any_model_is_measured_like_the_spec_s_own(copied):
    shutil.copytree(copied.parent / "base", copied.parent / "other")
    done = fmops("evaluate", "other", spec=copied)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^domain +held-out-new +bits_per_byte +\d\.\d{4} +± \d\.\d{4} +\d+ +lower$", done.stdout, re.MULTILINE
    )
    key = done.stdout.splitlines()[-1].partition(":")[0]
    # The same weights: equal content, so the base's own measurement is the answer, or equal to it.
    report = store_of(copied).by_key(key).artifact
    assert report["fingerprint"] == newest(copied, "evaluate-base").artifact["fingerprint"]
    assert report["metrics"] == newest(copied, "evaluate-base").artifact["metrics"]
    again = fmops("evaluate", "other", spec=copied)
    assert "done" not in again.stdout.replace("\n", " ")
    judged = fmops("compare", "evaluate-base", key, spec=copied)
    assert judged.returncode == 3, judged.stdout  # an equal model brings no gain


def test_no_model_of_that_name_says_what_there_is(finished):
    spec, _ = finished
    done = fmops("evaluate", "basse", spec=spec)
    assert done.returncode == 2
    assert "no model 'basse': no such folder" in done.stderr
    assert "champion" in done.stderr
