"""Continued pretraining, held to a contract about what may be forgotten.

Enters: a checkpoint, a curated corpus. Leaves: a checkpoint, with its losses on the new and the old domain.
Refuses: to keep weights whose loss on the old domain rose above the ceiling; a corpus without training blocks.
"""

from __future__ import annotations

import json
from pathlib import Path

from fmops.artifacts import Benchmarks, Checkpoint, Corpus
from fmops.curve import Row, best_note, kept_row, summary
from fmops.errors import FmopsError
from fmops.lifecycle import Pretrain
from fmops.stage import StageContext


def pretrain(
    config: Pretrain, *, checkpoint: Checkpoint, corpus: Corpus, out: Path, context: StageContext,
    benchmarks: Benchmarks | None = None,
) -> Checkpoint:  # fmt: skip
    """Train `checkpoint` on `corpus` for `config.tokens` tokens; killed, and called again, it goes on where it was.

    Args:
        benchmarks: bring the items that `config.suites` asks for.

    Raises:
        FmopsError: the corpus has no blocks, or a ceiling is set and the corpus has no old domain.
        StageFailed: a loss is not finite, or a resume state cannot be written.
    """
    if not corpus.train_shards:
        raise FmopsError(
            f"{corpus.path} has no training shards. Curate it again, from documents that pass the filters."
        )
    ceiling = config.old_domain_ceiling
    if ceiling is not None and not corpus.held_out_old:
        raise FmopsError(
            f"pretrain.old_domain_ceiling is {ceiling:g}, but the corpus holds out no document of an old domain. "
            "Add documents to a corpus with role replay, or drop the ceiling."
        )
    held_out = {"new_bits_per_byte": corpus.held_out_new, "old_bits_per_byte": corpus.held_out_old}
    if config.keep == "best" and not held_out.get(config.metric, 1):
        raise FmopsError(
            f"pretrain.keep is best by {config.metric}, but the corpus holds out no document of that domain. "
            "Add documents, or set keep to last."
        )
    keep = None if ceiling is None else lambda start, row: within_ceiling(start, row, ceiling=ceiling)
    if config.framework == "torchtitan":
        from fmops.adapters import titan_pretrain

        result = titan_pretrain.train(
            config, source=checkpoint.model, corpus=corpus, out=out, keep=keep, context=context
        )
    else:
        from fmops.adapters import transformers_pretrain

        result = transformers_pretrain.train(
            config, source=checkpoint.model, corpus=corpus, out=out, keep=keep, context=context, benchmarks=benchmarks
        )
    last = kept_row(result.curve, result.kept_step)
    start, end = result.curve[0], result.curve[-1]
    at_ceiling = result.stopped and ceiling is not None and not within_ceiling(start, end, ceiling=ceiling)
    if at_ceiling:
        context.note(_stopped_note(start, end, kept=last, ceiling=ceiling or 0.0))
    elif last is not end:
        context.note(best_note(result.curve, kept=last, metric=config.metric, stopped=result.stopped))
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in result.curve))
    return Checkpoint(
        path=out,
        stage="pretrain",
        parameters=result.parameters,
        trained_tokens=result.trained_tokens,
        metrics={
            **summary(result.curve, last=last),
            **({} if ceiling is None else {"stopped_at_ceiling": float(at_ceiling)}),
            **(
                {"rate_halved": sum(row.get("rate_halved", 0.0) for row in result.curve)}
                if config.on_ceiling == "adjust"
                else {}
            ),
        },
        licence=checkpoint.licence,
    )


def within_ceiling(start: Row, row: Row, *, ceiling: float) -> bool:
    """Weights may be kept while the old domain's loss is at most `ceiling` bits per byte above where it began."""
    return row["old_bits_per_byte"] - start["old_bits_per_byte"] <= ceiling


def _stopped_note(start: Row, stop: Row, *, kept: Row, ceiling: float) -> str:
    rise = stop["old_bits_per_byte"] - start["old_bits_per_byte"]
    kept_as = (
        f"the weights of step {kept['step']:g} are kept" if kept["step"] else "the weights are those it began with"
    )
    return (
        f"stopped at step {stop['step']:g}: the old domain's loss rose by {rise:.4f} bits per byte, above the ceiling "
        f"of {ceiling:g}; {kept_as}. Give replay more weight, or lower the learning rate."
    )
