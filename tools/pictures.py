"""Takes the pictures of docs/pictures/ again: the demo's runs and the adding problem's in TensorBoard, in a browser.

    make pictures                                   trains the networks first
    make pictures ARGS="runs/demo-... runs/adding"  of runs that are there; the second from examples/adding_problem.py

Look at each picture before it is committed.
"""

import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.tensorboard.page import Tab, chromium, tensorboard  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
MOST = 200_000  # bytes
SICK, HEALTHY = "sigmoid", "norm-residual"


def take(logdir: Path) -> None:
    """Write the pictures of the runs in ``logdir``."""
    with tensorboard(logdir) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1215})
        tab = Tab(page, address).open(run=SICK, step=100)
        keep("tab", page.screenshot())
        tab.open(run=SICK, compare=HEALTHY, step=100)
        keep("compare", tab.frame.locator("#heatmap").screenshot())
        page.evaluate("document.body.classList.add('dark-mode')")
        tab.frame.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        tab.ready()
        keep("dark", page.screenshot(clip={"x": 0, "y": 0, "width": 1440, "height": 832}))


def take_time(logdir: Path) -> None:
    """Write the picture of what two recurrent networks do to the signal through time."""
    with tensorboard(logdir) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 555})
        Tab(page, address).open(run="rnn", compare="lstm", quantity="through_time")
        keep("through-time", page.screenshot())


def keep(name: str, png: bytes) -> None:
    """Write a picture, packed as well as PNG can."""
    path = PICTURES / f"{name}.png"
    Image.open(BytesIO(png)).convert("RGB").save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")
    if path.stat().st_size > MOST:
        raise SystemExit(f"pictures: expected {name} of at most {MOST} bytes; show less in it")


def main() -> None:
    """Train unless there are runs, then take the pictures."""
    if len(sys.argv) > 1:
        for act, folder in zip((take, take_time), sys.argv[1:], strict=False):
            act(Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        demo, adding = Path(folder) / "demo", Path(folder) / "adding"
        command = [Path(sys.executable).with_name("torchbp"), "demo", "--log-dir", demo]
        subprocess.run(command, check=True)
        take(demo)
        example = ROOT / "examples" / "adding_problem.py"
        subprocess.run([sys.executable, example, "--log-dir", adding], check=True)
        take_time(adding)


if __name__ == "__main__":
    main()
