"""Tasks that another framework asks: garak attacks, Inspect's agents. They meet the model at an endpoint, as users do.

Enters: a pinned task of a framework, a model behind the harness's interface. Leaves: rows as `EvalReport` has them.
Refuses: a framework that is not here, runs that ended early, answers that never came.

Each framework lives in an environment of its own, since its versions clash with ours; only files pass between.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmops.errors import EXIT_FAILED, FmopsError
from fmops.evaluation.items import most
from fmops.evaluation.protocol import PinnedTask, digest
from fmops.frameworks import last_words, own_environment

if TYPE_CHECKING:
    from fmops.adapters.lm_eval_endpoint import EndpointLM
    from fmops.adapters.lm_eval_scorer import SharedPrefixLM

ANSWER_TOKENS = 128
"""Most tokens of an answer."""


class OutsideFailed(FmopsError):
    """A framework ended without its results."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Asked:
    """One thing that a framework asked the model, and what became of it."""

    prompt: str
    response: str
    score: float
    name: str = ""
    """The framework's own name of the item."""


@dataclass(frozen=True)
class Answers:
    """What a framework left."""

    version: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Order:
    """One run of a framework."""

    task: PinnedTask
    url: str
    """Of an OpenAI-compatible endpoint that serves the model `model`."""
    model: str
    folder: Path
    """Empty; the framework's files go there."""
    limit: int | None
    seed: int
    file: Path | None
    """The task's own file, for a framework that has one."""


def run_outside(
    lm: SharedPrefixLM | EndpointLM,
    tasks: Sequence[tuple[PinnedTask, Path | None]],
    work: Path,
    *,
    limit: int | None,
    seed: int,
) -> Iterator[tuple[PinnedTask, str, list[dict[str, Any]]]]:
    """Each task with its items counted, the framework's version, and its rows. A finished task is not asked again."""
    if not tasks:
        return
    from fmops.adapters.lm_eval_server import NAME, served_locally

    with served_locally(lm) as url:
        for task, file in tasks:
            kept = work / f"{task.task}.outside.json"
            if not kept.is_file():
                folder = work / f"{task.task}.outside"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                order = Order(task, url, NAME, folder, most(task.share, limit), seed, file)
                answers = _runner(task.framework)(order)
                rows = _rows(task, answers)
                if not rows:
                    raise OutsideFailed(f"task {task.task}: {task.framework} asked nothing. Look at {folder}.")
                temporary = kept.with_suffix(".part")
                temporary.write_text(json.dumps([answers.version, rows]), encoding="utf-8")
                temporary.replace(kept)
            version, rows = json.loads(kept.read_text(encoding="utf-8"))
            yield task.model_copy(update={"items": len(rows)}), version, rows


def _runner(framework: str | None) -> Callable[[Order], Answers]:
    if framework == "garak":
        from fmops.adapters.garak import attack

        return attack
    from fmops.adapters.inspect import run_agent

    return run_agent


def _rows(task: PinnedTask, answers: Answers) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    rows = []
    for asked in answers.asked:
        identity = digest([asked.name, asked.prompt])[:16]
        seen[identity] += 1
        rows.append(
            {
                "family": task.family,
                "suite": task.suite,
                "task": task.task,
                "sample": f"{task.task}-{identity}" + (f"-{seen[identity]}" if seen[identity] > 1 else ""),
                "cluster": identity,
                "metric": task.metrics[0],
                "score": asked.score,
                "response": asked.response,
                "prompt_sha256": hashlib.sha256(asked.prompt.encode()).hexdigest(),
            }
        )
    return rows


def run_command(command: list[str], order: Order, environment: Mapping[str, str]) -> None:
    """Run a framework in its folder, with no home, cache or key of the user's; its output goes to `output.txt`.

    Raises:
        OutsideFailed: it ended with an error; shows the end of what it said.
    """
    output = order.folder / "output.txt"
    with output.open("wb") as file:
        done = subprocess.run(
            command, cwd=order.folder, env=own_environment(order.folder, **environment), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        raise OutsideFailed(
            f"task {order.task.task}: {order.task.framework} ended with code {done.returncode}: {last_words(output)}"
        )
