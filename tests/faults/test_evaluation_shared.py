"""Processes share one evaluation: no chunk is scored twice, a dead one's work goes on, the rows are those of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmops.evaluation.journal import Journal

SCRIPT = """
import json, sys
from pathlib import Path
from fmops.adapters import tree_reader
from fmops.adapters.lm_eval_scorer import SharedPrefixLM
from fmops.evaluation.protocol import PinnedTask
from fmops.evaluation.scoring import score

model, work, worker = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
entries = [
    (PinnedTask.model_validate(task), documents) for task, documents in json.loads((work / "entries.json").read_text())
]
lm = SharedPrefixLM(model, threads=1, pack_tokens=32)
counted = [0]
read = tree_reader.TreeReader.score
def count(self, *work):
    counted[0] += 1
    return read(self, *work)
tree_reader.TreeReader.score = count
print("ready", flush=True)
sys.stdin.readline()
rows = score(lm, entries, work, on_progress=lambda _: None, worker=worker)
print(json.dumps([counted[0], rows]))
"""


@pytest.fixture
def entries() -> list:
    from fmops.evaluation.protocol import pin
    from fmops.evaluation.suites import load_suite

    quiz = [
        {
            "id": f"q{n}",
            "cluster": str(n),
            "question": f"{n} what is {n} " * 4,
            "choices": ["one", "two"],
            "label": n % 2,
        }
        for n in range(60)
    ]
    harm = [{"id": f"h{n}", "cluster": str(n), "prompt": f"break {n} " * 3} for n in range(40)]
    pinned = [
        pin(load_suite(suite, root=Path()), task, items=len(items)).model_dump(mode="json")
        for suite, task, items in (("capability", "openbookqa", quiz), ("harm", "harmbench", harm))
    ]
    return list(zip(pinned, (quiz, harm), strict=True))


def work_together(model: Path, work: Path, entries: list, faults: list[str | None]) -> list[tuple[int, str, str]]:
    """Start one process a fault (None: none), let them begin together; exit codes, output and errors."""
    work.mkdir()
    (work / "entries.json").write_text(json.dumps(entries))
    processes = []
    for worker, fault in enumerate(faults):
        environment = {**os.environ, "FMOPS_FAULT": fault} if fault else dict(os.environ)
        command = [sys.executable, "-c", SCRIPT, str(model), str(work), str(worker)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_who_shares_an_evaluation_and_who_dies_changes_nothing(tiny_model, tmp_path, entries):
    ((code, output, errors),) = work_together(tiny_model, tmp_path / "one", entries, [None])
    assert code == 0, errors
    chunks, rows = json.loads(output)
    counts = []
    for code, output, errors in work_together(tiny_model, tmp_path / "two", entries, [None, None]):
        assert code == 0, errors
        count, mine = json.loads(output)
        assert mine == rows
        counts.append(count)
    assert sum(counts) == chunks
    assert min(counts) > 0
    whole, killed = work_together(tiny_model, tmp_path / "killed", entries, [None, "evaluate.chunk:5"])
    assert killed[0] == -signal.SIGKILL
    assert whole[0] == 0, whole[2]
    assert json.loads(whole[1])[1] == rows


def test_a_chunk_has_one_owner_until_he_dies(tmp_path):
    path = tmp_path / "task.jsonl"
    claim = (
        "import sys; from pathlib import Path; from fmops.evaluation.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), worker=1); print(journal.claim('a'), flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", claim, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        journal = Journal(path)
        assert not journal.claim("a")
        assert journal.claim("b")
        other.kill()
    assert journal.claim("a", wait=True)
    journal.close()


def test_what_one_process_finishes_another_one_knows(tmp_path):
    mine, other = Journal(tmp_path / "task.jsonl"), Journal(tmp_path / "task.jsonl", worker=1)
    other.add("a", [1.5, True])
    assert mine.get("a") is None
    mine.refresh()
    assert mine.get("a") == [1.5, True]
    with other.path.open("ab") as file:
        file.write(b'{"key": "b", "va')
    mine.refresh()
    assert mine.get("b") is None
    mine.add("c", 1)
    assert Journal(tmp_path / "task.jsonl", worker=2).get("c") == 1
