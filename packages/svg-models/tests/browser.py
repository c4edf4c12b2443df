"""A headless Chromium, driven by DevTools commands over a pipe; nothing to install beside it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Browser", "find_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 60.0


def find_browser() -> str | None:
    """Return the path of a Chromium, or None if there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def _pipe(theirs: int) -> tuple[int, int]:
    """Return an end of a pipe for the browser, at a high number, and our own end."""
    ends = os.pipe()
    high = fcntl.fcntl(ends[theirs], fcntl.F_DUPFD, 20)
    os.close(ends[theirs])
    return high, ends[1 - theirs]


class Browser:
    """One page of a headless browser, and what its console said.

    Args:
        folder: for its profile.

    Attributes:
        complaints: errors and exceptions of the page, in order.
    """

    def __init__(self, folder: Path) -> None:
        program = find_browser()
        assert program is not None
        theirs_in, self._write = _pipe(theirs=0)
        theirs_out, self._read = _pipe(theirs=1)
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--autoplay-policy=no-user-gesture-required",
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
        ]
        # The browser reads commands from descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number = b"", 0
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, session="")["targetId"]
        attached = self._call(
            "Target.attachToTarget", {"targetId": target, "flatten": True}, session=""
        )
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility"):
            self._call(f"{domain}.enable", {})

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(
        self, page: Path | str, *, width: int = 1280, height: int = 900, theme: str = "light"
    ) -> None:
        """Load a file or an address as a phone or a desktop shows it, in a colour scheme."""
        self.complaints.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self._call(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": theme}]},
        )
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.ask("window.left = true")  # what was open answers until the next page has begun
        self._call("Page.navigate", {"url": address})
        self.until("!window.left && document.readyState === 'complete'")

    def run_first(self, script: str) -> None:
        """Have a script run in each page that is opened from now on, before its own."""
        self._call("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def ask(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, a promise's once it is kept."""
        answer = self._call(
            "Runtime.evaluate",
            {
                "expression": expression,
                "returnByValue": True,
                "awaitPromise": True,
                "userGesture": True,
            },
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait for an expression to become true."""
        end = time.monotonic() + _PATIENCE
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} did not come true"
            time.sleep(0.05)

    def key(self, name: str, code: str, number: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": name, "code": code, "windowsVirtualKeyCode": number}
            self._call("Input.dispatchKeyEvent", event)

    def click(self, selector: str, *, across: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer to a place in an element and press it there."""
        self.point(selector, across=across, down=down)
        x, y = self._place(selector, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", event)

    def point(self, selector: str, *, across: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer to a place in an element, given as shares of its size."""
        x, y = self._place(selector, across, down)
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def names(self) -> list[tuple[str, str]]:
        """Return role and name of everything that assistive technology can see."""
        nodes = self._call("Accessibility.getFullAXTree", {})["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]

    def picture(self, path: Path) -> None:
        """Write the whole page as PNG."""
        size = self.ask(
            "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        answer = self._call("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(answer["data"]))

    def _place(self, selector: str, across: float, down: float) -> Sequence[float]:
        box = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        return box[0] + across * box[2], box[1] + down * box[3]

    def _call(
        self, method: str, parameters: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"].get("exception", parameters)))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.complaints.append(str(parameters["args"]))
