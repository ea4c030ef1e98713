"""An engine that answers at once with what the test says: a real server on a socket, without a model.

Enters: a port and a release (`python tests/fake_engine.py PORT RELEASE [tokens] [seconds a token] [together]`), or
`FakeEngine`.
Leaves: OpenAI-shaped answers whose text names the release. Marks in the prompt make it misbehave (see `MARKS`).
Refuses: nothing.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading

MARKS = {
    "[break]": "hangs up in the middle of the answer",
    "[cut]": "ends a stream cleanly, but without [DONE]",
    "[wait]": "stops in the middle until `release_all`",
    "[500]": "fails before it answers",
    "[503]": "is draining",
    "[429]": "is full",
    "[imposter]": "says that it is another release",
}


class FakeEngine:
    """Serves from a thread of its own; `seen` are the bodies it got, `left` counts clients that hung up early."""

    def __init__(
        self, release: str, *, port: int = 0, tokens: int = 4, token_s: float = 0.0, together: bool = False
    ) -> None:  # fmt: skip
        self.release, self._tokens, self._token_s, self._together = release, tokens, token_s, together
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.seen: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.left = 0
        self.words: list[str] | None = None
        """What it says instead of its release's name."""
        self.slots: int | None = None
        """As many as it says it advances at once; it refuses more than five times as many, like ours."""
        self.inside = self.most_inside = 0
        self.draining = False
        """Like [503] in every prompt."""
        self.waiting = threading.Semaphore(0)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *problem: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def release_all(self) -> None:
        """Let every answer that waits go on."""
        self._loop.call_soon_threadsafe(self._go.set)

    async def serve(self) -> None:
        self._loop, self._stop, self._go = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._talk, sock=self._socket)
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n"):
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                if head[0].startswith("POST"):
                    self.seen.append(body)
                    self.headers.append(headers)
                if not await self._answer(head[0].split()[1], body, headers, reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path, body, headers, reader, writer) -> bool:
        """Write one answer; False closes the connection."""
        text = json.dumps(body)
        if path == "/health":
            return _whole(writer, 200, {"status": "ok", "release": self.release}, self.release)
        if self.slots and self.inside >= 5 * self.slots:
            error = {"error": {"message": "full", "type": "x", "param": None, "code": "overloaded"}}
            return _whole(writer, 429, error, self.release, slots=self.slots)
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        try:
            return await self._say(path, body, text, headers, reader, writer)
        finally:
            self.inside -= 1

    async def _say(self, path, body, text, headers, reader, writer) -> bool:
        for status in (429, 500, 503):
            if f"[{status}]" in text or (status == 503 and self.draining):
                error = {"error": {"message": f"scripted {status}", "type": "x", "param": None, "code": "scripted"}}
                return _whole(writer, status, error, self.release)
        release = "somebody-else" if "[imposter]" in text else self.release
        chat = path.endswith("chat/completions")
        frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{headers['x-request-id']}",
            "created": 1,
            "model": "m",
            "system_fingerprint": self.release,
        }
        words = self.words or [f"{self.release} ", *("x" for _ in range(self._tokens - 1))]
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "mean_logprob": -0.5}
        if not body.get("stream"):
            if "[break]" in text:
                return False
            await self._pause(text, reader)
            said = {"message": {"role": "assistant", "content": "".join(words)}} if chat else {"text": "".join(words)}
            choice = {"index": 0, **said, "finish_reason": "stop"}
            return _whole(writer, 200, {**frame, "choices": [choice], "usage": usage}, release, slots=self.slots)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            + (b"x-fmops-slots: %d\r\n" % self.slots if self.slots else b"")
            + b"x-fmops-release: "
            + release.encode()
            + b"\r\n\r\n"
        )
        for number, word in enumerate(words):
            said = {"delta": {"content": word}} if chat else {"text": word}
            finish = "stop" if number == len(words) - 1 else None
            _chunk(writer, {**frame, "choices": [{"index": 0, **said, "finish_reason": finish}]})
            await asyncio.sleep(self._until_next())
            if number == 1:
                if "[break]" in text:
                    return False
                if "[cut]" in text:
                    writer.write(b"0\r\n\r\n")
                    return True
                if not await self._pause(text, reader):
                    return False
        _chunk(writer, {**frame, "choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return True

    def _until_next(self) -> float:
        """Seconds to the next token: to one of this answer, or to the step that advances all answers together."""
        return self._token_s - self._loop.time() % self._token_s if self._together else self._token_s

    async def _pause(self, text: str, reader: asyncio.StreamReader) -> bool:
        """Wait where the test asks for it; False when the client hangs up meanwhile."""
        if "[wait]" not in text:
            return True
        self.waiting.release()
        gone, go = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(self._go.wait())
        await asyncio.wait({gone, go}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.left += 1
            return False
        gone.cancel()
        await asyncio.wait({gone})
        return True


def _whole(writer, status: int, value: dict, release: str, *, slots: int | None = None) -> bool:
    body = json.dumps(value).encode()
    wait = b"retry-after: 3\r\n" if status in (429, 503) else b""
    wait += b"x-fmops-slots: %d\r\n" % slots if slots else b""
    writer.write(
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sx-fmops-release: %s\r\n\r\n%s"
        % (status, len(body), wait, release.encode(), body)
    )
    return True


def _chunk(writer, value: dict) -> None:
    event = b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


if __name__ == "__main__":
    port, release, *rest = sys.argv[1:]
    tokens, token_s = (int(rest[0]) if rest else 4), (float(rest[1]) if len(rest) > 1 else 0.0)
    engine = FakeEngine(release, port=int(port), tokens=tokens, token_s=token_s, together="together" in rest)
    asyncio.run(engine.serve())
