"""What the parts of a spec ask of each other.

Enters: a spec whose parts are each valid. Leaves: every combination that could not run, with its remedy.
Refuses: nothing itself; the spec does.
"""

from __future__ import annotations

from fmops.lifecycle import FAMILIES, Lifecycle


def impossible(spec: Lifecycle) -> list[str]:
    """Combinations that could not run, each with its remedy."""
    corpora = spec.data.corpora
    train = [name for name, corpus in corpora.items() if corpus.role == "train"]
    replay = [name for name, corpus in corpora.items() if corpus.role == "replay"]
    suites = set(spec.evaluate.suites) if spec.evaluate else set()
    problems = []
    if spec.pretrain and not train:
        problems.append("pretrain needs a corpus with role train. Add one under data.corpora, or leave pretrain out")
    if spec.pretrain and spec.pretrain.old_domain_ceiling and not replay:
        problems.append(
            "pretrain.old_domain_ceiling needs a corpus with role replay: it is the old domain. Add one, or drop it"
        )
    if spec.pretrain and spec.pretrain.warmup + spec.pretrain.decay > 1:
        problems.append(
            f"pretrain.warmup {spec.pretrain.warmup} and decay {spec.pretrain.decay} exceed the whole run. "
            "Their sum may be at most 1"
        )
    if spec.pretrain and spec.pretrain.metric == "old_bits_per_byte" and not replay:
        problems.append("pretrain.metric old_bits_per_byte needs a corpus with role replay. Add one, or drop it")
    for name, training in (("pretrain", spec.pretrain), ("instruct", spec.instruct)):
        if training and training.patience and training.keep != "best":
            problems.append(f"{name}.patience waits for better weights: add `keep: best`, or drop it")
    if spec.instruct and not spec.data.conversations:
        problems.append("instruct needs data.conversations. Name a source, or leave instruct out")
    if spec.align and not spec.data.preferences:
        problems.append("align needs data.preferences. Name a source, or leave align out")
    if spec.gate and not spec.evaluate:
        problems.append("gate needs evaluate: without scores nothing can be promoted. Add evaluate, or drop gate")
    if "domain" in suites and not train:
        problems.append("the suite domain is made from held-out documents. Add a corpus with role train, or drop it")
    if "forgetting" in suites and not replay:
        problems.append("the suite forgetting is made from held-out old documents. Add a corpus with role replay")
    unmeasured = [name for name in (spec.gate.primary if spec.gate else ()) if name not in suites]
    # A suite file of the user's own may measure any family; it is read later.
    if unmeasured and spec.evaluate and all(name in FAMILIES for name in suites):
        problems.append(
            f"gate.primary asks for {', '.join(unmeasured)}, which no suite measures. "
            f"Add the suite, or name one of {', '.join(sorted(suites))}; [] asks for no regression only"
        )
    if sum(corpus.weight or 0 for corpus in corpora.values()) > 1:
        problems.append("the weights under data.corpora sum to more than 1. Each is a share of the training tokens")
    if corpora and all(corpus.weight for corpus in corpora.values()):
        total = sum(corpus.weight or 0 for corpus in corpora.values())
        if abs(total - 1) > 1e-6:
            problems.append(f"every corpus has a weight, and they sum to {total:g}. Make them sum to 1, or omit one")
    return problems
