"""Training against TRL, PEFT and Transformers' Trainer as their users get them.

Enters: shapes, threads, pairs of runs. Leaves: one table, and benchmarks/results/training-DATE.json.
Refuses: to compare unequal work: every arm of a ratio reads the same samples in the same number of steps.

Every arm runs in a process of its own, in turn (A B A B …), so that its peak memory is its own and noise falls on all
alike. Figures are CPU seconds of making the trainer and training, so the reference pass of DPO is in them. Peers keep
their defaults but for bfloat16 and gradient checkpointing, which are off for every arm.

    python -m benchmarks.training --quick
    python -m benchmarks.training --model PATH/TO/SmolLM2-135M-Instruct --pairs 5
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.training_arms import ARMS, run_arm

RATIOS = {
    "sft_vs_trl_padded": ("sft", "sft_trl_padded"),
    "sft_vs_trl_packed": ("sft", "sft_trl_packed"),
    "dpo_vs_trl": ("dpo", "dpo_trl"),
    "cpt_vs_trainer": ("cpt", "cpt_trainer"),
    "cpt_vs_trainer_leaking": ("cpt", "cpt_trainer_leaking"),
    "lora_vs_full": ("sft_lora", "sft"),
    "lora_vs_peft": ("sft_lora", "sft_lora_peft"),
    "bfloat16_vs_float32": ("sft_bfloat16", "sft"),
}
"""Name → (ours, peer); the ratio is the peer's CPU seconds over ours."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder to measure beside the small shape")
    parser.add_argument("--only-model", action="store_true", help="leave the small shape out")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ratios", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--quick", action="store_true", help="small shape, one thread, one pair, two steps")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(_one(given.arm, given.model, steps=given.steps, threads=given.threads[0])))
        return
    if given.quick:
        given.pairs, given.threads, given.steps = 1, [1], 2
    shapes = [given.model] if given.only_model else [None, *([given.model] if given.model else [])]
    target = given.results / f"training-{date.today()}.json"
    given.results.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        for threads in given.threads:
            for runs in _alternate(given, shape, threads):
                table = _table(runs, shape, threads, given.ratios)
                # After every round: a run that is stopped keeps what it has measured.
                _add(target, table)
            print(_render(table), flush=True)
    print(target)


def _add(target: Path, table: dict[str, Any]) -> None:
    """Write the table beside what the file holds; arms and ratios measured again replace the earlier ones."""
    held = json.loads(target.read_text())["tables"] if target.is_file() else []
    known = {(table["shape"], table["threads"]): table for table in held}
    earlier = known.setdefault((table["shape"], table["threads"]), table)
    for part in ("arms", "ratios"):
        earlier[part] |= table[part]
    target.write_text(json.dumps({"machine": _machine(), "tables": list(known.values())}, indent=1) + "\n")


def _alternate(
    given: argparse.Namespace, shape: Path | None, threads: int
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Every arm once a round, in turn; yields all runs so far after each round."""
    arms = list(dict.fromkeys(arm for name in given.ratios for arm in RATIOS[name]))
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for _ in range(given.pairs):
        for arm in arms:
            command = [sys.executable, "-m", "benchmarks.training", "--arm", arm, "--steps", str(given.steps)]
            command += ["--threads", str(threads), *(["--model", str(shape)] if shape else [])]
            ended = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            runs[arm].append(json.loads(ended.stdout.splitlines()[-1]))
        yield runs


def _one(arm: str, model: Path | None, *, steps: int, threads: int) -> dict[str, Any]:
    """One arm, in this process."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = run_arm(arm, model, steps=steps, work=Path(folder))
    measured["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    measured["gemm_gflops"] = _gemm_gflops()
    measured["mfu"] = measured["useful_gflop"] / measured["cpu_s"] / measured["gemm_gflops"]
    return measured


def _gemm_gflops(*, size: int = 1024) -> float:
    """Float32 GFLOP a CPU second, best of five; one thread's rate whatever the number of threads."""
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(6):
        start = time.process_time()
        left @ right
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def _table(runs: dict[str, list[dict[str, Any]]], shape: Path | None, threads: int, names: list[str]) -> dict[str, Any]:
    arms = {}
    for arm, found in runs.items():
        middle = {key: statistics.median(run[key] for run in found) for key in ("cpu_s", "wall_s", "peak_gb", "mfu")}
        units = found[0]["units"]
        rates = [run["units"] / run["cpu_s"] for run in found]
        arms[arm] = {
            **middle,
            "per_cpu_s": statistics.median(rates),
            "range": [min(rates), max(rates)],
            "units": units,
            "unit": found[0]["unit"],
            "steps": found[0]["steps"],
            "last_loss": found[0]["last_loss"],
            "gemm_gflops": statistics.median(run["gemm_gflops"] for run in found),
            "n": len(found),
            "load": os.getloadavg()[0],
        }
    ratios = {}
    for name in names:
        ours, peer = RATIOS[name]
        pairs = [b["cpu_s"] / a["cpu_s"] for a, b in zip(runs[ours], runs[peer], strict=True)]
        ratios[name] = {"median": statistics.median(pairs), "range": [min(pairs), max(pairs)], "n": len(pairs)}
    return {
        "shape": shape.name if shape else "small",
        "threads": threads,
        "arms": arms,
        "ratios": ratios,
    }


def _render(table: dict[str, Any]) -> str:
    lines = [f"\n{table['shape']}, {table['threads']} thread(s), load {os.getloadavg()[0]:.1f}"]
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
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    main()
