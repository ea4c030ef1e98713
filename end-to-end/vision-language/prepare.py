"""A tiny vision-language model, conversations about pictures, and questions about others.

Enters: an empty folder. Leaves: `base/`, `conversations.jsonl` with `pictures/*.png`, `colour.jsonl`, `ground.jsonl`.
Refuses: a folder in use. Equal interpreters write equal files.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tiny_vlm import write_tiny_vlm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))
from shapes import COLOURS, GROUNDS, Picture, pictures

SHOWN, ASKED = 480, 96
QUESTIONS = {"colour": "What colour is it?", "ground": "Is the ground light or dark?"}
ANSWERS = {"colour": tuple(COLOURS), "ground": tuple(GROUNDS)}


def conversations(folder: Path) -> Iterable[dict[str, object]]:
    """Two dialogues a picture; the picture is a file beside them."""
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pictures(SHOWN, seed=1)):
        name = f"pictures/{number:03}.png"
        picture.image.save(folder / name)
        for kind, question in QUESTIONS.items():
            asked = [{"type": "image", "image": name}, {"type": "text", "text": question}]
            yield {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer(kind, picture)},
                ]
            }


def questions(kind: str) -> Iterable[dict[str, object]]:
    """Items of the suite: each holds its picture, so that the pinned file is whole."""
    for picture in pictures(ASKED, seed=2):
        yield {
            "picture": url_of(picture),
            "choices": ANSWERS[kind],
            "label": ANSWERS[kind].index(answer(kind, picture)),
        }


def answer(kind: str, picture: Picture) -> str:
    """What is right."""
    return str(getattr(picture, kind))


def url_of(picture: Picture) -> str:
    """A picture as a data URL."""
    held = io.BytesIO()
    picture.image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def main(folder: Path) -> None:
    """Write everything."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is not empty. Remove it, or name another folder.")
    write_tiny_vlm(folder / "base")
    for name, rows in {"conversations": conversations(folder), **{kind: questions(kind) for kind in QUESTIONS}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {folder}: {SHOWN} pictures, two conversations each; {ASKED} questions of a kind about others")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
