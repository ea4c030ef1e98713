"""What a user notices of sources: files are found, verified, kept, and refused with a remedy."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import pytest

from fmops.errors import FmopsError, IntegrityError
from fmops.integrity import Digests, refuse_pickle
from fmops.sources import remember, resolve, resolve_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("beta")
    (tmp_path / "docs" / "a.txt").write_text("alpha")
    (tmp_path / "docs" / "deep" / "c.txt").write_text("gamma")
    (tmp_path / "docs" / ".hidden.txt").write_text("no data")
    return tmp_path


def names(uri: str | tuple[str, ...], root: Path) -> list[str]:
    return [file.name for file in resolve(uri, root=root, cache=root / "cache").files]


def test_a_glob_a_folder_and_a_list_name_files_in_order(folder: Path) -> None:
    assert names("docs/**/*.txt", folder) == ["docs/a.txt", "docs/b.txt", "docs/deep/c.txt"]
    assert names("./docs", folder) == ["docs/a.txt", "docs/b.txt", "docs/deep/c.txt"]
    assert names(("docs/b.txt", "docs/a.txt", "docs/*.txt"), folder) == ["docs/a.txt", "docs/b.txt"]


def test_names_do_not_depend_on_where_the_checkout_lies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    outside = resolve(f"{folder}/docs/**/*.txt", root=elsewhere, cache=folder / "cache")
    assert [file.name for file in outside.files] == ["docs/a.txt", "docs/b.txt", "docs/deep/c.txt"]
    assert str(folder) not in outside.model_dump_json(exclude={"uri"})


def test_a_file_whose_name_holds_glob_signs_is_found(folder: Path) -> None:
    (folder / "docs" / "notes [1].txt").write_text("x")
    assert names("docs/notes [1].txt", folder) == ["docs/notes [1].txt"]


def test_nothing_found_names_the_pattern_and_the_folder(folder: Path) -> None:
    with pytest.raises(FmopsError, match=rf"no file matches 'dox/\*\.txt' in {re.escape(str(folder))}"):
        resolve("dox/*.txt", root=folder, cache=folder / "cache")


def test_an_unknown_scheme_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(FmopsError, match=r"unknown scheme 's33'\. Did you mean 's3'\?"):
        resolve("s33://bucket/key", root=folder, cache=folder / "cache")


def test_a_digest_in_the_uri_is_checked(folder: Path) -> None:
    right = hashlib.sha256(b"alpha").hexdigest()
    assert names(f"docs/a.txt#sha256={right}", folder) == ["docs/a.txt"]
    with pytest.raises(IntegrityError, match=f"sha256 is {right}, and the spec wants {'0' * 64}"):
        resolve(f"docs/a.txt#sha256={'0' * 64}", root=folder, cache=folder / "cache")
    with pytest.raises(FmopsError, match="wants 64 hexadecimal digits, not 'abc'"):
        resolve("docs/a.txt#sha256=abc", root=folder, cache=folder / "cache")
    with pytest.raises(FmopsError, match="is for one file, and this is 2"):
        resolve(f"docs/*.txt#sha256={right}", root=folder, cache=folder / "cache")


def test_two_different_files_of_one_name_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "docs"
    other.mkdir()
    (other / "a.txt").write_text("another alpha")
    with pytest.raises(FmopsError, match=r"are named docs/a\.txt and differ"):
        resolve(("docs/a.txt", f"{other}/*.txt"), root=folder, cache=folder / "cache")


def test_an_edited_byte_is_noticed_even_with_size_and_mtime_restored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "docs" / "a.txt"
    settled = path.stat().st_ctime_ns + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: settled)
    before = resolve("docs/a.txt", root=folder, cache=folder / "cache").files[0].sha256
    stat = path.stat()
    path.write_text("alphb")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = resolve("docs/a.txt", root=folder, cache=folder / "cache").files[0].sha256
    assert before == hashlib.sha256(b"alpha").hexdigest()
    assert after == hashlib.sha256(b"alphb").hexdigest()


def test_an_untouched_file_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "docs" / "a.txt"
    settled = path.stat().st_ctime_ns + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: settled)
    digests = Digests(folder / "digests.json")
    value = digests.of(path)
    digests.save()
    monkeypatch.setattr("fmops.integrity.sha256", lambda _: pytest.fail("the file was read again"))
    assert Digests(folder / "digests.json").of(path) == value


def test_a_file_just_written_is_remembered_after_a_tick_of_a_fine_clock(folder: Path) -> None:
    path = folder / "docs" / "a.txt"
    path.write_text("fresh")
    digests = Digests(folder / "digests.json")
    digests.of(path)
    digests.save()
    assert (folder / "digests.json").exists() == bool(path.stat().st_ctime_ns % 1_000_000_000)


def test_a_file_that_may_still_change_within_the_clock_tick_is_not_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "docs" / "a.txt"
    before_the_change = path.stat().st_ctime_ns - 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: before_the_change)
    digests = Digests(folder / "digests.json")
    digests.of(path)
    digests.save()
    assert not (folder / "digests.json").exists()


def test_what_is_known_of_digests_is_read_once_for_all_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = Digests.__init__

    def counted(self: Digests, path: Path) -> None:
        opened.append(path)
        real(self, path)

    monkeypatch.setattr(Digests, "__init__", counted)
    wanted = [("docs/a.txt",), ("docs/b.txt",), ("docs",)]
    found = resolve_all(wanted, root=folder, cache=folder / "cache")
    assert [len(found[uris].files) for uris in wanted] == [1, 1, 3]
    assert len(opened) == 1


def test_a_file_linked_elsewhere_is_read_once_more_and_then_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = folder / "cache"
    source = resolve("docs/a.txt", root=folder, cache=cache)
    (folder / "linked.txt").hardlink_to(folder / "docs" / "a.txt")
    remember([source], cache=cache)
    monkeypatch.setattr("fmops.integrity.sha256", lambda _: pytest.fail("the file was read again"))
    assert resolve("docs/a.txt", root=folder, cache=cache) == source


def test_a_torn_digest_memory_only_costs_reading_again(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "digests.json").write_text('{"1:2:3')
    assert names("docs/a.txt", folder) == ["docs/a.txt"]


class Payload:
    """Unpickling this would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["weights.safetensors", "data.txt", "rows.jsonl", "model.gguf", "table.parquet"])
def test_a_pickle_under_another_name_is_refused_and_never_opened(tmp_path: Path, name: str, protocol: int) -> None:
    touched = tmp_path / "touched"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(touched), protocol=protocol))
    with pytest.raises(IntegrityError, match=f"{re.escape(name)} is a pickle"):
        resolve(name, root=tmp_path, cache=tmp_path / "cache")
    assert not touched.exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "state.pkl", "x.joblib"])
def test_a_pickle_of_the_oldest_protocol_is_refused_by_its_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "touched"), protocol=0))
    with pytest.raises(IntegrityError, match="has a suffix of pickles"):
        resolve(name, root=tmp_path, cache=tmp_path / "cache")


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_pickles_inside_archives_are_refused(tmp_path: Path) -> None:
    harm = pickle.dumps(Payload(tmp_path / "touched"))
    cases = {
        "named.zip": zipped({"a.txt": b"text", "archive/data.pkl": b""}),
        "renamed.zip": zipped({"a.txt": harm}),
        "nested.zip": zipped({"inner.zip": zipped({"a.txt": harm})}),
        "compressed.zip": zipped({"a.txt.gz": gzip.compress(harm)}),
        "plain.txt.gz": gzip.compress(harm),
        "torch.safetensors": zipped({"archive/data.pkl": harm}),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IntegrityError, match="A pickle runs code when it is opened"):
            refuse_pickle(tmp_path / name)
    bomb = b"x"
    for _ in range(5):
        bomb = zipped({"inner.zip": bomb})
    (tmp_path / "deep.zip").write_bytes(bomb)
    with pytest.raises(IntegrityError, match="nests archives more than 3 deep"):
        refuse_pickle(tmp_path / "deep.zip")


def test_a_safetensors_file_whose_header_length_looks_like_a_pickle_is_taken(tmp_path: Path) -> None:
    header = b"{" + b'"__metadata__":{"a":"' + b"x" * (0x280 - 25) + b'"}}'
    assert len(header) == 0x280
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert names("m.safetensors", tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("name", ["a.parquet", "a.gguf", "a.safetensors", "a.zip", "a.gz"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(IntegrityError, match=rf"is named \.{name[2:]} but is none: it starts with b'<html>40'"):
        resolve(name, root=tmp_path, cache=tmp_path / "cache")


def test_weights_that_were_cut_short_are_refused_before_anything_runs(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
    whole = len(header).to_bytes(8, "little") + header + b"x" * 64
    (tmp_path / "m.safetensors").write_bytes(whole)
    assert names("m.safetensors", tmp_path) == ["m.safetensors"]
    for broken in (
        whole[:-1],
        whole.replace(b'"data_offsets"', b'"data_offsetz"'),
        whole.replace(b"[0,64]", b"[0,{}]"),
    ):
        (tmp_path / "m.safetensors").write_bytes(broken)
        with pytest.raises(IntegrityError, match=r"m.safetensors is named .safetensors but is none"):
            names("m.safetensors", tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    # The rights themselves do not bind the superuser, as whom tests may run.
    monkeypatch.setattr("fmops.integrity.sha256", denied)
    with pytest.raises(FmopsError, match=r"a.txt cannot be read \(Permission denied\). Give yourself the right to"):
        names("a.txt", tmp_path)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    with pytest.raises(FmopsError, match=r"the folder 'docs' in .* holds no file"):
        names("docs", tmp_path)


def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(IntegrityError, match="or is cut short"):
        resolve("a.parquet", root=tmp_path, cache=tmp_path / "cache")
