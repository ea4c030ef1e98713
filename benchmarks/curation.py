"""Peak memory and speed of curation as the corpus grows.

Enters: sizes in MB, a model folder. Leaves: one JSON line a size: documents, MB/s, documents/s, peak resident memory.
Refuses: nothing. Documents are real ones with their sentences drawn anew, so that hardly any repeats another.

Run `python benchmarks/curation.py --model MODEL --megabytes 10 100`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from fmops.artifacts import Checkpoint
from fmops.data.curate import curate
from fmops.jobs import CorpusPart, CurateJob
from fmops.lifecycle import Curate
from fmops.sources import resolve
from fmops.stage import StageContext

FILE_BYTES = 16_000_000
WORD = re.compile(r"\w+")


def write_corpus(folder: Path, megabytes: int) -> None:
    """JSON Lines of documents of 1 to 8 KB: real sentences in a new order, a tenth of their words drawn anew."""
    rng = random.Random(megabytes)
    sentences = [part for text in topics.values() for part in re.split(r"(?<=\.)\s+", text) if len(part) > 40]
    words = sorted({word for sentence in sentences for word in WORD.findall(sentence) if len(word) > 3})
    written = 0
    while written < megabytes * 1_000_000:
        with (folder / f"{written:012d}.jsonl").open("w") as file:
            size = 0
            while size < min(FILE_BYTES, megabytes * 1_000_000 - written):
                size += file.write(json.dumps({"text": document(sentences, words, rng)}) + "\n")
        written += size


def document(sentences: list[str], words: list[str], rng: random.Random) -> str:
    """One document that no other equals."""
    chosen = " ".join(rng.choices(sentences, k=rng.randint(8, 60)))
    return WORD.sub(lambda match: rng.choice(words) if rng.random() < 0.1 else match.group(), chosen)


def measure(megabytes: int, model: Path, *, threads: int, tokens: int | None) -> dict[str, float]:
    """Curate a corpus of that size; peaks are of this process and of its largest worker."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "docs").mkdir()
        write_corpus(root / "docs", megabytes)
        source = resolve("docs/*.jsonl", root=root, cache=root / "cache")
        start, before = time.monotonic(), _cpu_seconds()
        corpus = curate(
            CurateJob(curate=Curate(), corpora={"new": CorpusPart()}, tokens=tokens),
            base=Checkpoint(path=model.parent, stage="base", parameters=0, trained_tokens=0),
            corpus_new=source,
            out=root / "out",
            context=StageContext(threads=threads, stream=io.StringIO()),
        )
        seconds = time.monotonic() - start
    read = round(corpus.sources["new"]["documents"]) + corpus.held_out_new
    read += sum(each.documents for each in corpus.dropped)
    return {
        "megabytes": megabytes,
        "documents": read,
        "tokens": corpus.tokens,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu_seconds() - before, 1),
        "documents_per_second": round(read / seconds),
        "megabytes_per_second": round(megabytes / seconds, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "peak_worker_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000),
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Measure each size in a process of its own, so that peaks do not mix."""
    parser = argparse.ArgumentParser(description="Peak memory and speed of curation.")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face model folder named model")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="training tokens wanted; left out: everything is tokenised")
    given = parser.parse_args()
    if len(given.megabytes) == 1:
        found = measure(given.megabytes[0], given.model, threads=given.threads, tokens=given.tokens)
        print(json.dumps(found), flush=True)
        return
    for size in given.megabytes:
        command = [sys.executable, __file__, "--model", str(given.model), "--megabytes", str(size)]
        command += ["--threads", str(given.threads)]
        subprocess.run([*command, *(["--tokens", str(given.tokens)] if given.tokens else [])], check=True)


if __name__ == "__main__":
    main()
