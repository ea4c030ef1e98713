"""The page of a comparison: families, tasks, weak slices, rounds, and every item that moved, to be searched.

Enters: a comparison. Leaves: one file that works from disk and fetches nothing.
Refuses: any script but its own few lines; models write parts of the page.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmops.evaluation.compare import fairly
from fmops.orchestration.charts import signed
from fmops.orchestration.compare import Compared, told_preference
from fmops.orchestration.report_parts import gate_rows
from fmops.store import Record, write_atomically

MOVED_SHOWN = 1000
CHARACTERS_SHOWN = 1500
SCRIPT = """
const rows = [...document.querySelectorAll("#moved tbody tr")];
const texts = rows.map(row => row.textContent.toLowerCase());
const search = document.getElementById("search");
const count = document.getElementById("count");
const filter = () => {
  const wanted = search.value.toLowerCase();
  rows.forEach((row, place) => { row.hidden = !texts[place].includes(wanted); });
  count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
};
search.addEventListener("input", filter);
search.value = decodeURIComponent(location.hash.slice(1));
filter();
"""
"""Filters the table; what stands after # in the address is searched at once, so that a search can be passed on."""
TONES = {"promote": "good", "reject": "bad", "need more data": "open"}


def write_page(compared: Compared, path: Path, *, name: str, alpha: float) -> Path:
    """Write the page; equal comparisons give equal pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["signed"] = signed
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = environment.get_template("comparison.html.j2").render(
        **_view(compared), name=name, alpha=alpha, script=Markup(SCRIPT), script_digest=Markup(f"sha256-{digest}")
    )
    write_atomically(path, page)
    return path


def _view(compared: Compared) -> dict[str, Any]:
    found, gate = compared.comparison, compared.gate.artifact if compared.gate else {}
    moved = found.moved if found else ()
    families = [family.model_dump() for family in compared.decision.families]
    guards = [each.model_dump() for each in compared.decision.guards]
    return {
        "before": compared.before.key,
        "after": compared.after.key,
        "verdict": compared.decision.verdict.capitalize(),
        "tone": TONES[compared.decision.verdict],
        "reasons": compared.decision.reasons,
        "families": gate_rows({"families": families, "guards": guards}),
        "tasks": found.tasks if found else (),
        "slices": found.slices if found else (),
        "judged": told_preference(compared.judged) if compared.judged else (),
        "rounds": history(compared.gates),
        "measured": list(dict.fromkeys(
            row["family"] for each in compared.gates for row in gate_rows(each.artifact)
        )),
        "wealth": gate.get("wealth") or 0.0,
        "left": min(1.0, (gate.get("wealth") or 0.0) / gate.get("alpha", 1.0)),
        "moved_total": len(moved),
        "better": sum(each.difference > 0 for each in moved),
        "moved": [
            {
                "task": each.task, "sample": each.sample, "difference": each.difference, "prompt": _cut(each.prompt),
                "before": _cut(each.before), "after": _cut(each.after),
            }
            for each in fairly(moved, MOVED_SHOWN)
        ],
    }  # fmt: skip


def history(gates: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a round that the newest decision counts: verdict, level, p-value, and each family's difference."""
    # Refused evidence is no round: such a decision ends with the round before it.
    tested = [each for each in gates if each.artifact.get("p_value") is not None]
    decided = {(len(rounds), rounds[-1]["candidate"]): each for each in tested if (rounds := each.artifact["rounds"])}
    rows = []
    for place, judged in enumerate(gates[-1].artifact["rounds"] if gates else (), start=1):
        record = decided.get((place, judged["candidate"]))
        verdict = record.artifact["verdict"] if record else "promote" if judged["promoted"] else "not promoted"
        families = {row["family"]: row for row in gate_rows(record.artifact)} if record else {}
        rows.append({
            **judged, "verdict": verdict, "tone": TONES.get(verdict, "open"), "families": families,
            "challenger": record.inputs["challenger"].ref if record and "challenger" in record.inputs else "",
        })  # fmt: skip
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " … (cut here)"
