"""A headless Chromium, driven over the DevTools protocol by a pipe: no port, no driver program, no library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--no-first-run", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"),
    *("--disable-extensions", "--mute-audio", "--hide-scrollbars"),
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


class Navigated(Exception):
    """The page that was asked has gone meanwhile."""


class Page:
    """One tab. Times in seconds."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, replies: int) -> None:
        self._process, self._commands, self._replies = process, commands, replies
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.complaints: list[str] = []  # exceptions, console errors and violations of the content policy
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Navigated
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.run("window.isStale = true")
        self.call("Page.reload")
        self.wait("!window.isStale && document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, within_s: float = 15.0) -> Any:
        """The value of `condition` once it is true; while it raises, it is not."""
        code = f"(() => {{ try {{ return ({condition}); }} catch {{ return null; }} }})()"
        until = time.monotonic() + within_s
        while not (value := self._try(code)):
            assert time.monotonic() < until, (
                f"in vain: {condition}; {self.complaints}; {self.run('document.body.innerText')}"
            )
            time.sleep(0.02)
        return value

    def _try(self, code: str) -> Any:
        try:
            return self.run(code)
        except Navigated:
            return None

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key with modifiers (1 Alt, 2 Control, 4 Meta, 8 Shift)."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str) -> None:
        """A real click in the middle of an element, which must be what is there."""
        at = f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
        x, y = self.run(at + "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._replies, 1 << 20)
            assert data, f"Chromium ended with status {self._process.poll()}"
            self._rest += data
        raw, _, self._rest = self._rest.partition(b"\0")
        return json.loads(raw)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in the folder `profile`."""
    assert CHROMIUM is not None
    commands, replies = os.pipe(), os.pipe()
    # the protocol is spoken on descriptors 3 and 4 of the child
    script = f'exec "$0" "$@" 3<&{commands[0]} 4>&{replies[1]}'
    command = ["/bin/bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    with open(profile / "stderr.log", "wb") as log:
        process = subprocess.Popen(command, pass_fds=(commands[0], replies[1]), stderr=log, start_new_session=True)
    os.close(commands[0])
    os.close(replies[1])
    try:
        yield Page(process, commands[1], replies[0])
    finally:
        os.close(commands[1])  # Chromium ends with its pipe
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(replies[0])
