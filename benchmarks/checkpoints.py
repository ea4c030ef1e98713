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
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3
PROBES = 21
"""States of the run that tells what one costs."""
LENGTHENED = 6
"""Times that the run under kills is as long as those that tell what it costs."""


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
    """One training killed so many times at random processor times; the share of that time that the result needed.

    Time is processor time, so that other load on the machine does not count: the kernel ends an attempt (SIGPROF,
    which nobody catches) once it has used its exponential share. What a state and a restart cost is measured before,
    and gives the interval between states that is best for that rate of kills, which the run then uses.
    """
    import training_run
    from tiny_model import write_tiny_model

    from fmops.adapters import transformers_pretrain  # noqa: F401  what every fork would import

    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        write_tiny_model(inputs / "model")
        one, many = Path(scratch) / "one", Path(scratch) / "many"
        _, few_s = _killed("long-1", inputs, one, live_s=None)
        _, many_s = _killed(f"long-{PROBES}", inputs, many, live_s=None)
        save_s = max(0.001, (many_s - few_s) / (PROBES - 1))
        step_s = few_s / training_run.LONG_STEPS
        restart_s = statistics.median(_killed(f"long-{PROBES}", inputs, many, fault="step:1")[1] for _ in range(3))
        restart_s -= step_s
        # Of the whole run at about this rate, so that it is hit as often as was asked.
        whole = f"long-{{}}-{LENGTHENED}"
        useful_s = few_s * LENGTHENED - save_s
        between_s = useful_s * 0.7 / kills
        interval_s, bound = best_interval(save_s=save_s, restart_s=restart_s, between_s=between_s)
        stage = whole.format(max(1, round(useful_s / interval_s)))
        alone, out = Path(scratch) / "alone", Path(scratch) / "out"
        _killed(stage, inputs, alone, live_s=None)
        spent, killed, lived = 0.0, 0, False
        while not lived:
            live_s = None if killed == kills else dice.expovariate(1 / between_s)
            lived, used = _killed(stage, inputs, out, live_s=live_s)
            spent += used
            killed += not lived
        if training_run.digests(out) != training_run.digests(alone):
            raise SystemExit("the run under kills ended with other weights than the run that was left alone")
    return {
        "kills": killed,
        "digests_equal": True,
        "useful_cpu_s": useful_s,
        "spent_cpu_s": spent,
        "save_cpu_s": save_s,
        "restart_cpu_s": restart_s,
        "between_kills_cpu_s": between_s,
        "interval_cpu_s": interval_s,
        "goodput": useful_s / spent,
        "young_daly": bound,
        "share_of_young_daly": useful_s / spent / bound,
    }


def best_interval(*, save_s: float, restart_s: float, between_s: float) -> tuple[float, float]:
    """Seconds of training between two states that waste least, and the goodput expected then.

    Kills come at random, `between_s` apart on average, also during a save or a restart (Daly 2006, equation 20): so
    much training takes between_s × e^(restart/between) × (e^((interval + save)/between) − 1). Young's first-order
    interval, sqrt(2 × save × between), is where the search begins.
    """

    def expected(interval_s: float) -> float:
        spent = between_s * math.exp(restart_s / between_s) * math.expm1((interval_s + save_s) / between_s)
        return interval_s / spent

    young = math.sqrt(2 * save_s * between_s)
    best = max((young * 1.02**power for power in range(-150, 151)), key=expected)
    return best, expected(best)


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


def _killed(
    stage: str, inputs: Path, out: Path, *, live_s: float | None = None, fault: str | None = None
) -> tuple[bool, float]:
    """Whether an attempt in a fork finished, and its processor seconds; killed after `live_s`, or at a fault."""
    import training_run

    child = os.fork()
    if child == 0:
        if fault:
            os.environ["FMOPS_FAULT"] = fault
        if live_s is not None:
            signal.setitimer(signal.ITIMER_PROF, max(1e-3, live_s))
        with open(os.devnull, "w") as silent:
            training_run.train(stage, inputs, out, silent)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL, -signal.SIGPROF):
        raise SystemExit(f"an attempt ended with {code}")
    return code == 0, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "quickstart")]
    verb, count = sys.argv[1], int(sys.argv[2])
    found = {"waits": waits, "goodput": lambda n: goodput(kills=n), "kills": lambda n: kills(wanted=n)}[verb](count)
    print(json.dumps(found))
