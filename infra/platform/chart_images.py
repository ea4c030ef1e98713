"""Notes the digest of every image that the outside charts run.

Enters: the folder of the platform with cluster.yaml and images.lock.yaml. Leaves: charts.lock.yaml on standard output.
Refuses: a chart that helm cannot render, an image that no registry has.

Charts are rendered as Argo CD renders them, at their pinned versions and with our values. An image is what stands under
a key `image`, and what looks like one elsewhere: operators name those that they start in arguments and variables.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from images import crane

REFERENCE = re.compile(r"(?<![\w./@-])(?:[a-z0-9-]+\.)+[a-z]{2,}(?::\d+)?(?:/[\w.-]+)+:(?=[\w.-]*\d)\w[\w.-]*(?![\w@])")
"""With a registry and a version; a URL's host follows a slash, so none is found."""


def helm(command: str, *arguments: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The objects that a chart renders."""
    called = [command, "template", *arguments, "--values", "-"]
    done = subprocess.run(called, input=json.dumps(values or {}), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"helm template {' '.join(arguments)}: {done.stderr.strip()}")
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def charts(command: str, platform: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and objects of each outside chart of the profile."""
    locks = [option for name in ("cluster", "images.lock") for option in ("--values", str(platform / f"{name}.yaml"))]
    git = {"git": {"repo": "none", "revision": "none"}}
    for application in helm(command, "apps", str(platform / "apps"), *locks, values=git):
        source = application["spec"].get("source", {})
        if "chart" not in source:
            continue
        # Helm names a registry of charts by its scheme, Argo CD without.
        place = ["--repo", source["repoURL"], source["chart"]]
        if "://" not in source["repoURL"]:
            place = [f"oci://{source['repoURL']}/{source['chart']}"]
        name, space = application["metadata"]["name"], application["spec"]["destination"]["namespace"]
        options = ["--version", source["targetRevision"], "--namespace", space]
        yield name, helm(command, name, *place, *options, values=source["helm"]["valuesObject"])


def images_of(objects: list[dict[str, Any]]) -> set[str]:
    """Every image that is named by a tag."""
    kinds = [each for each in objects if each["kind"] != "CustomResourceDefinition"]
    return {image for each in kinds for image in _named(each) if "@sha256:" not in image}


def _named(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "image" and isinstance(value, str) and value:
                yield value
            else:
                yield from _named(value)
    elif isinstance(part, list):
        for value in part:
            yield from _named(value)
    elif isinstance(part, str):
        yield from REFERENCE.findall(part)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: chart_images.py PLATFORM HELM")
    found: set[str] = set()
    for chart, objects in charts(sys.argv[2], Path(sys.argv[1])):
        its = images_of(objects)
        print(f"{chart}: {', '.join(sorted(its)) or 'no image by tag'}", file=sys.stderr)
        found |= its
    print(yaml.safe_dump({"chartImages": {image: crane("digest", image) for image in sorted(found)}}), end="")
