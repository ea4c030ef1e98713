"""What the parts of a spec ask of each other.

Enters: a spec whose parts are each valid. Leaves: every combination that could not run, with its key and the remedy.
Refuses: nothing itself; the spec does.
"""

from __future__ import annotations

from collections.abc import Iterator

from fmops.errors import SpecMistake
from fmops.lifecycle import FAMILIES, Lifecycle


def impossible(spec: Lifecycle) -> list[SpecMistake]:
    """Combinations that could not run, each with its remedy."""
    found = [*_training(spec), *_outside(spec), *_judging(spec), *_weights(spec)]
    return [SpecMistake(at, text) for at, text in found]


Problem = tuple[tuple[str, ...], str]


def _training(spec: Lifecycle) -> Iterator[Problem]:
    roles = {corpus.role for corpus in spec.data.corpora.values()}
    pretrain = spec.pretrain
    if pretrain and "train" not in roles:
        yield (
            ("pretrain",),
            "pretrain needs a corpus with role train. Add one under data.corpora, or leave pretrain out.",
        )
    if pretrain and pretrain.old_domain_ceiling and "replay" not in roles:
        text = "needs a corpus with role replay: it is the old domain. Add one, or drop it."
        yield ("pretrain", "old_domain_ceiling"), f"pretrain.old_domain_ceiling {text}"
    if pretrain and pretrain.warmup + pretrain.decay > 1:
        text = f"pretrain.warmup {pretrain.warmup} and decay {pretrain.decay} exceed the whole run."
        yield ("pretrain", "warmup"), f"{text} Their sum may be at most 1."
    if pretrain and pretrain.metric == "old_bits_per_byte" and "replay" not in roles:
        text = "pretrain.metric old_bits_per_byte needs a corpus with role replay. Add one, or drop it."
        yield ("pretrain", "metric"), text
    for name, training in (("pretrain", pretrain), ("instruct", spec.instruct), ("align", spec.align)):
        if training and training.patience and training.keep != "best":
            yield (name, "patience"), f"{name}.patience waits for better weights: add `keep: best`, or drop it."
    if spec.instruct and not spec.data.conversations:
        yield ("instruct",), "instruct needs data.conversations. Name a source, or leave instruct out."
    if spec.instruct and spec.instruct.documents and not roles:
        text = "instruct.documents takes its documents from data.corpora. Add a corpus, or leave it out."
        yield ("instruct", "documents"), text
    if spec.align and not spec.data.preferences:
        yield ("align",), "align needs data.preferences. Name a source, or leave align out."


def _outside(spec: Lifecycle) -> Iterator[Problem]:
    """Settings that need a hand on each step, which frameworks with a loop of their own do not give."""
    pretrain, instruct = spec.pretrain, spec.instruct
    if pretrain and pretrain.framework == "torchtitan":
        asked = {
            ("pretrain", "tuning"): pretrain.tuning == "lora" and "tuning lora",
            ("pretrain", "keep"): pretrain.keep == "best" and "keep best",
            ("pretrain", "suites"): pretrain.suites and "suites",
            ("pretrain", "on_ceiling"): pretrain.on_ceiling == "adjust" and "on_ceiling adjust",
            ("runtime", "launcher"): spec.runtime.launcher == "ray" and "runtime.launcher ray",
        }
        for at, name in asked.items():
            if name:
                yield at, f"pretrain.framework torchtitan has no {name}. Drop it, or set framework to transformers."
    if instruct and instruct.framework == "llama-factory":
        for key, name in (("keep", instruct.keep == "best" and "keep best"), ("suites", instruct.suites and "suites")):
            if name:
                text = f"instruct.framework llama-factory has no {name}. Drop it, or set framework to trl."
                yield ("instruct", key), text


def _judging(spec: Lifecycle) -> Iterator[Problem]:
    roles = {corpus.role for corpus in spec.data.corpora.values()}
    suites = set(spec.evaluate.suites) if spec.evaluate else set()
    at = ("evaluate", "suites")
    if spec.gate and not spec.evaluate:
        yield ("gate",), "gate needs evaluate: without scores nothing can be promoted. Add evaluate, or drop gate."
    if "domain" in suites and "train" not in roles:
        yield at, "the suite domain is made from held-out documents. Add a corpus with role train, or drop it."
    if "forgetting" in suites and "replay" not in roles:
        yield at, "the suite forgetting is made from held-out old documents. Add a corpus with role replay, or drop it."
    unmeasured = [name for name in (spec.gate.primary if spec.gate else ()) if name not in suites]
    # A suite file of the user's own may measure any family; it is read later.
    if unmeasured and spec.evaluate and all(name in FAMILIES for name in suites):
        text = f"gate.primary asks for {', '.join(unmeasured)}, which no suite measures. Add the suite, or name one of"
        yield ("gate", "primary"), f"{text} {', '.join(sorted(suites))}; [] asks for no regression only."


def _weights(spec: Lifecycle) -> Iterator[Problem]:
    given = [corpus.weight for corpus in spec.data.corpora.values()]
    total = sum(weight or 0 for weight in given)
    if total > 1:
        text = "the weights under data.corpora sum to more than 1. Each is a share of the training tokens."
        yield ("data", "corpora"), text
    if given and all(given) and abs(total - 1) > 1e-6:
        text = f"every corpus has a weight, and they sum to {total:g}. Make them sum to 1, or omit one."
        yield ("data", "corpora"), text
