"""Walk the graph as KServe's router does, over HTTP, and count what it gets right.

Enters: graph.yaml, and where each service answers (`images=http://…`).
Leaves: the accuracy on unseen pictures, exit code 0 or 1.
Refuses: a graph with other steps than a sequence of services.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))
from shapes import pictures

ASKED, AT_LEAST = 60, 0.85
GRAPH = Path(__file__).with_name("graph.yaml")


def walk(request: Any, at: dict[str, str]) -> tuple[int, Any]:
    """The graph's answer to one request: each step's status and body go on as the manifest says."""
    graph = next(each for each in yaml.safe_load_all(GRAPH.read_text()) if each["kind"] == "InferenceGraph")
    [root] = graph["spec"]["nodes"].values()
    if root["routerType"] != "Sequence":
        raise SystemExit(f"error: {root['routerType']} is not played here; a Sequence is.")
    status, answer = 200, request
    for step in root["steps"]:
        body = request if step["data"] == "$request" else answer
        if step.get("mapPredictionsToInstances"):
            body = {"instances": body["predictions"]}
        status, answer = post(f"{at[step['serviceName']]}/v1/models/{step['serviceName']}:predict", body)
        if status != 200:
            break
    return status, answer


def post(url: str, body: Any) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def file_of(picture: Any) -> dict[str, str]:
    """An instance for the first step: a PNG file in base64."""
    held = io.BytesIO()
    picture.resize((96, 96)).save(held, "PNG")
    return {"b64": base64.b64encode(held.getvalue()).decode()}


def main(*places: str) -> int:
    """Ask about unseen pictures, and once about what is none."""
    at = dict(place.split("=", 1) for place in places)
    drawn = list(pictures(ASKED, seed=3))
    status, answer = walk({"instances": [file_of(picture.image) for picture in drawn]}, at)
    assert status == 200, answer
    found = [each["shape"] for each in answer["predictions"]]
    accuracy = sum(shape == picture.shape for shape, picture in zip(found, drawn, strict=True)) / ASKED
    print(f"accuracy {accuracy:.3f} (n = {ASKED}, at least {AT_LEAST})")
    status, answer = walk({"instances": [{"b64": base64.b64encode(b"no picture").decode()}]}, at)
    print(f"what is no picture: {status} {answer['error']}")
    return 0 if accuracy >= AT_LEAST and status == 400 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
