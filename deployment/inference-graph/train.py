"""The classifier's weights: a thousand drawn pictures, one core, some seconds.

Enters: an output file. Leaves: safetensors, and the accuracy on pictures that it never saw.
Refuses: nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from predictor import SHAPES, SIDE, ShapeNet
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))
from shapes import pictures


def batch(number: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (number, 3, 32, 32) in 0…1 and the shapes' indices."""
    drawn = list(pictures(number, seed=seed))
    raw = b"".join(picture.image.tobytes() for picture in drawn)
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(number, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    return pixels / 255, torch.tensor([SHAPES.index(picture.shape) for picture in drawn])


def main(out: Path) -> None:
    """Train, measure, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ShapeNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pixels, shapes = batch(1008, seed=1)
    for _ in range(16):
        for rows in torch.randperm(len(pixels)).split(36):
            loss = torch.nn.functional.cross_entropy(model(pixels[rows]), shapes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    unseen, answers = batch(300, seed=2)
    with torch.inference_mode():
        right = int((model(unseen).argmax(dim=-1) == answers).sum())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out)
    print(f"accuracy {right / len(answers):.3f} (n = {len(answers)} unseen pictures); wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
