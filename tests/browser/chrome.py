"""A headless Chromium, spoken to through its DevTools protocol.

Enters: a page's URL. Leaves: what JavaScript returns there, keys and clicks as a person gives them, pictures.
Refuses: to outlive the test; it ends its own process.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0",
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}


class Chrome:
    """One browser process."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        self._process = subprocess.Popen(
            [BROWSER, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        line = next(line for line in self._process.stderr if "DevTools listening on" in line)
        self._open = ExitStack()
        self._socket = self._open.enter_context(connect(line.split()[-1], max_size=None))
        self._numbers = itertools.count(1)

    def __enter__(self) -> Chrome:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def send(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events are passed over."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """A page with cookies of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, context, session)
        page.send("Page.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Page.navigate", url=url)
        return page


class Page:
    """One tab."""

    def __init__(self, chrome: Chrome, context: str, session: str) -> None:
        self._chrome, self._context, self._session = chrome, context, session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._chrome.send(method, session=self._session, **parameters)

    def close(self) -> None:
        self._chrome.send("Target.disposeBrowserContext", browserContextId=self._context)

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of an expression; promises are awaited."""
        done = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str, *, most_s: float = 20) -> Any:
        """Wait, looking at each frame, until an expression is true."""
        found = self.run(
            "new Promise((done) => { const end = performance.now() + " + str(most_s * 1000) + ";"
            "const look = () => { let value; try { value = (" + condition + "); } catch { value = null; }"
            "if (value) done({value}); else if (performance.now() > end) done(null); else setTimeout(look, 15); };"
            "look(); })"
        )
        assert found, f"never: {condition}\n{self.text()[:3000]}"
        return found["value"]

    def text(self, selector: str = "body") -> str:
        """What a person reads there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """With the mouse, where the element is."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code = KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "keyDown" if text else "rawKeyDown", **({"text": text} if text else {})}
        for event in (down, {"type": "keyUp"}):
            self.send(
                "Input.dispatchKeyEvent", key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0, **event,
            )  # fmt: skip

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
