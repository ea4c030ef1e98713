"""The curate stage: raw documents become a tokenised, packed, deduplicated corpus.

Enters: sources by corpus, the base's tokenizer, the benchmarks. Leaves: training shards, held-out documents, a report.
Refuses: to train on benchmark items, near-duplicates of held-out documents, or unredacted personal data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from fmops.artifacts import Benchmarks, Checkpoint, Corpus, Dropped, Source
from fmops.data.contamination import Quotations, read_contamination, write_contaminated
from fmops.data.pack import Piece, Stream, cut, mix, pack, shares
from fmops.data.spool import Spool
from fmops.data.text import opening
from fmops.errors import FmopsError
from fmops.faults import fault_site
from fmops.integrity import sha256
from fmops.jobs import CurateJob
from fmops.stage import StageContext

if TYPE_CHECKING:
    from fmops.adapters.datatrove import InputFile
    from fmops.adapters.tokens import DocumentTokenizer

GROUP_BYTES = 32 * 1024 * 1024
SHARD_TOKENS = 4 * 1024 * 1024
TOKENISED_AT_ONCE = 200_000
"""Characters; the tokenizer is fastest on many documents at a time."""


def curate(
    config: CurateJob,
    *,
    base: Checkpoint,
    out: Path,
    context: StageContext,
    benchmarks: Benchmarks | None = None,
    **sources: Source,
) -> Corpus:
    """Clean, deduplicate, decontaminate, split, mix, tokenise and pack.

    Args:
        config: what to keep, the corpora with their roles and weights, and the training tokens wanted.
        base: its tokenizer makes the token ids.
        benchmarks: no document that holds one of their items is kept.
        sources: `corpus_<name>` for each corpus.

    Raises:
        FmopsError: a corpus has no source, or nothing of it is left; says what was dropped at which step.
    """
    names = list(config.corpora)
    old = [name for name in names if config.corpora[name].role == "replay"]
    domains = {"new": [name for name in names if name not in old], "old": old}
    for made in ("train", "held_out"):
        shutil.rmtree(out / made, ignore_errors=True)
        (out / made).mkdir(parents=True)
    spool = _read_documents(config, benchmarks, sources, out=out / ".work" / "documents", context=context)
    if unreadable := spool.ledger.unreadable():
        context.note(unreadable)
    fault_site("curate-documents")
    spool.mark_duplicates(threshold=config.curate.near_duplicate)
    held_out = spool.mark_held_out(domains, share=config.curate.held_out, seed=context.seed)
    _require_documents(spool)
    for domain, documents in held_out.items():
        if benchmarks and domains[domain] and len(documents) < 2:
            context.note(
                f"held out of the {domain} domain: {len(documents)} document, and an error needs two to be estimated. "
                "The gate will reject a family that is measured on it: give more documents"
            )
    for domain, documents in held_out.items():
        _write_held_out(spool, documents, out / "held_out" / f"{domain}.jsonl")
    write_contaminated(spool.ledger.items, out / "contaminated.jsonl")
    fault_site("curate-split")
    weights = shares(
        {name: config.corpora[name].weight for name in names}, {name: spool.characters(name) for name in names}
    )
    quotations = Quotations(spool.row(document)["text"] for documents in held_out.values() for document in documents)
    pieces = {
        name: _pieces(spool, name, base.model, quotations=quotations, config=config, seed=context.seed)
        for name in names
    }
    new = [name for name in names if name not in old]
    # Of replay alone, as for a suite over the old domain, all is wanted once.
    streams = {name: Stream(weights[name], pieces[name], whole=name in (new or names)) for name in names}
    tokens, blocks, by_document = _write_blocks(
        mix(streams, tokens=config.tokens), spool=spool, config=config, out=out / "train", context=context
    )
    fault_site("curate-blocks")
    total = sum(tokens.values())
    return Corpus(
        path=out,
        documents=_write_documents(spool, by_document, out / "documents.jsonl"),
        tokens=total,
        blocks=blocks,
        block_tokens=config.curate.block_tokens,
        replay_share=round(sum(tokens[name] for name in old) / total, 6),
        held_out_new=len(held_out["new"]),
        held_out_old=len(held_out["old"]),
        redactions=dict(sorted(spool.redactions.items())),
        dropped=tuple(
            Dropped(step=step, documents=count, examples=tuple(spool.ledger.examples.get(step, ())))
            for step, count in sorted(spool.ledger.counts.items())
        ),
        sources={
            name: {"documents": spool.count(name), "tokens": tokens[name], "weight": round(weights[name], 6)}
            for name in names
        },
    )


def _read_documents(
    config: CurateJob, benchmarks: Benchmarks | None, sources: dict[str, Source], *, out: Path, context: StageContext
) -> Spool:
    """Run the pipeline over all files; groups that a killed attempt finished are kept."""
    from fmops.adapters.datatrove import InputFile, Rules, run_documents

    files = []
    for number, (name, corpus) in enumerate(config.corpora.items()):
        source = sources.get(f"corpus_{name}")
        if source is None:
            raise FmopsError(f"the corpus {name!r} did not arrive as the input corpus_{name}.")
        files += [InputFile(file, number, name, corpus.text_field) for file in source.files]
    total = sum(each.file.bytes for each in files)
    done = 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        context.progress(done / 1e6, total / 1e6, unit="MB")

    curation = config.curate
    rules = Rules(
        language=curation.language,
        min_characters=curation.min_characters,
        quality=curation.quality,
        redact=curation.redact,
        unreadable=curation.unreadable,
        contamination=read_contamination(benchmarks.path if benchmarks else None),
    )
    # What an attempt with other inputs left behind must not count as done.
    inputs = [config.model_dump_json(), *(f"{each.file.name} {each.file.sha256}" for each in files)]
    if benchmarks:
        inputs += [f"{path.name} {sha256(path)}" for path in sorted((benchmarks.path / "items").glob("*.jsonl"))]
    out = out / hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    groups = _groups(files)
    run_documents(groups, rules, out=out, workers=context.threads, progress=progress)
    return Spool(out, groups=len(groups), corpora=list(config.corpora))


def _groups(files: list[InputFile]) -> list[list[InputFile]]:
    """Neighbouring files of about 32 MB together: the unit of parallel work, and of resuming."""
    groups: list[list[InputFile]] = []
    size = GROUP_BYTES
    for file in files:
        if size >= GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.file.bytes
    return groups


def _require_documents(spool: Spool) -> None:
    for name in spool.corpora:
        if not spool.count(name):
            dropped = ", ".join(f"{step} {count}" for step, count in sorted(spool.ledger.counts.items()))
            examples = "; ".join(example for kept in spool.ledger.examples.values() for example in kept[:1])
            raise FmopsError(
                f"no document of the corpus {name!r} is left to train on. Dropped in all corpora: {dropped or 'none'}. "
                f"For example: {examples or 'the files are empty'}. Loosen `curate`, or give other documents."
            )


def _pieces(
    spool: Spool, name: str, model: Path, *, quotations: Quotations, config: CurateJob, seed: int
) -> Iterator[Piece]:
    """The corpus without end, each lap in an order of its own, cut to the block length.

    Documents that quote a held-out one are left out here, where only those that are wanted cost the search.
    """
    from fmops.adapters.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer(model)
    for lap in count():
        batch: list[tuple[int, str]] = []
        yielded = False
        for document in spool.shuffled(name, seed=f"{seed}/{lap}"):
            row = spool.row(document)
            if lap == 0 and quotations.quoted_in(row["text"]):
                spool.drop(document, "quotes-held-out", f"{row['id']}: {opening(row['text'])}")
                continue
            yielded = True
            batch.append((document, row["text"]))
            if sum(len(text) for _, text in batch) >= TOKENISED_AT_ONCE:
                yield from _encoded(batch, name, lap, tokenizer, longest=config.curate.block_tokens)
                batch = []
        yield from _encoded(batch, name, lap, tokenizer, longest=config.curate.block_tokens)
        if not yielded:
            raise FmopsError(
                f"every document of the corpus {name!r} repeats parts of a held-out one, so none is left to train on. "
                "Give documents that share less, or lower curate.held_out."
            )


def _encoded(
    batch: list[tuple[int, str]], name: str, lap: int, tokenizer: DocumentTokenizer, *, longest: int
) -> Iterator[Piece]:
    if not batch:
        return
    for (document, _), ids in zip(batch, tokenizer.encode([text for _, text in batch]), strict=True):
        for part in cut(ids, longest=longest):
            yield Piece(name, document, lap, part)


def _write_blocks(
    pieces: Iterator[Piece], *, spool: Spool, config: CurateJob, out: Path, context: StageContext
) -> tuple[Counter[str], int, array[int]]:
    """Write the shards; return tokens by corpus, blocks, and tokens by document."""
    from fmops.adapters.parquet import write_blocks

    by_corpus: Counter[str] = Counter()
    by_document = array("Q", bytes(8 * len(spool)))
    shard: list[tuple[array[int], array[int]]] = []
    blocks = shards = held = 0

    def flush() -> None:
        nonlocal shards, held
        # The packer hands over half-full blocks last; a fixed shuffle spreads them over the shard.
        Random(shards).shuffle(shard)
        write_blocks(out / f"{shards:05d}.parquet", shard)
        shard.clear()
        shards, held = shards + 1, 0

    for block in pack(pieces, block_tokens=config.curate.block_tokens):
        ids = array("i")
        for piece in block:
            ids.extend(piece.ids)
            by_corpus[piece.corpus] += len(piece.ids)
            by_document[piece.document] += len(piece.ids)
        shard.append((ids, array("i", [len(piece.ids) for piece in block])))
        blocks, held = blocks + 1, held + len(ids)
        context.progress(by_corpus.total(), config.tokens or by_corpus.total() + 1, unit="tokens")
        if held >= SHARD_TOKENS:
            flush()
    if shard:
        flush()
    return by_corpus, blocks, by_document


def _write_held_out(spool: Spool, documents: list[int], path: Path) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for document in documents:
            row = spool.row(document)
            kept = {"id": row["id"], "text": row["text"], "source": spool.corpus(document)}
            lines.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _write_documents(spool: Spool, by_document: array[int], path: Path) -> int:
    """List the documents that are trained on, so that `recall` finds every model that saw one; return their number."""
    written = 0
    with path.open("w", encoding="utf-8") as lines:
        for document, tokens in enumerate(by_document):
            if not tokens:
                continue
            written += 1
            row = spool.row(document)
            kept = {
                "id": row["id"],
                "source": spool.corpus(document),
                "sha256": row["sha256"],
                "tokens": tokens,
            }
            lines.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return written
