"""The Grad flow page as somebody sees it: a browser, a TensorBoard, and what one does with the page."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium():
    """A browser: Debian's, or whichever is there."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(found).exists():
            raise FileNotFoundError(
                "expected chromium on PATH, got none; apt-get install chromium (or playwright "
                "install chromium), or leave its tests out: "
                "make test ARGS='-m \"not slow and not browser\"'"
            )
        browser = playwright.chromium.launch(executable_path=found, args=_FLAGS)
        yield browser
        browser.close()


@contextmanager
def tensorboard(logdir: Path, *arguments: str):
    """A TensorBoard on a port of its own; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), *arguments]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S*", line):
                yield found[0]
                return
        raise RuntimeError("TensorBoard did not start:\n" + "".join(said))
    finally:
        process.terminate()
        process.stderr.close()
        process.wait()


class Tab:
    """The page in a browser: as TensorBoard's tab, or as a report."""

    def __init__(self, page, address: str) -> None:
        self.page = page
        self._address = address
        self.frame: Any = None
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._console)
        page.on("dialog", lambda dialog: self.errors.append(f"a dialog: {dialog.message}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => "
            "console.error(`blocked: ${event.violatedDirective} ${event.blockedURI}`));"
        )

    def _console(self, message: Any) -> None:
        # Under a path prefix TensorBoard 2.21 looks for its own fonts without it.
        if message.type == "error" and "/font-roboto/" not in message.location["url"]:
            self.errors.append(message.text)

    def open(self, **view: object) -> "Tab":
        """Show what the address says; a page that is open already is not loaded again."""
        parts = [f"p.torchbp.{key}={quote(str(value), safe='')}" for key, value in view.items()]
        fragment = "&".join(["#torchbp", *parts])
        if self.frame is not None:
            self.page.evaluate(
                """(fragment) => new Promise((done) => {
                  if (location.hash === fragment) done();
                  addEventListener("hashchange", done, { once: true });
                  location.hash = fragment;
                })""",
                fragment,
            )
            return self.ready()
        return self.open_link(self._address + fragment)

    def open_link(self, link: str) -> "Tab":
        """Load TensorBoard at an address."""
        self.page.goto(link)
        self.page.wait_for_selector("iframe[src*='plugin_entry.html']", state="attached")
        handle = self.page.query_selector("iframe[src*='plugin_entry.html']")
        self.frame = handle.content_frame()
        return self.ready()

    def open_file(self, path: Path, fragment: str = "") -> "Tab":
        """Open a report."""
        self.page.goto(path.as_uri() + fragment)
        self.frame = self.page.main_frame
        return self.ready()

    def ready(self) -> "Tab":
        """Wait until all is drawn."""
        self.frame.wait_for_selector("html[data-ready='yes']", state="attached")
        return self

    def set(self, selector: str, value: str) -> None:
        """Choose in a list, or type into a field."""
        tag = self.frame.eval_on_selector(selector, "(node) => node.tagName")
        if tag == "SELECT":
            self.frame.select_option(selector, value)
        else:
            self.frame.fill(selector, value)
        self.ready()

    def click(self, selector: str, **options: object) -> None:
        """Click, and wait until all is drawn."""
        self.frame.click(selector, **options)
        self.ready()

    def text(self, selector: str) -> str:
        """The text that is seen of an element."""
        return self.frame.inner_text(selector)

    def colours(self, selector: str, alpha: int = 255) -> dict[tuple[int, ...], int]:
        """How often each colour of an opacity stands in a canvas."""
        counts = self.frame.eval_on_selector(
            selector,
            """(canvas, alpha) => {
              const {width, height} = canvas;
              const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
              const counts = {};
              for (let at = 0; at < data.length; at += 4) {
                if (data[at + 3] !== alpha) continue;
                const colour = [data[at], data[at + 1], data[at + 2]].join();
                counts[colour] = (counts[colour] ?? 0) + 1;
              }
              return counts;
            }""",
            alpha,
        )
        return {tuple(map(int, colour.split(","))): n for colour, n in counts.items()}

    def cell(self, row: int, rows: int, share: float, panel: int = 0) -> tuple[float, float]:
        """The point, in a panel, of a row of ``rows`` at ``share`` of the steps."""
        node = self.frame.query_selector_all(".panel")[panel]
        left, top, width, height = map(float, node.get_attribute("data-cells").split())
        return left + share * width, top + (row + 0.5) * height / rows

    def hover(self, x: float, y: float, selector: str = ".panel", place: int = 0) -> str:
        """Point at a place of an element, and return what the tooltip says."""
        box = self.frame.query_selector_all(selector)[place].bounding_box()
        self.page.mouse.move(box["x"] + x, box["y"] + y)
        return self.tooltip()

    def tooltip(self) -> str:
        """What the tooltip says, "" where there is none."""
        return self.frame.eval_on_selector(".tooltip", "(box) => box.hidden ? '' : box.innerText")

    def colour_at(self, x: float, y: float, panel: int = 0) -> tuple[int, ...]:
        """The colour of the heat map at a point."""
        node = self.frame.query_selector_all(".panel canvas.cells")[panel]
        return tuple(
            node.evaluate(
                "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]",
                [round(x), round(y)],
            )
        )
