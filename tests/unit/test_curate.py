"""Curation on Python's own documentation, with a real tokenizer: what is kept, what is dropped, and what is said."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmops.artifacts import Benchmarks, Checkpoint, Corpus, Source
from fmops.data.curate import curate
from fmops.errors import FmopsError
from fmops.jobs import CorpusPart, CurateJob
from fmops.lifecycle import Curate
from fmops.sources import resolve
from fmops.stage import StageContext

TOPICS = [topics[name] for name in sorted(topics) if len(topics[name]) > 1500][:48]


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> Checkpoint:
    return Checkpoint(path=tiny_model.parent, stage="base", parameters=1, trained_tokens=0)


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def source(root: Path, uri: str) -> Source:
    return resolve(uri, root=root, cache=root / "cache")


def run(
    root: Path,
    base: Checkpoint,
    context: StageContext,
    *,
    out: str = "out",
    tokens: int | None = None,
    benchmarks: Benchmarks | None = None,
    corpora: dict[str, CorpusPart] | None = None,
    uri: str | None = None,
    **curation: Any,
) -> Corpus:
    corpora = corpora or {"new": CorpusPart()}
    job = CurateJob(curate=Curate(**{"block_tokens": 256, **curation}), corpora=corpora, tokens=tokens)
    sources = {f"corpus_{name}": source(root, uri or f"{name}.jsonl") for name in corpora}
    return curate(job, base=base, out=root / out, context=context, benchmarks=benchmarks, **sources)


def dropped(corpus: Corpus) -> dict[str, int]:
    return {each.step: each.documents for each in corpus.dropped}


def blocks(corpus: Corpus) -> list[dict[str, list[int]]]:
    return [row for shard in corpus.train_shards for row in pq.read_table(shard).to_pylist()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decoded(corpus: Corpus, base: Checkpoint) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.model)
    return [tokenizer.decode(row["input_ids"]) for row in blocks(corpus)]


def test_every_document_is_trained_on_once_or_held_out_and_every_token_is_accounted_for(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS)
    corpus = run(tmp_path, base, context)
    listed = lines(corpus.path / "documents.jsonl")
    held_out = lines(corpus.path / "held_out" / "new.jsonl")
    removed = sum(dropped(corpus).values())
    assert len(listed) + len(held_out) + removed == len(TOPICS)
    assert 1 <= len(held_out) == corpus.held_out_new <= 12
    assert corpus.held_out_old == 0
    rows = blocks(corpus)
    assert corpus.blocks == len(rows)
    assert all(len(row["input_ids"]) == sum(row["lengths"]) <= 256 for row in rows)
    assert corpus.tokens == sum(len(row["input_ids"]) for row in rows) == sum(each["tokens"] for each in listed)
    # Packing wastes little, and every document ends with its end token, once.
    assert corpus.tokens / (256 * corpus.blocks) > 0.93
    assert sum(row["input_ids"].count(0) for row in rows) == len(listed) == corpus.documents


def test_held_out_text_is_never_in_the_training_blocks(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    write(tmp_path / "new.jsonl", TOPICS)
    corpus = run(tmp_path, base, context, held_out=0.3)
    trained = " ".join(decoded(corpus, base))
    held_out = lines(corpus.path / "held_out" / "new.jsonl")
    assert len(held_out) > 3
    assert not [row["id"] for row in held_out if row["text"][200:300] in trained]


def test_a_document_that_quotes_a_held_out_one_at_length_is_left_out(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS[:12])
    first = lines(run(tmp_path, base, context).path / "held_out" / "new.jsonl")[0]
    # A part of the held-out document inside a much longer one: no near-duplicate by Jaccard similarity.
    part = first["text"][: len(first["text"]) // 3]
    write(tmp_path / "new.jsonl", [*TOPICS[:12], "\n".join([*TOPICS[20:26], part])])
    corpus = run(tmp_path, base, context)
    quoting = [each for each in corpus.dropped if each.step == "quotes-held-out"]
    assert any(example.startswith("new/new.jsonl:13: ") for each in quoting for example in each.examples)
    assert "new/new.jsonl:13" not in {row["id"] for row in lines(corpus.path / "documents.jsonl")}


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_whatever_the_threads_and_a_seed_changes_them(
    tmp_path: Path, base: Checkpoint, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmops.data.curate.GROUP_BYTES", 100_000)
    for number, text in enumerate(TOPICS[:16]):
        (tmp_path / f"docs{number:02d}.txt").write_text(text)
    corpora = {"new": CorpusPart()}
    one = run(tmp_path, base, context, out="one", corpora=corpora, uri="*.txt")
    two = run(tmp_path, base, StageContext(threads=2, stream=context.stream), out="two", corpora=corpora, uri="*.txt")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert one.model_dump() == two.model_dump()
    run(tmp_path, base, StageContext(seed=1, stream=context.stream), out="seeded", corpora=corpora, uri="*.txt")
    assert digests(tmp_path / "seeded") != digests(tmp_path / "one")


def test_no_file_of_the_artifact_names_the_machine_it_was_made_on(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS)
    corpus = run(tmp_path, base, context)
    for path in (path for path in corpus.path.rglob("*") if path.is_file() and ".work" not in path.parts):
        assert str(tmp_path).encode() not in path.read_bytes()
    assert str(tmp_path) not in corpus.model_dump_json()


@pytest.mark.parametrize("tokens", [3_000, 60_000])
@pytest.mark.parametrize("replay", [4, 200])
def test_the_replay_share_holds_whatever_the_sizes(
    tmp_path: Path, base: Checkpoint, context: StageContext, tokens: int, replay: int
) -> None:
    write(tmp_path / "new.jsonl", TOPICS[:20])
    write(tmp_path / "old.jsonl", [f"Tale {n}. " + TOPICS[20 + n % 20][n * 7 : n * 7 + 900] for n in range(replay)])
    corpora = {
        "new": CorpusPart(),
        "old": CorpusPart(role="replay", weight=0.25),
    }
    corpus = run(tmp_path, base, context, tokens=tokens, corpora=corpora, near_duplicate=0.9)
    assert corpus.tokens == tokens
    assert corpus.replay_share == pytest.approx(0.25, abs=1 / tokens)
    by_source = Counter[str]()
    for row in lines(corpus.path / "documents.jsonl"):
        by_source[row["source"]] += row["tokens"]
    assert by_source["old"] / tokens == pytest.approx(0.25, abs=1 / tokens)
    assert corpus.held_out_old >= 1


def test_replay_alone_is_read_whole(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    """Who aligns and asks the suite `forgetting` has no new domain."""
    write(tmp_path / "old.jsonl", TOPICS[:20])
    corpus = run(tmp_path, base, context, tokens=None, corpora={"old": CorpusPart(role="replay")}, quality=False)
    assert corpus.replay_share == 1
    assert corpus.held_out_old >= 1
    assert len(lines(corpus.path / "documents.jsonl")) == corpus.documents


def test_a_small_token_budget_takes_a_sample_of_the_documents_not_the_first_ones(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS)
    corpus = run(tmp_path, base, context, tokens=4_000)
    numbers = [int(row["id"].rpartition(":")[2]) for row in lines(corpus.path / "documents.jsonl")]
    assert corpus.tokens == 4_000
    assert len(numbers) < 20
    assert max(numbers) > 2 * len(numbers)


def test_duplicates_are_kept_once_and_near_duplicates_too(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    originals = TOPICS[:20]
    shouted = [f"  {text.upper()}  " for text in originals[:5]]
    edited = [text.replace("statement", "command", 2) + "\nOne more sentence." for text in originals[5:10]]
    write(tmp_path / "new.jsonl", originals + shouted + edited)
    corpus = run(tmp_path, base, context, quality=False)
    clean = run(tmp_path, base, context, out="again", quality=False)
    assert dropped(corpus)["exact-duplicate"] - dropped(clean)["exact-duplicate"] == 0
    assert dropped(corpus) == {"exact-duplicate": 5, "near-duplicate": 5}
    example = next(each for each in corpus.dropped if each.step == "exact-duplicate").examples[0]
    assert example.startswith("new/new.jsonl:21 repeats new/new.jsonl:1: ")


def test_what_is_dropped_is_counted_with_reasons(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    french = "Le chat dort sur le canapé pendant que la pluie tombe doucement sur les toits de la ville. " * 4
    symbols = "#### 1234 %%%% 5678 " * 40
    repeated = "All work and no play makes Jack a dull boy.\n" * 40
    write(tmp_path / "new.jsonl", [*TOPICS[:10], french, symbols, repeated, "Short."])
    with (tmp_path / "new.jsonl").open("ab") as file:
        file.write(b'{"text": "caf\xe9"}\n{"text": 7}\nno json\n[1]\n')
    corpus = run(tmp_path, base, context)
    assert dropped(corpus) == {"language": 1, "quality": 2, "too-short": 1, "unreadable": 4}
    unreadable = next(each for each in corpus.dropped if each.step == "unreadable").examples
    assert unreadable[0] == "new/new.jsonl:15: no UTF-8 at byte 13"
    assert unreadable[1] == "new/new.jsonl:16: text is int"
    assert (
        f"4 files or rows could not be read and are left out; the first: {unreadable[0]}" in context.stream.getvalue()
    )
    language = next(each for each in corpus.dropped if each.step == "language").examples
    assert language[0].startswith("new/new.jsonl:11 (fr): Le chat dort")
    with pytest.raises(FmopsError, match=r"^new/new\.jsonl:15: no UTF-8 at byte 13\. .*`curate\.unreadable: skip`"):
        run(tmp_path, base, context, out="strict", unreadable="stop")


def test_every_form_of_file_is_read(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    import pyarrow as pa

    folder = tmp_path / "files"
    folder.mkdir()
    texts = TOPICS[:9]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.md").write_bytes(b"\xef\xbb\xbf" + texts[1].replace("\n", "\r\n").encode())
    write(folder / "c.jsonl", texts[2:4])
    (folder / "d.json").write_text(json.dumps([{"text": texts[4]}]))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[5]}).encode()))
    pq.write_table(pa.table({"text": [texts[6]], "n": [1]}), folder / "f.parquet")
    with zipfile.ZipFile(folder / "g.zip", "w") as archive:
        archive.writestr("inner/g.txt", texts[7])
        archive.writestr("inner/h.jsonl", json.dumps({"text": texts[8]}))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "nothing.txt").touch()
    corpora = {"new": CorpusPart()}
    corpus = run(tmp_path, base, context, corpora=corpora, uri="files", quality=False)
    held_out = lines(corpus.path / "held_out" / "new.jsonl")
    assert corpus.documents + len(held_out) == 8
    assert dropped(corpus) == {"unreadable": 2, "quotes-held-out": 1}
    found = {row["id"] for row in [*lines(corpus.path / "documents.jsonl"), *held_out]}
    assert {"new/files/a.txt", "new/files/c.jsonl:2", "new/files/f.parquet:1", "new/files/g.zip/inner/g.txt"} <= found


def test_a_long_text_file_becomes_several_documents(
    tmp_path: Path, base: Checkpoint, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmops.data.read.LONGEST_TEXT", 20_000)
    (tmp_path / "book.txt").write_text("\n\n".join(TOPICS[:20]))
    corpus = run(tmp_path, base, context, uri="book.txt", quality=False)
    assert corpus.documents + corpus.held_out_new > 3
    ids = {row["id"] for row in lines(corpus.path / "documents.jsonl")}
    assert all(identity.startswith("new/book.txt#") for identity in ids)


def test_a_table_with_a_changed_byte_gives_what_is_whole_and_names_itself(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    import pyarrow as pa

    write(tmp_path / "files" / "a.jsonl", TOPICS[:9])
    table = tmp_path / "files" / "b.parquet"
    pq.write_table(pa.table({"text": ["A marked sentence. " * 40]}), table, compression="none", use_dictionary=False)
    content = table.read_bytes()
    table.write_bytes(content.replace(b"marked", b"mark\x8cd"))
    corpus = run(tmp_path, base, context, uri="files", quality=False)
    assert dropped(corpus)["unreadable"] == 1
    assert "b.parquet:1: broken Parquet" in context.stream.getvalue()


def test_a_domain_too_small_to_judge_is_told_before_any_training(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    (tmp_path / "quiz" / "items").mkdir(parents=True)
    write(tmp_path / "new.jsonl", TOPICS[:3])
    corpus = run(tmp_path, base, context, benchmarks=Benchmarks(path=tmp_path / "quiz", items={}), quality=False)
    assert corpus.held_out_new == 1
    assert "held out of the new domain: 1 document, and an error needs two" in context.stream.getvalue()


def test_of_a_few_documents_two_are_held_out_so_that_the_gate_can_state_an_error(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS[:6])
    corpus = run(tmp_path, base, context, quality=False)
    assert corpus.held_out_new == 2
    assert corpus.documents >= 3
    assert "an error needs two" not in context.stream.getvalue()


def test_a_truncated_archive_gives_what_is_whole_and_names_itself(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TOPICS).encode())
    (tmp_path / "new.jsonl.gz").write_bytes(content[: len(content) // 2])
    corpus = run(tmp_path, base, context, uri="new.jsonl.gz")
    unreadable = next(each for each in corpus.dropped if each.step == "unreadable")
    assert unreadable.documents == 1
    assert unreadable.examples[0].startswith("new/new.jsonl.gz: broken gzip: ")
    assert corpus.documents > 5


def test_a_wrong_text_field_shows_the_keys(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    (tmp_path / "new.jsonl").write_text(json.dumps({"content": "x", "id": 1}) + "\n")
    with pytest.raises(
        FmopsError, match=r"new\.jsonl:1 has no key 'text'.*'content'\? Its keys: content, id\. Name .* `text_field`"
    ):
        run(tmp_path, base, context)


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    write(tmp_path / "new.jsonl", ["short", "shorter still"])
    with pytest.raises(FmopsError, match=r"no document of the corpus 'new' is left .* too-short 2\. For example"):
        run(tmp_path, base, context)


def test_an_unknown_language_is_refused_with_the_choices(
    tmp_path: Path, base: Checkpoint, context: StageContext
) -> None:
    write(tmp_path / "new.jsonl", TOPICS[:2])
    with pytest.raises(FmopsError, match=r"unknown language 'english'"):
        run(tmp_path, base, context, language="english")


def test_personal_data_never_reaches_any_file(tmp_path: Path, base: Checkpoint, context: StageContext) -> None:
    secrets = ["jane.doe@acme-corp.com", "4111 1111 1111 1111", "AKIAIOSFODNN7EXAMPLE"]
    write(tmp_path / "new.jsonl", [f"{text}\nWrite to {secrets[0]}, pay {secrets[1]}." for text in TOPICS[:12]])
    with (tmp_path / "new.jsonl").open("a") as file:
        file.write(json.dumps({"text": f"key {secrets[2]}"}) + "\n")
    corpus = run(tmp_path, base, context, quality=False)
    assert corpus.redactions == {"card": 12, "email": 12}
    everything = b"".join(path.read_bytes() for path in corpus.path.rglob("*") if path.is_file())
    everything += corpus.model_dump_json().encode() + " ".join(decoded(corpus, base)).encode()
    assert not [secret for secret in secrets if secret.encode() in everything]
    assert b"<email>" in everything
