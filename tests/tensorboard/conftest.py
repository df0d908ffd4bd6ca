"""A browser, a TensorBoard, and small runs for them to show."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.tensorboard import EventWriter, Layout, with_absent

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = '<img src=x onerror="window.hacked=1">'
SPECIAL = np.array([[1e-3, 0.0, 1.0], [np.nan, np.inf, 1.0], [1e-3, 1e-2, 1.0]], np.float32)


@pytest.fixture(scope="session")
def browser():
    """Chromium. Without it these tests fail: a page that nobody looked at is not tested."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.fail(
                "expected chromium on PATH, got none; apt-get install chromium (or playwright "
                "install chromium), or leave these tests out: "
                "make test ARGS='-m \"not slow and not browser\"'",
                pytrace=False,
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
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                return
        pytest.fail("TensorBoard did not start:\n" + "".join(said))
    finally:
        process.terminate()
        process.stderr.close()
        process.wait()


@pytest.fixture(scope="session")
def logdir(tmp_path_factory) -> Path:
    """Two trained runs, one with special values, one with hostile names; garbage beside them."""
    logdir = tmp_path_factory.mktemp("runs")
    _train(logdir / "sick", nn.Sigmoid, steps=60)
    _train(logdir / "sound", nn.ReLU, steps=60)
    _write_special(logdir / "special")
    _write_hostile(logdir / HOSTILE)
    for name, content in (
        ("garbage", b"no event file" * 99),
        ("hollow", b""),
        ("zeros", b"\0" * 99),
    ):
        (logdir / name).mkdir()
        (logdir / name / "events.out.tfevents.1.host").write_bytes(content)
    with EventWriter(logdir / "foreign") as writer:
        writer.scalar("accuracy", 0, 0.5)
    torn = next((logdir / "sick").glob("*.tfevents.*"))
    (logdir / "torn").mkdir()
    (logdir / "torn" / torn.name).write_bytes(torn.read_bytes()[:-1000])
    return logdir


def _train(folder: Path, activation: type[nn.Module], *, steps: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), activation()) for _ in range(12)]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    with torchbp.watch(model, optimizer, log_dir=folder, sample_every=5) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            for half in (slice(0, 32), slice(32, 64)):  # two backwards a step show the noise scale
                loss = nn.functional.cross_entropy(model(x[half]), y[half]) / 2
                loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss * 2)
            if step % 10 == 0:
                monitor.log_loss(val=loss * 2.5)


def _write_special(folder: Path) -> None:
    """0, NaN, inf, and in the last row an absent value."""
    layout = Layout(
        "error_signal",
        "layer",
        ("a", "b", "c"),
        ("Linear", "ReLU", "Linear"),
        "loss / output",
        "error signal",
        logarithm=True,
    )
    with EventWriter(folder) as writer:
        for step, row in enumerate(SPECIAL):
            present = np.array([True, True, step < 2])
            writer.vector(layout, step * 10, with_absent(row, present))


def _write_hostile(folder: Path) -> None:
    layers = (HOSTILE, "</script><script>window.hacked=1</script>", "'\"><b>bold</b>")
    layout = Layout(
        "error_signal", "layer", layers, (HOSTILE,) * 3, HOSTILE, HOSTILE, logarithm=True
    )
    about = dict.fromkeys(
        ("kind", "severity", "layer", "evidence", "threshold", "source", "advice"), HOSTILE
    )
    verdict = about | {"severity": "alert", "step": 0, "until": None, "quantities": [HOSTILE]}
    with EventWriter(folder) as writer:
        for step in range(3):
            writer.vector(layout, step, [1.0, 0.1, 0.01])
        writer.scalar(HOSTILE, 0, 1.0)
        writer.record("verdicts", 2, [[0, verdict]])


@pytest.fixture(scope="session")
def server(logdir):
    """The address of a TensorBoard over the runs."""
    with tensorboard(logdir) as address:
        yield address


class Tab:
    """The page in a browser: as TensorBoard's tab, or as a report."""

    def __init__(self, page, address: str) -> None:
        self.page = page
        self._address = address
        self.frame = None
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda m: self.errors.append(m.text) if m.type == "error" else None,
        )
        page.on("dialog", lambda dialog: self.errors.append(f"a dialog: {dialog.message}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => "
            "console.error(`blocked: ${event.violatedDirective} ${event.blockedURI}`));"
        )

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
        self.frame.wait_for_function("document.documentElement.dataset.ready === 'yes'")
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

    def colours(self, selector: str) -> dict[tuple[int, int, int], int]:
        """How often each opaque colour stands in a canvas."""
        counts = self.frame.eval_on_selector(
            selector,
            """(canvas) => {
              const {width, height} = canvas;
              const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
              const counts = {};
              for (let at = 0; at < data.length; at += 4) {
                if (data[at + 3] !== 255) continue;
                const colour = [data[at], data[at + 1], data[at + 2]].join();
                counts[colour] = (counts[colour] ?? 0) + 1;
              }
              return counts;
            }""",
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


_WINDOW = {"viewport": {"width": 1280, "height": 1500}, "accept_downloads": True}


@pytest.fixture
def page(browser):
    """An empty page of a test's own."""
    page = browser.new_page(**_WINDOW)
    yield page
    page.close()


@pytest.fixture(scope="session")
def _shared_tab(browser, server):
    page = browser.new_page(**_WINDOW)
    yield Tab(page, server)
    page.close()


@pytest.fixture
def tab(_shared_tab):
    """The tab; after each test nothing may have gone wrong in it."""
    _shared_tab.page.mouse.move(0, 0)
    yield _shared_tab
    errors, _shared_tab.errors[:] = list(_shared_tab.errors), []
    assert errors == []


@pytest.fixture
def fresh(page, server):
    """A tab that was never opened."""
    tab = Tab(page, server)
    yield tab
    assert tab.errors == []
