"""What resume states and kills cost: `python -m benchmarks.checkpoints waits MB`, `… goodput N`, `… kills N`.

Enters: the size of a state, or how many kills. Leaves: one JSON line of figures on standard output.
Refuses: a run under kills whose final weights differ from those of the run that was left alone.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3


def waits(megabytes: int) -> dict[str, object]:
    """Seconds that training waits for one resume state of so many megabytes, three ways in turn; medians and ranges.

    `sealed before the next step`: written, digested and synced at once. `sealed beside training`: what FMOps does; the
    step waits for the writes alone. `dcp.async_save`: torch.distributed.checkpoint copies the state first.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from fmops.adapters import resume

    torch.set_num_threads(1)
    rows = megabytes * 1_000_000 // (3 * 20 * 4 * 1024)
    state = {name: {f"layer{n}": torch.rand(rows, 1024) for n in range(20)} for name in ("weights", "first", "second")}
    seconds: dict[str, list[float]] = {"sealed before the next step": [], "sealed beside training": []}
    seconds |= {"dcp.async_save": [], "until sealed": []}
    peak: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=0, world_size=1)
        for _ in range(REPEATS):
            for way in ("sealed before the next step", "sealed beside training", "dcp.async_save"):
                folder = Path(scratch) / "checkpoint-1"
                start = time.perf_counter()
                if way == "dcp.async_save":
                    pending = dcp.async_save(state, checkpoint_id=folder)
                    seconds[way].append(time.perf_counter() - start)
                    pending.result()
                else:
                    folder.mkdir()
                    for name, part in state.items():
                        torch.save(part, folder / f"{name}.pt")
                    sealer = resume.Sealer(report=print)
                    sealer.seal(folder, planned=())
                    if way == "sealed beside training":
                        seconds[way].append(time.perf_counter() - start)
                    sealer.wait()
                    if way != "sealed beside training":
                        seconds[way].append(time.perf_counter() - start)
                    else:
                        seconds["until sealed"].append(time.perf_counter() - start)
                peak[way] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                shutil.rmtree(folder)
                os.sync()
    dist.destroy_process_group()
    figures = {
        way: {"median_s": round(statistics.median(found), 2), "range_s": [round(min(found), 2), round(max(found), 2)]}
        for way, found in seconds.items()
    }
    return {"state_mb": megabytes, "n": REPEATS, "waits": figures, "peak_gb_so_far": peak}


def goodput(*, kills: int, seed: int = 0) -> dict[str, object]:
    """Train under SIGKILLs at random processor times; the share of that time that the result needed.

    Time is processor time of the training process, so that other load on the machine does not count. The number of
    resume states is the best of Young and Daly for what was measured: one each sqrt(2 × save × between) seconds. Their
    first-order bound is then 1 − sqrt(2 × save / between) − restart / between.
    """
    import training_run
    from tiny_model import write_tiny_model

    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        write_tiny_model(inputs / "model")
        out = Path(scratch) / "out"
        _, few_s = _attempt(inputs, out, states=1)
        shutil.rmtree(out)
        _, many_s = _attempt(inputs, out, states=41)
        whole = training_run.digests(out)
        for path in [path for path in out.iterdir() if path.name != ".work"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _, restart_s = _attempt(inputs, out, states=41)
        save_s = max(0.01, (many_s - few_s) / 40)
        mean_s = few_s / 2
        states = max(1, round((few_s - restart_s) / math.sqrt(2 * save_s * mean_s)))
        spent, killed, runs = 0.0, 0, 0
        while killed < kills:
            shutil.rmtree(out)
            lived = False
            while not lived:
                lived, used = _attempt(
                    inputs, out, states=states, kill_after_s=restart_s + dice.expovariate(1 / mean_s)
                )
                spent += used
                killed += not lived
            if training_run.digests(out) != whole:
                raise SystemExit(f"run {runs} ended with other weights than the run that was left alone")
            runs += 1
    between_s = spent / killed
    bound = 1 - math.sqrt(2 * save_s / between_s) - restart_s / between_s
    useful_s = few_s - save_s
    return {
        "kills": killed,
        "runs": runs,
        "digests_equal": True,
        "alone_s": few_s,
        "save_s": save_s,
        "restart_s": restart_s,
        "states": states,
        "between_kills_s": between_s,
        "goodput": runs * useful_s / spent,
        "young_daly": bound,
        "share_of_young_daly": runs * useful_s / spent / bound,
    }


def kills(*, wanted: int, seed: int = 0) -> dict[str, object]:
    """One training under `wanted` SIGKILLs at random wall times: where it was hit, and whether the weights are equal.

    Imports happen once, here; each attempt is a fork, so that what is killed is training and its resume states and not
    the loading of libraries. Times to live are drawn from an exponential distribution, whose mean doubles while
    attempts in a row get no further: on a busy machine a start alone may take longer than the time between two states.
    """
    import training_run
    from tiny_model import write_tiny_model

    from fmops.adapters import transformers_pretrain  # noqa: F401  what every fork would import

    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        write_tiny_model(inputs / "model")
        stage = f"long-{4 * wanted}"
        _, alone_s, _ = _forked(stage, inputs, Path(scratch) / "alone", live_s=None)
        whole = training_run.digests(Path(scratch) / "alone")
        out, patience, lived, spent, places = Path(scratch) / "out", 1.0, False, 0.0, []
        while not lived:
            before = _newest_step(out)
            live_s = None if len(places) == wanted else 0.3 + dice.expovariate(1 / (patience * alone_s / wanted))
            lived, used, hit = _forked(stage, inputs, out, live_s=live_s)
            spent += used
            if hit:
                places.append(_newest_step(out))
                patience = 1.0 if places[-1] > before else 2 * patience
        equal = training_run.digests(out) == whole
    return {
        "kills": len(places),
        "digests_equal": equal,
        "resume_states_hit_at": places,
        "alone_wall_s": round(alone_s, 1),
        "wall_s": round(spent, 1),
    }


def _forked(stage: str, inputs: Path, out: Path, *, live_s: float | None) -> tuple[bool, float, bool]:
    """Whether an attempt in a fork finished, its wall seconds, and whether it was killed."""
    import training_run

    started = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as silent:
            training_run.train(stage, inputs, out, silent)
        os._exit(0)
    timer = threading.Timer(live_s or 1e6, os.kill, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"an attempt ended with {code}")
    return code == 0, time.monotonic() - started, code != 0


def _newest_step(out: Path) -> int:
    found = out.glob(".work/checkpoint-*/manifest.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


def _attempt(inputs: Path, out: Path, *, states: int, kill_after_s: float | None = None) -> tuple[bool, float]:
    """Whether one training process finished, and its processor seconds."""
    import training_run

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, training_run.__file__, f"long-{states}", str(inputs), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        preexec_fn=None if kill_after_s is None else lambda: _die_after(kill_after_s),
        capture_output=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(ended.stderr.decode()[-2000:])
    return ended.returncode == 0, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _die_after(seconds: float) -> None:
    """SIGKILL from the kernel after so much processor time, rounded up to whole seconds."""
    whole = max(1, math.ceil(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "quickstart")]
    verb, count = sys.argv[1], int(sys.argv[2])
    found = {"waits": waits, "goodput": lambda n: goodput(kills=n), "kills": lambda n: kills(wanted=n)}[verb](count)
    print(json.dumps(found))
