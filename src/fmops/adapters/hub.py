"""hf:// — models and data sets from a Hugging Face hub.

Enters: `hf://owner/name[@revision][/glob]` or `hf://datasets/owner/name[@revision][/glob]`. Leaves: a local snapshot.
Refuses: pickled weights and Python files of a model repository; no remote code is ever fetched.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx2  # the client of huggingface_hub: its errors come through unwrapped
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fmops.adapters.wheel import matches
from fmops.errors import FmopsError
from fmops.sources import Fetched, Report

# What a model consists of here. *.bin, *.pt and *.py are left where they are.
MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.txt", "*.jinja", "*.model", "*.md", "LICENSE*")
_ADDRESS = re.compile(
    r"^hf://(?P<datasets>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?$"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_hub(address: str, *, cache: Path, kept: Fetched | None, report: Report) -> Fetched:
    """Download a snapshot; a branch is asked for its newest commit each time.

    Raises:
        FmopsError: malformed address, no such repository, revision or file, a gated one, or no network.
    """
    match = _ADDRESS.match(address)
    if match is None:
        raise FmopsError(f"{address!r} is no hub address. Write hf://owner/name@revision, or hf://datasets/owner/name.")
    kind = "dataset" if match["datasets"] else "model"
    revision = match["revision"] or "main"
    try:
        commit, names = _listing(match["repo"], kind=kind, revision=revision)
    except _UNREACHABLE as error:
        if kept is None:
            raise _explained(error, address) from None
        report(f"{address}: the hub cannot be reached; using the copy fetched before ({kept.version[:12]})")
        return kept
    if kept is not None and kept.version == commit:
        return kept
    wanted = [name for name in names if _wanted(name, kind=kind, pattern=match["path"])]
    if not wanted:
        raise FmopsError(
            f"{address}: no file to take. The repository holds {', '.join(sorted(names)[:10]) or 'nothing'}; "
            f"of a model, only {', '.join(MODEL_FILES)} are fetched."
        )
    report(f"downloading {len(wanted)} files of {match['repo']} at {commit[:12]}")
    try:
        folder = Path(
            snapshot_download(
                match["repo"], repo_type=kind, revision=commit, cache_dir=cache / "hf", allow_patterns=wanted
            )
        )
    except _UNREACHABLE as error:
        raise _explained(error, address) from None
    files = {name: folder / name for name in sorted(wanted)}
    return Fetched(files=files, version=commit, pinned=_COMMIT.fullmatch(revision) is not None)


_UNREACHABLE = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError, OSError)


def _listing(repo: str, *, kind: str, revision: str) -> tuple[str, list[str]]:
    """The commit that the revision means now, and the files in it."""
    info = HfApi().repo_info(repo, repo_type=kind, revision=revision)
    return str(info.sha), [sibling.rfilename for sibling in info.siblings or []]


def _wanted(name: str, *, kind: str, pattern: str | None) -> bool:
    if kind == "model" and not any(matches(Path(name).name, allowed) for allowed in MODEL_FILES):
        return False
    if pattern is None:
        # Of a data set only what can be read as data; its loading script and card are none.
        return kind == "model" or Path(name).suffix in {".parquet", ".jsonl", ".json", ".txt", ".gz", ".zip"}
    return matches(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")


def _explained(error: Exception, address: str) -> FmopsError:
    if isinstance(error, GatedRepoError):
        return FmopsError(
            f"{address}: the repository is gated. Accept its terms on the hub, then log in with HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return FmopsError(f"{address}: no such revision. Name a branch, a tag or a commit of the repository.")
    if isinstance(error, RepositoryNotFoundError):
        return FmopsError(f"{address}: no such repository, or a private one. Check the name, or set HF_TOKEN.")
    return FmopsError(
        f"{address}: the hub cannot be reached ({type(error).__name__}: {error}). "
        "Check the network and HF_ENDPOINT, unset HF_HUB_OFFLINE, or name a local path."
    )
