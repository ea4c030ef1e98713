"""Copies the platform's images to its registry and notes the digest of each.

Enters: images.yaml, cluster.yaml, the tag of the images that we build.
Leaves: images.lock.yaml on standard output; images in the registry (with `crane`).
Refuses: an image that no registry has, and one of ours that was never pushed.

Run `aws ecr get-login-password | crane auth login …` first.
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


def lock(images: dict[str, dict[str, str]], registry: str, ours: str) -> dict[str, Any]:
    """Tag and digest of each image, after its copy; `ours` is the tag of those that we build."""
    locked = {}
    for name, image in images.items():
        target = f"{registry}/{name}"
        source = image.get("from")
        tag = source.rpartition(":")[2] if source else ours
        # A tag of the registry is immutable: what is there already is what was copied.
        if tag not in crane("ls", target).split():
            if not source:
                sys.exit(f"{target}:{tag} is not there. Build and push it first (see infra/README.md).")
            crane("copy", source, f"{target}:{tag}")
        locked[name] = {"tag": tag, "digest": crane("digest", f"{target}:{tag}")}
    return {"images": locked}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: images.py images.yaml cluster.yaml TAG (of the images that we build)")
    listed, cluster = (yaml.safe_load(Path(name).read_text()) for name in sys.argv[1:3])
    locked = lock(listed["images"], cluster["cluster"]["registry"], sys.argv[3])
    print(yaml.safe_dump(locked, sort_keys=True), end="")
