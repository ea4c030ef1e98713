"""Users of a chat endpoint, for locust: questions of several lengths, streamed; time to the first token and to the end.

Enters: `--host` of an OpenAI-compatible server. Leaves: locust's statistics, with two lines of our own a question.
Refuses: a stream that ends without [DONE]: it counts as a failure, whatever its status.
"""

from __future__ import annotations

import json
import time

from locust import HttpUser, constant_pacing, events, task

QUESTIONS = (
    "What is a list?",
    "Explain in two sentences how a dictionary differs from a list, and when to take which.",
    "Here is a text. " + "A function returns a value to its caller. " * 12 + "Summarise it in one sentence.",
)
MOST_TOKENS = 24


class Reader(HttpUser):
    """Asks one question a second at most, and waits for the end of the answer."""

    wait_time = constant_pacing(1)
    asked = 0

    def on_start(self) -> None:
        self.model = self.client.get("/v1/models", name="models").json()["data"][0]["id"]

    @task
    def ask(self) -> None:
        question = QUESTIONS[self.asked % len(QUESTIONS)]
        self.asked += 1
        body = {
            "model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": MOST_TOKENS,
            "temperature": 0, "stream": True,
        }  # fmt: skip
        started, first, done, tokens = time.perf_counter(), None, False, 0
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name="stream opened", catch_response=True
        ) as response:
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    done = True
                elif line.startswith(b"data: "):
                    piece = json.loads(line.removeprefix(b"data: "))
                    if any(choice["delta"].get("content") for choice in piece["choices"]):
                        first = first or time.perf_counter()
                        tokens += 1
            if response.status_code != 200 or not done:
                response.failure(f"status {response.status_code}, ended {'whole' if done else 'early'}")
                return
        ended = time.perf_counter()
        if first is not None:
            self._report("first token", first - started, tokens)
        self._report("whole answer", ended - started, tokens)

    def _report(self, name: str, seconds: float, tokens: int) -> None:
        events.request.fire(
            request_type="CHAT", name=name, response_time=1000 * seconds, response_length=tokens, exception=None
        )
