"""A headless Chromium, controlled by Chrome's DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
# Chromium reads commands from file descriptor 3 and writes replies to 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Page:
    """A page in its own browser; `requests` lists the requested URLs, `console` the console messages and errors."""

    def __init__(self, send, receive):
        self._send, self._receive, self._number, self._session = send, receive, 0, None
        self.requests, self.console, self._loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a DevTools method and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._send(message | ({"sessionId": self._session} if self._session else {}))
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self):
        message = self._receive()
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(parameters)
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message

    def show(self, path, *, width, scheme, height=900):
        """Load a file in a window `width` pixels wide; `scheme` is light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._next()

    def value(self, expression):
        """Evaluate a JavaScript expression, although the page itself may not run scripts, and return the result."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self):
        """Return a PNG of the whole page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def pdf(self):
        """Return the page as an A4 PDF."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True, "printBackground": False}
        return base64.b64decode(self.call("Page.printToPDF", **paper)["data"])


@contextmanager
def opened():
    """Start a browser and yield a `Page`; close the browser at the end of the block."""
    reads, writes = os.pipe(), os.pipe()
    inherited = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (reads[0], writes[1])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        command = [sys.executable, "-c", START, *map(str, inherited), PROGRAM, *options]
        browser = subprocess.Popen(command, pass_fds=inherited, stderr=subprocess.DEVNULL)
        for number in (reads[0], writes[1], *inherited):
            os.close(number)
        with os.fdopen(reads[1], "wb") as to, os.fdopen(writes[0], "rb") as answers:
            buffer = b""

            def send(message):
                to.write(json.dumps(message).encode() + b"\0")
                to.flush()

            def receive():
                nonlocal buffer
                while b"\0" not in buffer:
                    chunk = os.read(answers.fileno(), 1 << 20)
                    assert chunk, "the browser has exited"
                    buffer += chunk
                message, _, buffer = buffer.partition(b"\0")
                return json.loads(message)

            page = Page(send, receive)
            try:
                yield page
            finally:
                page._session = None
                send({"id": 0, "method": "Browser.close"})
                browser.wait(20)
