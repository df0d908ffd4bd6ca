"""The real data of the examples: fetched once by ``make data`` into ``data/``, or a smaller stand-in."""

import csv
import gzip
import json
import os
import pydoc_data.topics
import tarfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("TORCHBP_DATA", Path(__file__).parent.parent / "data"))
_SAMPLE = Path(__file__).parent / "mails.csv.gz"


@dataclass(frozen=True)
class Labelled:
    """Images or texts with their classes, in two parts.

    Attributes:
        name: Where they are from.
        x: Training inputs; images are ``(N, 1, H, W)`` float32 in [0, 1].
        y: Training labels, ``(N,)`` int64.
        test_x: Test inputs.
        test_y: Test labels.
    """

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def _notice(wanted: str, instead: str) -> None:
    print(f"no {wanted} in {FOLDER.name}/ (run `make data`): {instead} instead")


def fashion(limit: int | None = None) -> Labelled:
    """Return Fashion-MNIST (Xiao et al. 2017, MIT licence), 60,000 + 10,000 images of 28×28 pixels, 10 classes.

    Args:
        limit: Keep the first so many training images, and a sixth as many for the test.

    Returns:
        The images; scikit-learn's digits, with a notice, where they have not been fetched.
    """
    folder = FOLDER / "fashion-mnist"
    if not folder.is_dir():
        _notice("fashion-mnist", "scikit-learn's digits")
        return _first(digits(), limit)
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz")
        parts += [
            images[:, None].float() / 255,
            _idx(folder / f"{part}-labels-idx1-ubyte.gz").long(),
        ]
    return _first(Labelled("Fashion-MNIST", *parts), limit)


def digits() -> Labelled:
    """Return scikit-learn's 1797 handwritten digits, 8×8 pixels; every fifth is for the test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels)
    test = torch.arange(len(x)) % 5 == 0
    return Labelled("scikit-learn's digits", x[~test], y[~test], x[test], y[test])


def _idx(path: Path) -> Tensor:
    """Read an IDX file: two zero bytes, 8 for uint8, the number of dimensions, their sizes, the values."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.from_numpy(
        np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()
    )


def _first(data: Labelled, limit: int | None) -> Labelled:
    if limit is None:
        return data
    test = max(limit // 6, 1)
    return Labelled(
        data.name, data.x[:limit], data.y[:limit], data.test_x[:test], data.test_y[:test]
    )


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        name: Where it is from.
        symbols: The characters; a number stands for one of them.
        train: int64 ``(N,)``: the first nine tenths.
        test: int64 ``(M,)``: the last tenth.
    """

    name: str
    symbols: str
    train: Tensor
    test: Tensor

    def decode(self, numbers: Tensor) -> str:
        """Return the characters that ``numbers`` stand for."""
        return "".join(self.symbols[i] for i in numbers.tolist())


def shakespeare(limit: int | None = None) -> Text:
    """Return Shakespeare's plays and poems (5 million characters, public domain).

    Args:
        limit: Keep the first so many characters.

    Returns:
        The text; the Python language reference, with a notice, where the plays have not been fetched.
    """
    archive = FOLDER / "shakespeare.tar.gz"
    if archive.is_file():
        name, raw = "Shakespeare", _texts(archive)
    else:
        _notice("shakespeare", "the Python language reference")
        name, raw = "the Python language reference", "\n".join(pydoc_data.topics.topics.values())
    raw = raw[:limit]
    symbols = "".join(sorted(set(raw)))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    numbers = torch.tensor([number[symbol] for symbol in raw])
    split = len(numbers) * 9 // 10
    return Text(name, symbols, numbers[:split], numbers[split:])


def _texts(archive: Path) -> str:
    with tarfile.open(archive) as tar:
        members = [m for m in tar if "shksprdata/texts/" in m.name and m.name.endswith("_gut.txt")]
        files = [tar.extractfile(m) for m in sorted(members, key=lambda m: m.name)]
        return "\n".join(f.read().decode("latin-1").replace("\r", "") for f in files if f)


def mails() -> tuple[str, list[str], list[int]]:
    """Return SpamAssassin's public corpus (6046 mails of 2002 and 2003, public domain): name, texts, 1 for spam.

    Subject and body only: headers give it away. Where they have not been fetched, a sample of 240 that is always there.
    """
    archive = FOLDER / "spam-assassin.tgz"
    if not archive.is_file():
        _notice("spam-assassin", "a sample of 240 mails")
        with gzip.open(_SAMPLE, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        return (
            "a sample of SpamAssassin's corpus",
            [text for _, text in rows],
            [int(y) for y, _ in rows],
        )
    texts, labels = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            if (
                member.name.endswith(".json")
                and "/data/" in member.name
                and "file_list" not in member.name
            ):
                file = tar.extractfile(member)
                mail = json.loads(file.read()) if file else {}
                texts.append(_subject_and_body(mail["text"]))
                labels.append(int(mail["group"].startswith("spam")))
    return "SpamAssassin's corpus", texts, labels


def _subject_and_body(mail: str) -> str:
    message = message_from_string(mail)
    parts = [p.get_payload() for p in message.walk() if p.get_content_maintype() == "text"]
    return "\n".join([str(message["subject"]), *(p for p in parts if isinstance(p, str))])[:4000]
