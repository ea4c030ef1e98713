"""Copies the platform's images to its registry and notes the digest of each.

Enters: images.yaml, cluster.yaml. Leaves: images.lock.yaml on standard output; images in the registry (with `crane`).
Refuses: an image that no registry has, and one of ours that was never pushed.

Run `aws ecr get-login-password | crane auth login …` first. It never ran here: there is no registry without an account.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def crane(*arguments: str) -> str:
    done = subprocess.run(["crane", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"crane {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def lock(images: dict[str, dict[str, str]], registry: str) -> dict[str, Any]:
    """Tag and digest of each image, after its copy; our own are looked up by the newest tag."""
    locked = {}
    for name, image in images.items():
        target = f"{registry}/{name}"
        if source := image.get("from"):
            tag = source.rpartition(":")[2]
            # A tag of the registry is immutable: what is there already is what was copied.
            if tag not in crane("ls", target).split():
                crane("copy", source, f"{target}:{tag}")
        else:
            tags = crane("ls", target).split()
            if not tags:
                sys.exit(
                    f"{target} is empty. Build and push it first (see infra/README.md), with the commit as its tag."
                )
            tag = tags[-1]
        locked[name] = {"tag": tag, "digest": crane("digest", f"{target}:{tag}")}
    return {"images": locked}


if __name__ == "__main__":
    listed, cluster = (yaml.safe_load(Path(name).read_text()) for name in sys.argv[1:3])
    print(yaml.safe_dump(lock(listed["images"], cluster["cluster"]["registry"]), sort_keys=True), end="")
