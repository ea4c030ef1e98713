"""Show a served model pictures that it never saw, as a client of OpenAI's API does, and count what it gets right.

Enters: the URL of an endpoint up to /v1. Leaves: the share that is right, exit code 0 or 1. Refuses: nothing.
"""

from __future__ import annotations

import sys

from openai import OpenAI
from prepare import QUESTIONS, answer, url_of
from shapes import pictures

ASKED, AT_LEAST = 24, 0.75


def main(url: str) -> int:
    """Ask both questions about each picture."""
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    right = 0
    for picture in pictures(ASKED, seed=3):
        for kind, question in QUESTIONS.items():
            shown = [
                {"type": "image_url", "image_url": {"url": url_of(picture)}},
                {"type": "text", "text": question},
            ]
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": shown}], temperature=0, max_tokens=8
            )
            right += reply.choices[0].message.content == answer(kind, picture)
    share = right / (2 * ASKED)
    print(f"{share:.3f} right (n = {2 * ASKED}, at least {AT_LEAST})")
    return 0 if share >= AT_LEAST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
