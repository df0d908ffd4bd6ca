"""A browser, a TensorBoard, and small runs for them to show."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from tests.tensorboard.page import Tab, chromium, tensorboard
from torchbp.tensorboard import EventWriter, Layout, with_absent

HOSTILE = '<img src=x onerror="window.hacked=1">'
SPIKE = 1001
SPECIAL = np.array([[1e-3, 0.0, 1.0], [np.nan, np.inf, 1.0], [1e-3, 1e-2, 1.0]], np.float32)


@pytest.fixture(scope="session")
def browser():
    """Chromium. Without it these tests fail: a page that nobody looked at is not tested."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except FileNotFoundError as error:
            pytest.fail(str(error), pytrace=False)
        yield browser


@pytest.fixture(scope="session")
def logdir(tmp_path_factory) -> Path:
    """Two trained runs, one with special values, one with hostile names; garbage beside them."""
    logdir = tmp_path_factory.mktemp("runs")
    _train(logdir / "sick", nn.Sigmoid, steps=60)
    _train(logdir / "sound", nn.ReLU, steps=60)
    _write_special(logdir / "special")
    _write_hostile(logdir / HOSTILE)
    _write_long(logdir / "long")
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
    if activation is nn.ReLU:
        for layer in layers:
            nn.init.kaiming_normal_(layer[0].weight)
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
                monitor.log_loss(val=loss * 2.1)


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
        texts = ("kind", "evidence", "threshold", "source", "advice")
        about = dict.fromkeys(texts, "dead") | {
            "severity": "warning",
            "quantities": ["error_signal"],
        }
        layers = ["a", "b", "c", *(f"gone.{number}" for number in range(9))]
        found = [about | {"layer": layer, "step": 20, "until": None} for layer in layers]
        found.append(about | {"layer": "a", "step": 0, "until": 10, "severity": "info"})
        writer.record("verdicts", 20, list(enumerate(found)))


def _write_long(folder: Path) -> None:
    """More samples than a screen has columns, and a spike and a dip in one of them each."""
    layout = Layout("error_signal", "layer", ("a", "b"), unit="loss / output", logarithm=True)
    values = np.ones((2500, 2), np.float32)
    values[SPIKE, 0], values[SPIKE, 1] = 1e3, 1e-3
    with EventWriter(folder) as writer:
        for step, row in enumerate(values):
            writer.vector(layout, step, row)


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
