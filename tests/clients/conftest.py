"""A real browser for tests: Chromium without a window, spoken to over a pipe (Chrome's DevTools protocol)."""

from __future__ import annotations

import base64
import fcntl
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
STARTS, ENDS = 120, 600
"""Seconds after which a browser that says nothing is given up: at its start the test is skipped, later it fails."""
PATIENCE = 60  # seconds until a page that does not answer is an error; nothing is asserted about time


class Browser:
    """One page. `ask` runs JavaScript in it and gives the value."""

    def __init__(self, command: str, home: Path) -> None:
        (read, write), (told, tell) = os.pipe(), os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--disable-dev-shm-usage",
        ]
        child = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read, tell)]  # far from 3 and 4, which Chromium uses
        start = f'exec "$@" 3<&{child[0]} 4>&{child[1]}'  # bash: other shells know no numbers above 9
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", command, *flags, f"--user-data-dir={home}", "about:blank"],
            pass_fds=child,
            stderr=subprocess.DEVNULL,
        )
        for end in (read, tell, *child):
            os.close(end)
        self.out, self.into = os.fdopen(write, "wb", buffering=0), os.fdopen(told, "rb")
        self.number, self.session, self.events = 0, "", []

    def begin(self) -> None:
        """Opens the page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                return answer["result"]
            self.events.append(answer)

    def _message(self) -> bytes:
        parts = bytearray()
        while (sign := self.into.read(1)) != b"\0":
            assert sign, "the browser is gone"
            parts += sign
        return bytes(parts)

    def open(self, url: str, *, width: int = 1000, height: int = 1400) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {url!r} && document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + PATIENCE
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.ask('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is; nothing happens if something covers it."""
        box = self.ask(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def problems(self) -> list[str]:
        """What the console complains of: errors, exceptions, what the page's own policy blocked."""
        self.ask("1")  # events that came before this answer are read
        errors = [event for event in self.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
        return [json.dumps(event["params"])[:500] for event in errors]

    def requested(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.out.close()
        self.into.close()


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A page of its own for each test; if the test fails, a screenshot is kept and named."""
    command = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if command is None:
        pytest.skip("needs chromium")
    home = tmp_path_factory.mktemp("chromium")
    one = Browser(command, home / "profile")
    before = request.session.testsfailed
    heard = signal.signal(signal.SIGALRM, _not_heard)
    try:
        signal.alarm(STARTS)
        try:
            one.begin()
        except (AssertionError, OSError) as error:  # a container may not let it
            pytest.skip(f"chromium does not start here: {error}")
        signal.alarm(ENDS)
        yield one
        if request.session.testsfailed > before:
            one.screenshot(home / "failed.png")
            sys.stderr.write(f"screenshot: {home / 'failed.png'}\n")  # pytest shows it with the failure
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, heard)
        one.close()


def _not_heard(*_: Any) -> None:
    raise TimeoutError("the browser does not answer")


@pytest.fixture
def serve() -> Iterator[Any]:
    """By folder: the address of a static server for it, on this machine alone."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
