"""The store on S3 against boto3's own transfers: megabytes a second and CPU seconds a gigabyte, up and down.

Enters: an address (AWS_ENDPOINT_URL names a server other than S3), a size. Leaves: a line an arm; JSON.
Refuses: to compare moments: arms take turns in one process (A B A B), and CPU is this process's own.

    python -m benchmarks.store s3://bucket/prefix [--megabytes 256] [--rounds 3] [--out FILE.json]

Ours hashes what it sends, part by part, and reads again what it fetched; boto3 alone does neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3

from fmops.adapters.s3 import Bucket
from fmops.integrity import sha256


def measured(work: Callable[[], None], *, megabytes: int) -> dict[str, float]:
    """Wall and CPU of one transfer."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"megabytes_per_second": megabytes / wall, "cpu_seconds_per_gigabyte": cpu * 1000 / megabytes}


def arms(bucket: Bucket, folder: Path) -> dict[str, Callable[[int], None]]:
    """Each transfer by its name, given the number of the round: nothing may be there already."""
    client = boto3.client("s3")
    name, _, prefix = bucket.address.removeprefix("s3://").partition("/")
    source = folder / "weights"

    def up(number: int) -> None:
        bucket.upload(source, f"bench/{number}", sha256=sha256(source), memory=folder / "memory")

    def down(number: int) -> None:
        target = folder / "fetched"
        bucket.download(f"bench/{number}", target)
        assert sha256(target) == sha256(source)

    def boto_up(number: int) -> None:
        client.upload_file(str(source), name, f"{prefix}/bench/boto/{number}")

    def boto_down(number: int) -> None:
        client.download_file(name, f"{prefix}/bench/boto/{number}", str(folder / "fetched"))

    def hashed(number: int) -> None:
        sha256(source)

    return {"up": up, "up_boto3": boto_up, "down": down, "down_boto3": boto_down, "sha256": hashed}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "weights").open("wb") as file:
            for _ in range(options.megabytes):
                file.write(os.urandom(1_000_000))
        todo = arms(Bucket(options.address), folder)
        rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in todo}
        for number in range(options.rounds):
            for arm, work in todo.items():
                rounds[arm].append(measured(lambda work=work, n=number: work(n), megabytes=options.megabytes))
    found = {
        arm: {
            unit: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for unit in each[0]
            if (values := [one[unit] for one in each])
        }
        for arm, each in rounds.items()
    }
    for arm, units in found.items():
        print(arm, *(f"{unit} {v['median']:.1f} ({v['low']:.1f}–{v['high']:.1f})" for unit, v in units.items()))
    if options.out:
        result = {"megabytes": options.megabytes, "rounds": options.rounds, "arms": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
