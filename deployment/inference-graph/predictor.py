"""One step of the graph as a process: KServe's V1 protocol over HTTP, `images` or `shapes`.

Enters: `POST /v1/models/NAME:predict` with {"instances": […]}. Leaves: {"predictions": […]}, one an instance, in order.
Refuses: bodies above 4 MB, what is no PNG or JPEG, large pictures, tensors of another shape; each with a reason.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

SIDE = 32
SHAPES = ("circle", "square", "triangle")
MOST_BYTES = 4 * 2**20
MOST_INSTANCES = 64
MOST_PIXELS = 4096 * 4096
"""A small file can unpack to gigabytes; its size is read before its pixels are."""

Predict = Callable[[list[Any]], list[Any]]


class Unfit(ValueError):
    """What the client sent cannot be answered; the text says why."""


class ShapeNet(torch.nn.Module):
    """Two convolutions and a linear layer: (batch, 3, 32, 32) in 0…1 → (batch, 3) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(32 * (SIDE // 4) ** 2, len(SHAPES)),
        )  # fmt: skip

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


def decode(instances: list[Any]) -> list[Any]:
    """Files in base64 → pixels as nested lists (3, 32, 32), 0 to 255."""
    return [_pixels(instance) for instance in instances]


def _pixels(instance: Any) -> Any:
    try:
        file = base64.b64decode(instance["b64"], validate=True)
        picture = Image.open(io.BytesIO(file), formats=("PNG", "JPEG"))
        if picture.width * picture.height > MOST_PIXELS:
            raise Unfit(f"a picture of {picture.width} × {picture.height} is too large")
        small = picture.convert("RGB").resize((SIDE, SIDE))
    except (TypeError, KeyError, binascii.Error):
        raise Unfit('an instance is {"b64": "a PNG or JPEG file in base64"}') from None
    except (UnidentifiedImageError, OSError) as error:
        raise Unfit(f"no PNG or JPEG file: {error}") from None
    flat = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return flat.reshape(SIDE, SIDE, 3).permute(2, 0, 1).tolist()


def classifier(weights: Path) -> Predict:
    """Pixels → the likeliest shape and its probability."""
    model = ShapeNet()
    model.load_state_dict(load_file(weights))
    model.eval()

    def predict(instances: list[Any]) -> list[Any]:
        try:
            pixels = torch.tensor(instances, dtype=torch.float32)
        except (ValueError, TypeError):
            pixels = torch.empty(0)
        if pixels.shape[1:] != (3, SIDE, SIDE):
            raise Unfit(f"an instance is a tensor of 3 × {SIDE} × {SIDE}, 0 to 255")
        with torch.inference_mode():
            found = torch.softmax(model(pixels / 255), dim=-1).max(dim=-1)
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [{"shape": SHAPES[index], "probability": round(value, 4)} for index, value in pairs]

    return predict


def build_app(name: str, predict: Predict) -> Starlette:
    """The protocol's routes for one model."""

    async def answer(request: Request) -> JSONResponse:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"a body has at most {MOST_BYTES:,} bytes"}, 413)
        try:
            instances = json.loads(body)["instances"]
            if not isinstance(instances, list) or not 1 <= len(instances) <= MOST_INSTANCES:
                raise Unfit(f'"instances" is a list of 1 to {MOST_INSTANCES}')
            return JSONResponse({"predictions": predict(instances)})
        except Unfit as reason:
            return JSONResponse({"error": str(reason)}, 400)
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": 'the body is JSON of the form {"instances": […]}'}, 400)

    async def ready(request: Request) -> JSONResponse:
        return JSONResponse({"name": name, "ready": True})

    return Starlette(
        routes=[Route(f"/v1/models/{name}:predict", answer, methods=["POST"]), Route(f"/v1/models/{name}", ready)]
    )


def main() -> None:
    """Serve one model until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["images", "shapes"])
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--weights", type=Path, default=Path("/mnt/models/shapes.safetensors"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    predict = decode if options.name == "images" else classifier(options.weights)
    uvicorn.run(build_app(options.name, predict), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
