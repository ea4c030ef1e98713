"""Training against TRL, PEFT, Transformers' Trainer and LLaMA-Factory as their users get them.

Enters: shapes, threads, pairs of runs. Leaves: one table, and benchmarks/results/training-DATE.json.
Refuses: to compare unequal work: every arm of a ratio reads the same samples in the same number of steps.

Every arm runs in a fork of its own, in turn (A B A B …), so that its peak memory is its own and noise falls on all
alike. Figures are CPU seconds of making the trainer and training; the reference pass of DPO is in them, reading the
model is not. Peers keep their defaults but for gradient checkpointing, which is off for every arm, and the precision,
which is one for all: float32 or, on processors that multiply in it, bfloat16. Arms named `shipped` keep both; ratios
named `chosen` set ours as shipped, whose precision is measured on the machine, beside peers in float32.
LLaMA-Factory wants other versions of our libraries: LLAMAFACTORY_PYTHON names an interpreter that has it, without
which its arm is absent; its figure does contain the reading.

    python -m benchmarks.training --quick
    python -m benchmarks.training --model PATH/TO/SmolLM2-135M-Instruct --pairs 5
    python -m benchmarks.training --profile sft

A second run on the same day adds its rounds to those of the first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.llamafactory_arm import ARM, PEER_PYTHON, measure
from benchmarks.training_arms import ARMS, run_arm, set_up, sft_work
from fmops.environment import processor

RATIOS = {
    "sft_vs_trl_padded": ("sft", "sft_trl_padded"),
    "sft_vs_trl_packed": ("sft", "sft_trl_packed"),
    "sft_vs_trl_shipped": ("sft_shipped", "sft_trl_shipped"),
    "sft_vs_llamafactory": ("sft", "sft_llamafactory"),
    "dpo_vs_trl": ("dpo", "dpo_trl"),
    "dpo_vs_trl_shipped": ("dpo_shipped", "dpo_trl_shipped"),
    "cpt_vs_trainer": ("cpt", "cpt_trainer"),
    "cpt_vs_trainer_leaking": ("cpt", "cpt_trainer_leaking"),
    "sft_chosen_vs_trl_padded": ("sft_shipped", "sft_trl_padded"),
    "sft_chosen_vs_trl_packed": ("sft_shipped", "sft_trl_packed"),
    "dpo_chosen_vs_trl": ("dpo_shipped", "dpo_trl"),
    "cpt_chosen_vs_trainer": ("cpt_shipped", "cpt_trainer"),
    "lora_vs_full": ("sft_lora", "sft"),
    "lora_vs_peft": ("sft_lora", "sft_lora_peft"),
    "bfloat16_vs_float32": ("sft_bfloat16", "sft"),
}
"""Name → (ours, peer); the ratio is the peer's CPU seconds over ours."""
OF_FLOAT32 = {name for name, (ours, peer) in RATIOS.items() if ours.endswith(("_shipped", "_bfloat16")) or peer == ARM}
"""Ratios whose arms take no precision from the command line."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder to measure beside the small shape")
    parser.add_argument("--only-model", action="store_true", help="leave the small shape out")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of every arm")
    parser.add_argument("--ratios", nargs="+", choices=RATIOS, help="all of the precision by default")
    parser.add_argument("--quick", action="store_true", help="small shape, one thread, one pair, two steps")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--profile", choices=ARMS, help="where one arm's time goes, instead of the table")
    given = parser.parse_args()
    if given.profile:
        print(_profile(given.profile, given.model, steps=given.steps, threads=given.threads[0]))
        return
    if given.quick:
        given.pairs, given.threads, given.steps = 1, [1], 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    # Imported before any fork, and before any clock starts.
    from fmops.adapters import transformers_pretrain, trl_dpo, trl_sft  # noqa: F401

    shapes = [given.model] if given.only_model else [None, *([given.model] if given.model else [])]
    target = given.results / f"training-{date.today()}.json"
    given.results.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        for threads in given.threads:
            table: dict[str, Any] = {}
            for run in _alternate(given, shape, threads):
                # After every arm: a run that is stopped keeps what it has measured.
                table = _add(target, run, _Table(shape.name if shape else "small", threads, given.precision))
            print(_render(table), flush=True)
    print(target)


class _Table(NamedTuple):
    """What the runs of one table have in common."""

    shape: str
    threads: int
    precision: str


def _add(target: Path, run: dict[str, Any], which: _Table) -> dict[str, Any]:
    """Add one arm's run to the file; returns its table, figured anew over all runs of the day."""
    before = json.loads(target.read_text()) if target.is_file() else {}
    tables = {_Table(*(table[key] for key in _Table._fields)): table for table in before.get("tables", [])}
    runs = tables.get(which, {"runs": []})["runs"] + [run]
    tables[which] = {**which._asdict(), **_figures(runs), "runs": runs}
    found = {"command": "python -m benchmarks.training", "machine": _machine(), "unit": "peer's CPU seconds over ours"}
    found |= {
        "ratios": _least(before.get("earlier", [])) | _least(tables.values()),
        "ratios_are": "the least favourable median over the tables; of ratios that none of them has, over `earlier`",
        "tables": [*tables.values()],
    }
    # What somebody put beside them stays: `earlier` are tables of slower code, `earlier_is` says which.
    target.write_text(json.dumps(before | found, indent=1) + "\n")
    return tables[which]


def _least(tables: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Of each ratio the least favourable median."""
    least: dict[str, float] = {}
    for table in tables:
        for name, ratio in table["ratios"].items():
            least[name] = min(ratio["median"], least.get(name, math.inf))
    return least


def _alternate(given: argparse.Namespace, shape: Path | None, threads: int) -> Iterator[dict[str, Any]]:
    """Every arm once a round, in turn."""
    ratios = given.ratios or [name for name in RATIOS if given.precision == "float32" or name not in OF_FLOAT32]
    arms = list(dict.fromkeys(arm for name in ratios for arm in RATIOS[name]))
    absent = [arm for arm in arms if arm == ARM and PEER_PYTHON not in os.environ]
    for arm in absent:
        print(f"{arm}: absent; {PEER_PYTHON} names no interpreter that has LLaMA-Factory")
    for _ in range(given.pairs):
        pair = time.time()
        for arm in arms:
            if arm in absent:
                continue
            measured = _forked(arm, shape, given=given, threads=threads)
            yield {"arm": arm, "pair": pair, "load": os.getloadavg()[0], **measured}


def _forked(arm: str, model: Path | None, *, given: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One arm in a fork, so that libraries are imported once and its peak memory is its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=lambda: send.send(_one(arm, model, given=given, threads=threads)),
    )
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        raise SystemExit(f"{arm} failed, see above") from None
    process.join()
    return found


def _one(arm: str, model: Path | None, *, given: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One arm, in this process."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = set_up(model, steps=given.steps, work=Path(folder), bf16=given.precision == "bfloat16")
        if arm == ARM:
            job = {"model": str(setting.folder), "samples": setting.samples(), "steps": given.steps}
            measured = measure(job, work=Path(folder), threads=threads) | sft_work(setting) | {"precision": "float32"}
        else:
            measured = run_arm(arm, setting)
    measured["gemm_gflops"] = _gemm_gflops(measured["precision"])
    measured["mfu"] = measured["useful_gflop"] / measured["cpu_s"] / measured["gemm_gflops"]
    return measured


KINDS = {
    "matrix products": ("::mm", "addmm", "bmm", "matmul", "linear"),
    "attention": ("scaled_dot_product",),
    "optimizer, clipping, zeroing gradients": ("adamw", "foreach", "linalg_vector_norm"),
    "loss": ("softmax", "logsumexp", "gather", "nll_loss"),
    "splitting, joining, copying": ("cat", "copy_", "split", "clone", "contiguous", "index", "embedding"),
    "allocating and filling": ("empty", "fill_", "zero", "resize"),
}
"""Kind → parts of operators' names; the first that fits counts."""


def _profile(arm: str, model: Path | None, *, steps: int, threads: int) -> str:
    """Shares of the time inside torch's operators, by kind."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ARMS[arm][0](set_up(model, steps=steps, work=Path(folder)))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            trainer.train()
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        name = event.key.lower()
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "element by element"
        )
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values())
    rows = sorted(spent.items(), key=lambda row: -row[1])
    return "\n".join(f"{kind:40}{share / whole:7.1%}" for kind, share in rows)


def _gemm_gflops(precision: str, *, size: int = 1024) -> float:
    """GFLOP a CPU second of a product in an arm's own precision, best of five: one thread's rate, however many work."""
    import torch

    left, right = (torch.randn(size, size, dtype=getattr(torch, precision)) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.process_time()
        left @ right
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of each arm, and of each ratio over the pairs that have both of its arms."""
    by_arm: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        by_arm[run["arm"]][run["pair"]] = run
    arms = {}
    for arm, pairs in by_arm.items():
        found = [*pairs.values()]
        rates = [run["units"] / run["cpu_s"] for run in found]
        arms[arm] = {
            **{key: statistics.median(run[key] for run in found) for key in ("cpu_s", "wall_s", "peak_gb", "mfu")},
            "per_cpu_s": statistics.median(rates),
            "range": [min(rates), max(rates)],
            **{key: found[0][key] for key in ("units", "unit", "steps", "last_loss")},
            "gemm_gflops": statistics.median(run["gemm_gflops"] for run in found),
            "precision": found[0].get("precision"),
            "n": len(found),
        }
    ratios = {}
    for name, (ours, peer) in RATIOS.items():
        both = [
            by_arm[peer][pair]["cpu_s"] / run["cpu_s"] for pair, run in by_arm[ours].items() if pair in by_arm[peer]
        ]
        if both:
            ratios[name] = {"median": statistics.median(both), "range": [min(both), max(both)], "n": len(both)}
    return {"arms": arms, "ratios": ratios}


def _render(table: dict[str, Any]) -> str:
    lines = [f"\n{table['shape']}, {table['precision']}, {table['threads']} thread(s), load {os.getloadavg()[0]:.1f}"]
    lines.append(
        f"{'arm':22}{'per CPU s (range)':>30}{'unit':>14}{'wall s':>9}{'peak GB':>9}{'MFU':>7}{'last loss':>11}"
    )
    for name, arm in table["arms"].items():
        rate = f"{arm['per_cpu_s']:.4g} ({arm['range'][0]:.4g}–{arm['range'][1]:.4g})"
        loss = "" if math.isnan(arm["last_loss"]) else f"{arm['last_loss']:.4f}"
        lines.append(
            f"{name:22}{rate:>30}{arm['unit']:>14}{arm['wall_s']:9.1f}{arm['peak_gb']:9.2f}{arm['mfu']:7.2f}{loss:>11}"
        )
    for name, ratio in table["ratios"].items():
        low, high = ratio["range"]
        lines.append(f"{name:26}{ratio['median']:6.2f}×  ({low:.2f}–{high:.2f}, n = {ratio['n']})")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    main()
