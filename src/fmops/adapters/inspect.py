"""Inspect (inspect-ai): agentic tasks, with tools, against an endpoint.

Enters: an order with a task's Python file. Leaves: one answer a sample, with Inspect's score from 0 to 1.
Refuses: samples that ended with an error, scores that are no numbers, runs without a log.

Inspect runs in an environment of its own and is never imported here. Tools are described in the prompt and read from
the answer, so that any chat model may use them.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from fmops.evaluation.outside import ANSWER_TOKENS, Answers, Asked, Order, OutsideFailed, run_command
from fmops.frameworks import executable

VALUES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Inspect's letters: correct, partial, incorrect, no answer."""


def run_agent(order: Order) -> Answers:
    """Run the task's file."""
    logs = order.folder / "logs"
    # Inspect wants a path below the folder it runs in.
    shutil.copyfile(str(order.file), order.folder / "task.py")
    command = [
        executable("inspect"), "eval", "task.py", "--model", f"openai-api/fmops/{order.model}",
        "-M", "emulate_tools=true", "--temperature", "0", "--max-tokens", str(ANSWER_TOKENS), "--seed", str(order.seed),
        "--max-connections", "1", "--max-samples", "1", "--log-format", "json", "--log-dir", str(logs), "--display",
        "plain", "--log-level", "warning", *(("--limit", str(order.limit)) if order.limit else ()),
    ]  # fmt: skip
    run_command(command, order, {"FMOPS_API_KEY": "none", "FMOPS_BASE_URL": order.url})
    found = sorted(logs.glob("*.json"))
    if len(found) != 1:
        raise OutsideFailed(f"task {order.task.task}: Inspect left {len(found)} logs. Give a file with one @task.")
    return read_log(json.loads(found[0].read_text("utf-8")), order)


def read_log(log: dict[str, Any], order: Order) -> Answers:
    """Inspect's log of one run.

    Raises:
        OutsideFailed: it did not end well, or a sample has no usable score.
    """
    if log["status"] != "success":
        told = (log.get("error") or {}).get("message", "no reason given")
        raise OutsideFailed(f"task {order.task.task}: Inspect's run ended with {log['status']}: {told}")
    asked = tuple(_asked(sample, order) for sample in log.get("samples") or ())
    return Answers(str(log["eval"]["packages"]["inspect_ai"]), asked)


def _asked(sample: dict[str, Any], order: Order) -> Asked:
    name = str(sample["id"])
    if sample.get("error"):
        raise OutsideFailed(f"task {order.task.task}, sample {name}: {sample['error']['message']}")
    scores = sample.get("scores") or {}
    if len(scores) != 1:
        raise OutsideFailed(f"task {order.task.task}, sample {name}: {len(scores)} scores. Give the task one scorer.")
    value = next(iter(scores.values()))["value"]
    score = VALUES.get(value) if isinstance(value, str) else value
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise OutsideFailed(f"task {order.task.task}, sample {name}: the score {value!r} is no number from 0 to 1.")
    asked = sample["input"]
    prompt = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    return Asked(prompt=prompt, response=_answer(sample), score=float(score), name=name)


def _answer(sample: dict[str, Any]) -> str:
    """The last words of the model; what it called on the way is in Inspect's own log."""
    choices = (sample.get("output") or {}).get("choices") or [{}]
    content = choices[0].get("message", {}).get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
