"""The steps of the inference graph refuse what they cannot answer, with a reason, and keep the pictures in order."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

CASE = Path(__file__).resolve().parents[2] / "deployment/inference-graph"


@pytest.fixture(scope="module")
def predictor():
    place = importlib.util.spec_from_file_location("picture_predictor", CASE / "predictor.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(predictor, tmp_path_factory):
    from safetensors.torch import save_file

    weights = tmp_path_factory.mktemp("shapes") / "shapes.safetensors"
    save_file(predictor.ShapeNet().state_dict(), weights)
    return TestClient(predictor.build_app("shapes", predictor.classifier(weights)))


@pytest.fixture
def images(predictor):
    return TestClient(predictor.build_app("images", predictor.decode))


def instance(picture, form="PNG"):
    held = io.BytesIO()
    picture.save(held, form)
    return {"b64": base64.b64encode(held.getvalue()).decode()}


def test_pixels_come_channel_by_channel_in_the_order_of_the_pictures(images):
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ((200, 0, 0), (0, 0, 100))]
    answer = images.post("/v1/models/images:predict", json={"instances": [instance(each) for each in pictures]})
    first, second = answer.json()["predictions"]
    assert [channel[0][0] for channel in first] == [200, 0, 0]
    assert [channel[31][31] for channel in second] == [0, 0, 100]


def test_what_one_step_says_the_next_one_reads(images, shapes):
    pixels = images.post("/v1/models/images:predict", json={"instances": [instance(Image.new("RGB", (9, 9)), "JPEG")]})
    [found] = shapes.post("/v1/models/shapes:predict", json={"instances": pixels.json()["predictions"]}).json()[
        "predictions"
    ]
    assert found["shape"] in ("circle", "square", "triangle")
    assert 1 / 3 <= found["probability"] <= 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "the body is JSON of the form"),
        (b"[1]", "the body is JSON of the form"),
        (b"[" * 100_000, "the body is JSON of the form"),
        (json.dumps({"instances": []}).encode(), "a list of 1 to 64"),
        (json.dumps({"instances": ["x"] * 65}).encode(), "a list of 1 to 64"),
        (json.dumps({"instances": [{"b64": "no base64!"}]}).encode(), "a PNG or JPEG file in base64"),
        (json.dumps({"instances": [{"b64": "AAAA"}]}).encode(), "no PNG or JPEG file"),
        (json.dumps({"instances": [instance(Image.new("RGB", (4, 4)), "GIF")]}).encode(), "no PNG or JPEG file"),
        (json.dumps({"instances": [instance(Image.new("1", (5000, 5000)))]}).encode(), "5000 × 5000 is too large"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(images, body, reason):
    answer = images.post("/v1/models/images:predict", content=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_a_body_above_four_megabytes_is_refused_before_it_is_read(images):
    answer = images.post("/v1/models/images:predict", content=b" " * (2**22 + 1))
    assert (answer.status_code, answer.json()["error"]) == (413, "a body has at most 4,194,304 bytes")


@pytest.mark.parametrize("instances", [[1], [[[1]]], ["x"], [[[[0] * 32] * 32] * 3, [1]]])
def test_a_tensor_of_another_shape_is_refused(shapes, instances):
    answer = shapes.post("/v1/models/shapes:predict", json={"instances": instances})
    assert answer.status_code == 400
    assert "a tensor of 3 × 32 × 32" in answer.json()["error"]


def test_a_step_says_when_it_is_ready(images):
    assert images.get("/v1/models/images").json() == {"name": "images", "ready": True}
