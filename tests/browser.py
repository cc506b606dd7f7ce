"""Pages opened in headless Chromium and looked at: what it complains of, what it asks for, what is where.

Speaks the DevTools protocol over a pair of pipes (`--remote-debugging-pipe`), so that it needs no port and no package. The
fixture `browser` of tests/conftest.py starts one for all tests and skips where there is no Chromium.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 1280)
"""A phone and a laptop, in CSS pixels."""

FIGURES = "figure, img, svg"
LEAST_CONTRAST = 3.0
"""Of text and what is behind it: WCAG's for large text; what cannot be read has 1."""

SECONDS = 60.0
"""To wait for an answer."""

# Facts of the page as laid out, with every <details> opened: the viewport, the figures, and text with its contrast.
_LOOK = """
(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = css => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => {
    const a = top[3] / 255; return [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a))
      .concat(255);
  };
  const backgroundOf = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    const dark = matchMedia('(prefers-color-scheme: dark)').matches;
    return layers.reverse().reduce((below, top) => over(top, below), dark ? [18, 18, 18, 255] : [255, 255, 255, 255]);
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05) };
  const scrolled = element => {
    for (let e = element.parentElement; e && e !== document.body; e = e.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  const figures = [...document.querySelectorAll('FIGURES')].map(e => {
    const box = e.getBoundingClientRect(), loaded = e.tagName !== 'IMG' || (e.complete && e.naturalWidth > 0);
    return {tag: e.tagName.toLowerCase(), 
            label: e.getAttribute('aria-label') || e.getAttribute('alt') || e.getAttribute('class') || '',
            left: box.left, right: box.right, width: box.width, height: box.height, loaded, scrolled: scrolled(e),
            shown: e.checkVisibility({opacityProperty: true, visibilityProperty: true})};
  });
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
  while (words.nextNode()) {
    const text = words.currentNode.textContent.trim(), parent = words.currentNode.parentElement;
    if (!text || ['STYLE', 'SCRIPT', 'TITLE', 'DESC', 'title', 'desc', 'style'].includes(parent.tagName)) continue;
    const style = getComputedStyle(parent), svg = parent.ownerSVGElement !== undefined && parent.ownerSVGElement !== null;
    const behind = backgroundOf(parent), colour = over(rgba(svg ? style.fill : style.color), behind);
    const ratio = contrast(colour, behind);
    if (ratio < LEAST) faint.push({text: text.slice(0, 40), ratio});
  }
  return {inner: innerWidth, scroll: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
          figures, faint, text: document.body.innerText};
})()
""".replace("FIGURES", FIGURES).replace("LEAST", str(LEAST_CONTRAST))


def find_chromium() -> str | None:
    """The path of a browser; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """A page as it was laid out.

    Attributes:
        complaints: Warnings and errors of the console, and exceptions.
        requests: Addresses that were asked for, beside the page itself and data: in it.
        width: Of the viewport.
        scroll_width: Of what is in it.
        figures: Of every figure, img and svg its tag, label and box.
        faint: Text that can hardly be told from what is behind it.
        text: What can be read.
    """

    complaints: list[str]
    requests: list[str]
    width: int
    scroll_width: int
    figures: list[dict[str, Any]]
    faint: list[dict[str, Any]]
    text: str

    def problems(self) -> list[str]:
        """What is wrong with it, in words."""
        told = [f"console: {line}" for line in self.complaints] + [f"asks for {url}" for url in self.requests]
        if self.scroll_width > self.width:
            told.append(f"scrolls sideways: {self.scroll_width} pixels in {self.width}")
        for each in self.figures:
            name = f"{each['tag']} {each['label']!r}"
            if not each["loaded"] or not each["shown"] or each["width"] < 1 or each["height"] < 1:
                told.append(f"{name} is not visible: {each}")
            elif not each["scrolled"] and (each["left"] < -1 or each["right"] > self.width + 1):
                told.append(f"{name} sticks out: {each['left']:.0f} to {each['right']:.0f} of {self.width}")
        return told + [f"text {each['text']!r} has contrast {each['ratio']:.2f}" for each in self.faint]


@dataclass
class Browser:
    """A headless Chromium.

    Args:
        path: Of its program.
        home: A folder of its own.
    """

    path: str
    home: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        # out of the way of 3 and 4, where Chromium reads and writes
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out)]
        log = os.open(self.home / "chromium.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.set_blocking(self._read, False)
        arguments = [
            self.path, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self.home / 'profile'}", "--disable-gpu",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-background-networking",
            "--disable-component-update", "--hide-scrollbars",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        moves = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        moves += [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        environment = os.environ | {"HOME": str(self.home)}
        self._process = os.posix_spawn(self.path, arguments, environment, file_actions=moves, setpgroup=0)
        for end in (theirs_in, theirs_out, *ends, log):
            os.close(end)
        self._number, self._rest, self._session = 0, b"", None

    def close(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)

    def look(self, page: Path, *, width: int, dark: bool = False, picture: Path | None = None) -> Seen:
        """Opens a page and looks at it.

        Args:
            page: A file.
            width: Of the viewport, in CSS pixels; narrow ones are a phone's.
            dark: In dark mode.
            picture: Where a PNG of the whole page is written.
        """
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            self.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.send("Emulation.setEmulatedMedia", features=[scheme])
            self.events.clear()
            address = page.resolve().as_uri()
            self.send("Page.navigate", url=address)
            self._wait_for("Page.loadEventFired")
            facts = self.send("Runtime.evaluate", expression=_LOOK, returnByValue=True)
            assert "exceptionDetails" not in facts, facts["exceptionDetails"]
            if picture is not None:
                self._take(picture)
            return self._seen(facts["result"]["value"], address)
        finally:
            self._session = None
            self.send("Target.closeTarget", targetId=target)

    def problems(self, page: Path) -> list[str]:
        """What is wrong with a page on a phone and on a laptop, in light and dark mode; each begins with where."""
        told = []
        for width in WIDTHS:
            for dark in (False, True):
                seen = self.look(page, width=width, dark=dark)
                told += [f"{width} {'dark' if dark else 'light'}: {problem}" for problem in seen.problems()]
        return told

    def _seen(self, facts: dict[str, Any], address: str) -> Seen:
        complaints, requests = [], []
        for event in self.events:
            given = event.get("params", {})
            if event["method"] == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
                complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in given["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                complaints.append(str(given["exceptionDetails"].get("text")))
            elif event["method"] == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                complaints.append(given["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = given["request"]["url"]
                requests += [] if url.partition("#")[0] == address or url.startswith("data:") else [url]
        return Seen(complaints, requests, facts["inner"], facts["scroll"], facts["figures"], facts["faint"],
                    facts["text"])  # fmt: skip

    def _take(self, picture: Path) -> None:
        import base64

        told = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        picture.write_bytes(base64.b64decode(told["data"]))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages(method):
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
        raise AssertionError  # never: `_messages` goes on, or raises

    def _wait_for(self, event: str) -> None:
        if any(each["method"] == event for each in self.events):
            return
        next(message for message in self._messages(event) if message.get("method") == event)

    def _messages(self, what: str) -> Iterator[dict[str, Any]]:
        """What comes from Chromium; events are kept too."""
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                yield message
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer {what} in {SECONDS:.0f} s: {self._log()}")
            new = os.read(self._read, 2**20)
            if not new:
                raise ConnectionError(f"Chromium ended: {self._log()}")
            self._rest += new

    def _log(self) -> str:
        return (self.home / "chromium.log").read_text(errors="replace")[-2000:]
