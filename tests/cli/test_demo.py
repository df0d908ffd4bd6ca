"""``torchbp demo`` as a newcomer runs it: a process of its own, on real images, small."""

import gzip
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from torchbp.cli import demo, main
from torchbp.tensorboard import read

SMALL = ("--depth", "12", "--steps", "140", "--width", "32")


def torchbp(*arguments: object) -> subprocess.CompletedProcess:
    code = "import sys; from torchbp.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("logs") / "run"
    run = torchbp("demo", *SMALL, "--log-dir", log_dir)
    assert run.returncode == 0, run.stderr
    return run.stdout, log_dir


def row(text: str, network: str) -> str:
    return next(
        line for line in text.splitlines() if line.strip().startswith(network) and "%" in line
    )


def test_names_the_network_whose_gradient_vanishes(told):
    text, _ = told
    assert re.search(r"vanishing from linear\d\d$", row(text, "sigmoid").rstrip()), "not cut"
    assert "sigmoid: the gradient vanishes from layer linear" in text
    assert "what helps: residual connections" in text


def test_names_the_network_whose_gradient_explodes(told):
    assert "exploding" in row(told[0], "relu, init x2")


@pytest.mark.parametrize("network", ["norm + residual", "relu, He init", "tanh, Xavier"])
def test_calls_healthy_what_is_healthy(told, network):
    line = row(told[0], network)
    assert "healthy" in line
    accuracy = float(line.split("%")[0].split()[-1])
    assert accuracy > 60, "of ten classes"


def test_the_verdict_follows_from_what_was_logged(told):
    """The logged error signal of the sigmoid network falls by more than 1e5; the residual network's stays."""
    text, log_dir = told
    for name, sick in (("sigmoid", True), ("norm-residual", False)):
        signal_ = read(log_dir / name).vectors["error_signal"].values[-1]
        assert (signal_[0] / signal_[-1] < 1e-5) == sick
    assert f"tensorboard --logdir {log_dir}" in text.replace("\n", "")


def test_the_report_that_it_points_to(told, capsys):
    text, log_dir = told
    assert f"torchbp report {log_dir} -o report.html" in text.replace("\n", "")
    assert main(["report", str(log_dir)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("sigmoid") and row.endswith("vanishing") for row in rows)


def test_checks_gradients_first(told):
    lines = told[0].splitlines()
    assert [line.split()[:2] for line in lines if " right " in line] == [
        [name, "right"]
        for name in ("linear", "sigmoid", "tanh", "relu", "layer_norm", "cross_entropy")
    ]


def test_an_interrupt_keeps_what_was_logged(tmp_path):
    log_dir = tmp_path / "run"
    code = "import sys; from torchbp.cli import main; sys.exit(main())"
    arguments = ("demo", "--steps", "100000", "--log-dir", log_dir)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with interrupts ignored, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if len(read(log_dir / "sigmoid").vectors["gradient_norm"].steps) > 50:
                break
        except (FileNotFoundError, KeyError):
            pass
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "what was logged stays in" in out
    assert "Traceback" not in err
    run = read(log_dir / "sigmoid")
    assert len(run.vectors["gradient_norm"].steps) > 50
    assert np.isfinite(run.vectors["gradient_norm"].values).all()


def idx(values: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def write_images(folder, labels=None):
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        y = rng.integers(3, size=n) if labels is None else labels[:n]
        images = np.zeros((n, 6, 6))
        images[np.arange(n), y] = 255  # the label is the row that is white
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(y))


def test_takes_a_folder_of_images(tmp_path, capsys):
    write_images(tmp_path)
    arguments = [
        "demo",
        "--data",
        tmp_path,
        "--steps",
        5,
        "--depth",
        2,
        "--log-dir",
        tmp_path / "run",
    ]
    assert main(list(map(str, arguments))) == 0
    assert "on 40 images" in capsys.readouterr().out


def broken_file(folder):
    write_images(folder)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b not gzip")


def too_few_labels(folder):
    write_images(folder)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(3)))


def a_file_for_the_log(folder):
    (folder / "run").write_text("")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: None, ["--data", "{}/missing"], "--data: expected a folder, got "),
        (lambda folder: None, ["--data", "{}"], "--data: expected train-images-idx3-ubyte"),
        (broken_file, ["--data", "{}"], "is it whole?"),
        (too_few_labels, ["--data", "{}"], "expected as many labels as images, got 3 and 40"),
        (
            a_file_for_the_log,
            ["--log-dir", "{}/run"],
            "--log-dir: expected a folder that can be written",
        ),
    ],
    ids=["missing-folder", "no-files", "broken-file", "too-few-labels", "log-is-a-file"],
)
def test_bad_input_is_one_line_and_nothing_is_begun(
    prepare, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", *(a.format(tmp_path) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("torchbp demo: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_numbers_are_refused(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--steps", value])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(("elements", "threads"), [(64 * 64, 1), (512 * 512, 2)])
def test_small_layers_take_one_thread(elements, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with demo._threads_for(elements):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
