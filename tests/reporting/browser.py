"""Headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver).

Nothing needs to be installed but the two programs.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
]


def require_chromium() -> None:
    """Skips the test where there is no browser, unless REQUIRE_CHROMIUM=1."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing and os.environ.get("REQUIRE_CHROMIUM") != "1":
        pytest.skip(
            f"no {' and no '.join(missing)} on PATH; REQUIRE_CHROMIUM=1 makes this an error"
        )
    assert not missing, missing


class Browser:
    """One window of `width` x `height` CSS pixels."""

    def __init__(self, profile: Path, width: int, height: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait()
            options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._base += f"/session/{session['sessionId']}"
            self.resize(width, height)
        except BaseException:
            self._driver.kill()
            raise

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Runs the body of a JavaScript function; returns its result."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def media(self, **features: str) -> None:
        """Emulates e.g. media="print" or prefers_color_scheme="dark"."""
        named = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()
            if name != "media"
        ]
        self.cdp("Emulation.setEmulatedMedia", media=features.get("media", ""), features=named)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window or of the whole page."""
        picture = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def messages(self) -> list[str]:
        """Complaints of the browser since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        try:
            self._call("DELETE", "", None)
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def _wait(self) -> None:
        for _ in range(200):
            try:
                self._call("GET", "/status", None)
            except urllib.error.URLError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError("chromedriver does not answer")

    def _call(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
