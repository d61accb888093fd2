"""Pages as headless Chromium shows them, by the WebDriver protocol; needs `chromium` and `chromedriver` on the PATH."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
MEASURE = """
const wide = document.documentElement.clientWidth, cut = [];
for (const each of document.querySelectorAll("body *")) {
  const box = each.getBoundingClientRect();
  if (!box.width || each.closest(".scroll, pre, details:not([open])")) continue;
  if (box.right > wide + 1 || box.left < -1) cut.push(each.tagName + " " + each.textContent.slice(0, 40));
  const style = getComputedStyle(each);
  if (each.scrollWidth > each.clientWidth + 1 && style.overflowX === "hidden") cut.push("hidden " + each.tagName);
}
for (const each of document.querySelectorAll("figure svg text")) {
  const box = each.getBoundingClientRect(), frame = each.ownerSVGElement.getBoundingClientRect();
  if (box.right > frame.right + 1 || box.left < frame.left - 1) cut.push("label " + each.textContent);
}
const drawn = [...document.querySelectorAll("figure svg")].map(each => each.getBoundingClientRect());
return {
  page: document.documentElement.scrollWidth, wide, cut,
  charts: drawn.map(box => [box.width, box.height]),
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
};
"""


class Browser:
    """One session of Chromium."""

    def __init__(self, port: int, profile: Path):
        self.server = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*SWITCHES, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.server += "/" + self.ask("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def ask(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(self.server + path, json.dumps(content).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def tell(self, method: str, **params: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.ask("/goog/cdp/execute", cmd=method, params=params)

    def show(self, page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
        """Load a page at a width, and measure it: what is cut off, the sizes of its charts, messages of the console."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[feature])
        self.ask("/url", url=page.as_uri())
        found: dict[str, Any] = self.ask("/execute/sync", script=MEASURE, args=[])
        return {**found, "console": self.ask("/se/log", type="browser")}

    def picture(self) -> bytes:
        """Take a picture of the whole page, as PNG."""
        answer = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


@contextmanager
def browser(scratch: Path) -> Iterator[Browser]:
    """Start Chromium for a block."""
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        port = next(int(line.split()[-1].rstrip(".")) for line in driver.stdout if "successfully on port" in line)
        started = Browser(port, scratch / "profile")
        try:
            yield started
        finally:
            with urllib.request.urlopen(urllib.request.Request(started.server, method="DELETE"), timeout=60):
                pass
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
