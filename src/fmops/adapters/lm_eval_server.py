"""A model under evaluation behind a local OpenAI-compatible endpoint, for frameworks that ask by themselves.

Enters: a loaded model. Leaves: greedy answers to chats, on 127.0.0.1, while the block runs.
Refuses: everything but `GET /v1/models` and `POST /v1/chat/completions`. It serves one framework, no users.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

NAME = "candidate"
MOST_TOKENS = 256


@contextmanager
def served_locally(lm: LM) -> Iterator[str]:
    """The URL of an endpoint that answers with `lm`."""
    # One answer at a time: the model keeps its caches to itself.
    turn = threading.Lock()

    class Handler(_Handler):
        def answer(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
            with turn:
                text = lm.apply_chat_template(messages)
                answers: list[str] = lm.generate_until([Instance("generate_until", {}, (text, options), 0)])
            return answers[0]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def answer(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        raise NotImplementedError

    def do_GET(self) -> None:
        known = self.path.rstrip("/") in ("/v1", "/v1/models")
        self._send(200 if known else 404, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"{self.path}: only /v1/chat/completions is served"}})
            return
        stop = body.get("stop") or []
        most = body.get("max_tokens") or body.get("max_completion_tokens") or MOST_TOKENS
        options = {"max_gen_toks": int(most), "until": [stop] if isinstance(stop, str) else stop}
        messages = [{"role": turn["role"], "content": _text(turn["content"])} for turn in body["messages"]]
        message = {"role": "assistant", "content": self.answer(messages, options)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send(200, {"id": "local", "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """The stage reports its own progress."""


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
