"""A headless Chromium, driven through the pipe of its DevTools protocol; needs no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
# File descriptors 3 and 4 are those that Chromium reads and writes; messages end with a zero byte.
PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2'
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    # A report must not need a network: no name resolves.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1600,1000",
    "--remote-debugging-pipe",
)
# Content of a page that is not fetched from anywhere.
LOCAL = ("file:", "data:", "blob:", "about:")


def installed() -> str | None:
    """Path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A page, and all that went wrong on it.

    Attributes
    ----------
    errors
        Exceptions, messages of the console at the level of errors, and requests that failed.
    requests
        Addresses that the page asked for outside of itself.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._session: str | None = None
        self._number = 0
        self._buffer = b""

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path) -> None:
        """Load a local file and wait until its scripts have run."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str, context: int | None = None) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        where = {} if context is None else {"contextId": context}
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            **where,
        )
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, expression: str, context: int | None = None, seconds: float = 30) -> Any:
        """Evaluate until something true comes out."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression, context)):
            assert time.monotonic() < deadline, f"never true: {expression}; {self.errors}"
            time.sleep(0.05)
        return value

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector whose whole text is this; any, without a text."""
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            f".find(x => !{json.dumps(text)} || x.innerText.trim() === {json.dumps(text)})"
        )
        self.wait(f"!!{found}")
        self.evaluate(f"void {found}.click()")

    def inner(self) -> str:
        """Text of the page in the frame that the page shows."""
        self.wait("!!document.querySelector('iframe')")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            tree = self.call("Page.getFrameTree")["frameTree"]
            for child in tree.get("childFrames", []):
                world = self.call("Page.createIsolatedWorld", frameId=child["frame"]["id"])
                context = world["executionContextId"]
                ready = "document.readyState === 'complete' && document.body.innerText"
                if text := self.evaluate(ready, context):
                    return str(text)
            time.sleep(0.05)
        raise AssertionError(f"the frame stays empty; {self.errors}")

    def screenshot(self, path: Path) -> None:
        """Picture of what a person would see."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _receive(self) -> dict[str, Any]:
        """Next message of the browser."""
        assert self.process.stdout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], 60)
            assert ready, "the browser says nothing for a minute"
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            assert chunk, "the browser ended"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        """Keep what an event says about mistakes and requests."""
        event, about = message.get("method"), message.get("params", {})
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(x.get("value", x)) for x in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
        elif event == "Network.loadingFailed" and not about.get("canceled"):
            self.errors.append(f"request failed: {about['errorText']}")
        elif event == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if not url.startswith(LOCAL):
                self.requests.append(url)


@contextmanager
def chromium(program: str) -> Iterator[Page]:
    """Start a browser with a profile of its own; it ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}"]
        with subprocess.Popen(
            ["sh", "-c", PIPES, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            page = Page(process)
            try:
                yield page
            finally:
                process.terminate()
