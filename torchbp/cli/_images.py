"""Real images for the demo: scikit-learn's digits, or MNIST-style ``*-ubyte[.gz]`` files."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchbp.cli._command import CouldNotRun

__all__ = ["Images", "digits", "idx_folder"]


@dataclass(frozen=True)
class Images:
    """Labelled grey images, in [0, 1], split into two parts.

    Attributes:
        name: Where they are from.
        train: ``(images, labels)``: float32 ``(N, D)`` and int64 ``(N,)``.
        test: Likewise.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits() -> Images:
    """Return scikit-learn's 1797 handwritten digits of 8×8 pixels; every fifth is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "expected scikit-learn to be installed; pip install 'torchbp[demo]'"
        raise CouldNotRun(message) from None
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels / 16).astype(np.float32), labels.astype(np.int64)
    test = np.arange(len(x)) % 5 == 0
    return Images("scikit-learn's digits", (x[~test], y[~test]), (x[test], y[test]))


def idx_folder(folder: Path) -> Images:
    """Return the images of a folder with the four files of MNIST, Fashion-MNIST and their like.

    Raises:
        CouldNotRun: The folder or a file is missing, or is not what its name says.
    """
    if not folder.is_dir():
        message = (
            f"--data: expected a folder, got {folder}; name one with MNIST-style *-ubyte[.gz] files"
        )
        raise CouldNotRun(message)
    parts = []
    for part in ("train", "t10k"):
        images = _read(folder, f"{part}-images", dims=3)
        labels = _read(folder, f"{part}-labels", dims=1)
        if len(images) != len(labels) or not len(images):
            message = f"--data: expected as many labels as images, got {len(labels)} and {len(images)} in {folder}"
            raise CouldNotRun(message)
        x = images.reshape(len(images), -1).astype(np.float32) / 255
        parts.append((x, labels.astype(np.int64)))
    return Images(folder.name, *parts)


def _read(folder: Path, start: str, dims: int) -> np.ndarray:
    """Read one IDX file: two zero bytes, 8 for uint8, the number of dimensions, their sizes, the values."""
    found = sorted(p for p in folder.iterdir() if p.name.startswith(start) and "ubyte" in p.name)
    if not found:
        message = f"--data: expected {start}-idx{dims}-ubyte[.gz] in {folder}, got none; it needs all four files"
        raise CouldNotRun(message)
    path = found[0]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:4] != bytes((0, 0, 8, dims)):
            raise ValueError
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError):
        message = f"--data: expected an IDX file of {dims} dimensions, got {path}; is it whole?"
        raise CouldNotRun(message) from None
