"""Release: a judged checkpoint becomes something that may be served.

Enters: a checkpoint, the gate's decision, and the artifacts it was made from and measured with. Leaves: a `Release`.
Refuses: a verdict other than promote, weights that are not finite, pickles, code, links, and parity that fails.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fmops.artifacts import Artifact, Checkpoint, GateDecision, Parity, Release
from fmops.deployment.card import Evidence, data_list, facts, model_card
from fmops.deployment.model_files import admit_model, bring
from fmops.deployment.parity import Probe, check_parity
from fmops.deployment.serving.engine import choose_engine
from fmops.deployment.verify import PARITY
from fmops.errors import EXIT_FAILED, FmopsError, GateRejected, NeedMoreData
from fmops.faults import fault_site
from fmops.integrity import sha256
from fmops.jobs import ReleaseJob
from fmops.stage import StageContext

UNGATED = "ungated"
"""Verdict of a release whose spec has no gate, or whose model is the base itself."""


class ParityFailed(FmopsError):
    """Trainer and server disagree on what the model says."""

    exit_code = EXIT_FAILED


def release(
    config: ReleaseJob,
    *,
    checkpoint: Checkpoint,
    gate: GateDecision | None = None,
    out: Path,
    context: StageContext,
    **evidence: Artifact | None,
) -> Release:
    """Copy the model, prove that the server answers as the trainer does, and write down what it is.

    `evidence` are the artifacts that the card is written from, by the names of `Evidence`'s fields; each may be
    missing, and the card then says so.

    Raises:
        GateRejected, NeedMoreData: the gate did not say promote.
        ParityFailed: trainer and server disagree; the message lists the probes.
        FmopsError: the checkpoint holds something that must not be served.
    """
    verdict = _judge(gate)
    known = Evidence.of(checkpoint=checkpoint, gate=gate, **evidence).model_copy(
        update={"base_uri": config.base, "origins": config.data}
    )
    _clear(out)
    kept, left = admit_model(checkpoint.model)
    if left:
        context.note(f"left behind, not needed to serve: {', '.join(left)}")
    for done, path in enumerate(kept, start=1):
        bring(path, out / "model" / path.name)
        context.progress(done, len(kept) + 1, unit="files")
    fault_site("release-after-copy")
    engine = choose_engine(config.engine, out / "model", parameters=checkpoint.parameters)
    parity, probes = check_parity(checkpoint.model, out / "model", engine=engine, threads=context.threads)
    _write_parity(out, parity, probes)
    context.progress(len(kept) + 1, len(kept) + 1, unit="files")
    if not parity.passed:
        raise ParityFailed(
            f"trainer and server ({parity.engine}) disagree, so {config.name} is not released: "
            f"{'; '.join(parity.reasons)}. Compare the tokenizer, template and weights in {checkpoint.model.name} "
            "with what was trained."
        )
    context.note(
        f"parity on {parity.prompts} prompts: token ids, template and greedy tokens equal, log-probabilities within "
        f"{parity.max_logprob_difference:g} (tolerance {parity.tolerance:g})"
    )
    stated = facts(config.name, known, parity)
    _write(out / "data.json", json.dumps(data_list(known), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    _write(out / "MODEL_CARD.md", model_card(config.name, known, parity))
    return Release(path=out, name=config.name, parity=parity, licence=known.licence, verdict=verdict, facts=stated)


def _judge(gate: GateDecision | None) -> str:
    """Only a promotion goes on; a spec without a gate has decided to do without."""
    if gate is None:
        return UNGATED
    reasons = "; ".join(gate.reasons) or "no reason given"
    if gate.verdict == "reject":
        raise GateRejected(f"the gate rejected this model: {reasons}. Nothing is released; what was champion stays.")
    if gate.verdict == "need more data":
        raise NeedMoreData(
            f"the gate needs more data: {reasons}. Nothing is released. Raise evaluate.limit, or widen a margin."
        )
    return gate.verdict


def _clear(out: Path) -> None:
    """Releasing takes seconds: what a killed attempt left is made again."""
    for name in ("model", PARITY, "data.json", "MODEL_CARD.md"):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_parity(out: Path, parity: Parity, probes: tuple[Probe, ...]) -> None:
    """Bind the finding to the files it was found on."""
    report: dict[str, Any] = {
        "parity": parity.model_dump(mode="json"),
        "files": {f"model/{path.name}": sha256(path) for path in sorted((out / "model").iterdir())},
        "probes": [probe.model_dump(mode="json") for probe in probes],
    }
    _write(out / PARITY, json.dumps(report, indent=1, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
