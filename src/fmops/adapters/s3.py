"""boto3: one bucket, with conditional writes, uploads that go on where they broke, and errors that name the remedy.

Enters: an address s3://bucket/prefix; objects by their name below it. Leaves: bytes, versions (ETags), local files.
Refuses: to write over what the caller has not seen; it deletes nothing, and needs no right to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from fmops.errors import FmopsError
from fmops.faults import fault_site
from fmops.store import write_atomically

PART_BYTES = 16 * 1024 * 1024
PARTS_AT_ONCE = 8
MOST_PARTS = 9_000
"""S3 takes 10,000; a file of any size that S3 takes fits."""
ATTEMPTS = 8
GONE = ("404", "NoSuchKey")
LOST = ("412", "PreconditionFailed")
RIGHTS = "Give this identity s3:GetObject, s3:PutObject and s3:ListBucket there, and the use of its KMS key."
REGION = "It lies in another region: set AWS_REGION to that one."
REMEDIES = {
    "AccessDenied": RIGHTS,
    "403": RIGHTS,
    "NoSuchBucket": "Check the name, or make the bucket first; a store never makes one.",
    "301": REGION,
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "RequestTimeTooSkewed": "This machine's clock is wrong by more than 15 minutes: set it (`timedatectl set-ntp 1`).",
    "ExpiredToken": "The credentials have expired: log in again.",
    "InvalidAccessKeyId": "The credentials are not known there: check AWS_PROFILE and AWS_ACCESS_KEY_ID.",
    "SignatureDoesNotMatch": "The secret key does not fit the access key: check the credentials.",
    "NotImplemented": "This store knows no conditional writes, without which two writers overwrite each other.",
}
LATER = "It answers again later: what is done is kept, run again then."
BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeoutException", "InternalError")


class Moved(Exception):
    """An object is not what the caller saw: somebody wrote it meanwhile."""


@dataclass(frozen=True)
class Object:
    """One object in a listing; `version` changes with each write."""

    name: str
    bytes: int
    version: str
    modified: str = field(compare=False)
    """UTC, by the store's own clock."""


class Bucket:
    """Objects under one prefix. Safe for threads."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        if not self._bucket:
            raise FmopsError(f"{address!r} names no bucket. Write s3://bucket/prefix.")
        attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=2 * PARTS_AT_ONCE,
        )
        with self._said("open"):
            self._client = boto3.client("s3", config=config)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Content and version of an object; None when there is none."""
        try:
            with self._said(f"read {name}"):
                found = self._client.get_object(**self._at(name))
                return found["Body"].read(), found["ETag"]
        except _Gone:
            return None

    def write(self, name: str, content: bytes, *, seen: str | None) -> None:
        """Write an object if it still has the version `seen`; None: if there is none.

        Raises:
            Moved: it has another one by now.
        """
        condition = {"IfMatch": seen} if seen else {"IfNoneMatch": "*"}
        for attempt in range(ATTEMPTS):
            try:
                with self._said(f"write {name}"):
                    self._client.put_object(**self._at(name), Body=content, **condition)
                return
            except _Conflict:
                # Another conditional write was under way: S3 asks to try again.
                time.sleep(min(0.05 * 2**attempt, 2.0))
            except (_Lost, _Gone):
                # The answer to a write that had succeeded may have been lost, and the write repeated.
                now = self.read(name)
                if now is None or now[0] != content:
                    raise Moved(name) from None
                return
        raise FmopsError(f"{self.address}/{name} is written by others all the time. {LATER}")

    def replace(self, name: str, content: bytes) -> None:
        """Write an object whatever is there."""
        with self._said(f"write {name}"):
            self._client.put_object(**self._at(name), Body=content)

    def list(self, prefix: str) -> Iterator[Object]:
        """Every object whose name starts so, as of now, in name order."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._said(f"list {prefix}"):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for found in page.get("Contents", ()):
                    yield Object(
                        name=found["Key"].removeprefix(self._prefix),
                        bytes=found["Size"],
                        version=found["ETag"],
                        modified=found["LastModified"].isoformat(),
                    )

    def copy(self, source: str, target: str) -> bool:
        """Copy inside the store, without a download; False when there is no such object."""
        try:
            with self._said(f"copy {source}"):
                self._client.copy(self._at(source), **self._at(target))
        except _Gone:
            return False
        return True

    def download(self, name: str, path: Path) -> bool:
        """Fetch an object in parallel parts; the file appears whole or not. False when there is no such object."""
        config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._said(f"read {name}"):
                self._client.download_file(**self._at(name), Filename=str(path), Config=config)
        except _Gone:
            return False
        return True

    def upload(self, path: Path, name: str, *, sha256: str, memory: Path) -> None:
        """Bring a file there, unless its very bytes are there; S3 compares each part with its digest.

        Args:
            sha256: of the file, hexadecimal.
            memory: folder that remembers the parts that are there, so that a killed upload goes on.
        """
        size = path.stat().st_size
        if size <= PART_BYTES:
            digest = base64.b64encode(bytes.fromhex(sha256)).decode()
            if self._checksum(name) != digest:
                with self._said(f"write {name}"):
                    self._client.put_object(
                        **self._at(name), Body=path.read_bytes(), ChecksumAlgorithm="SHA256", ChecksumSHA256=digest
                    )
            return
        upload = _Upload.of(path, size)
        if self._checksum(name) == upload.whole:
            return
        begun = memory / f"{sha256}.json"
        try:
            self._in_parts(upload, name, begun)
        except _Gone:
            begun.unlink()
            raise FmopsError(
                f"cannot write {name} in {self.address}: its upload was aborted there. Run again; it begins anew."
            ) from None

    def _in_parts(self, upload: _Upload, name: str, memory: Path) -> None:
        """Send what is missing, then make the object appear. A part that is there is known by digest and version."""
        there = self._parts_there(name, memory)
        if there is None:
            with self._said(f"write {name}"):
                begun = self._client.create_multipart_upload(**self._at(name), ChecksumAlgorithm="SHA256")
            there = {"id": begun["UploadId"], "parts": {}}
            write_atomically(memory, json.dumps(there))

        def send(number: int) -> dict[str, Any]:
            digest = upload.digests[number - 1]
            known = there["parts"].get(str(number))
            if known is None or known[1] != digest:
                with self._said(f"write {name}"):
                    sent = self._client.upload_part(
                        **self._at(name), UploadId=there["id"], PartNumber=number, Body=upload.part(number),
                        ChecksumAlgorithm="SHA256", ChecksumSHA256=digest,
                    )  # fmt: skip
                known = [sent["ETag"], digest]
            return {"PartNumber": number, "ETag": known[0], "ChecksumSHA256": digest}

        done = []
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            for part in pool.map(send, range(1, len(upload.digests) + 1)):
                done.append(part)
                there["parts"][str(part["PartNumber"])] = [part["ETag"], part["ChecksumSHA256"]]
                write_atomically(memory, json.dumps(there))
                fault_site("upload-after-part")
        with self._said(f"write {name}"):
            self._client.complete_multipart_upload(
                **self._at(name), UploadId=there["id"], MultipartUpload={"Parts": done}
            )

    def _parts_there(self, name: str, memory: Path) -> dict[str, Any] | None:
        """The upload that was begun and what of it the store still has; None when there is nothing to go on with."""
        if not memory.is_file():
            return None
        begun: dict[str, Any] = json.loads(memory.read_bytes())
        pages = self._client.get_paginator("list_parts").paginate(**self._at(name), UploadId=begun["id"])
        try:
            with self._said(f"look at {name}"):
                versions = {str(part["PartNumber"]): part["ETag"] for page in pages for part in page.get("Parts", ())}
        except _Gone:
            return None
        known = {number: part for number, part in begun["parts"].items() if versions.get(number) == part[0]}
        return {"id": begun["id"], "parts": known}

    def _checksum(self, name: str) -> str | None:
        """The SHA-256 that S3 keeps of an object, of its parts' digests where it came in parts; None: no such one."""
        try:
            with self._said(f"read {name}"):
                found = self._client.head_object(**self._at(name), ChecksumMode="ENABLED")
        except _Gone:
            return None
        checksum: str = found.get("ChecksumSHA256", "")
        return checksum.partition("-")[0]

    def outside(self, name: str) -> str:
        """A name from the bucket's root on; `{prefix}` in it is ours. The bucket's own rules go by such names."""
        return "/" + name.replace("{prefix}", self._prefix)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": name[1:] if name.startswith("/") else self._prefix + name}

    @contextmanager
    def _said(self, doing: str) -> Iterator[None]:
        """What went wrong, with the address and the remedy."""
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in (*GONE, "NoSuchUpload"):
                raise _Gone from None
            if code in LOST:
                raise _Lost from None
            if code == "ConditionalRequestConflict":
                raise _Conflict from None
            raise FmopsError(f"cannot {doing} in {self.address}: {code}. {_remedy(code, error.response)}") from None
        except NoCredentialsError:
            raise FmopsError(
                f"cannot {doing} in {self.address}: no credentials. Log in (`aws sso login`), or set AWS_PROFILE."
            ) from None
        except (BotoCoreError, OSError) as error:
            raise FmopsError(f"cannot {doing} in {self.address}: {error}. {LATER}") from None


class _Gone(Exception):
    """There is no such object."""


class _Lost(Exception):
    """The condition of a write does not hold."""


class _Conflict(Exception):
    """Two conditional writes met."""


@dataclass(frozen=True)
class _Upload:
    """A file in parts of equal size, the last one shorter."""

    path: Path
    part_bytes: int
    digests: tuple[str, ...]
    """SHA-256 of each part, as S3 writes it."""

    @classmethod
    def of(cls, path: Path, size: int) -> _Upload:
        mebibyte = 1024 * 1024
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS // mebibyte) * mebibyte)
        with path.open("rb") as file:
            parts = iter(lambda: file.read(part_bytes), b"")
            return cls(path, part_bytes, tuple(_base64(hashlib.sha256(part).digest()) for part in parts))

    @property
    def whole(self) -> str:
        """What S3 keeps of the whole: the digest of the parts' digests."""
        return _base64(hashlib.sha256(b"".join(base64.b64decode(digest) for digest in self.digests)).digest())

    def part(self, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek((number - 1) * self.part_bytes)
            return file.read(self.part_bytes)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _remedy(code: str, response: Mapping[str, Any]) -> str:
    """What helps, else what S3 itself says; with the request's id, by which AWS finds it."""
    facts = response.get("ResponseMetadata", {})
    passing = code in BUSY or int(facts.get("HTTPStatusCode", 0)) >= 500
    text = REMEDIES.get(code) or (LATER if passing else str(response.get("Error", {}).get("Message", "")))
    return f"{text} (request {facts['RequestId']})" if facts.get("RequestId") else text
