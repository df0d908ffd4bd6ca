"""docs/gradcheck.md names every check, with the line of its record, and its gallery is what gradcheck says."""

import re
from pathlib import Path

import pytest

import torchbp
from tests.verify import known
from tests.verify.unseen import every
from torchbp.verify._check import all_checks
from torchbp.verify.tensors import name_of

PAGE = (Path(__file__).parents[2] / "docs" / "gradcheck.md").read_text()
GALLERY = re.findall(r"```text\n(\[.*?)\n```", PAGE, re.DOTALL)


def test_every_check_is_in_the_table():
    missing = [
        c.name
        for c in all_checks().values()
        if f"| `{c.name}` | {c.level} | {c.tests} |" not in PAGE
    ]
    assert not missing


def test_gallery_is_not_empty():
    assert len(GALLERY) >= 9


@pytest.mark.parametrize("text", GALLERY, ids=lambda t: t[1 : t.index("]")])
def test_gallery(text):
    function, check = re.search(r"gradcheck\(([\w.]+), .*checks='(\w+)'", text).groups()
    pair = next(
        p for p in [*known.every().values(), *every().values()] if name_of(p.wrong) == function
    )
    kwargs = pair.kwargs() if hasattr(pair, "kwargs") else None
    report = torchbp.gradcheck(
        pair.wrong, pair.make(), kwargs=kwargs, checks=check, raise_exception=False
    )
    assert text in map(str, report.wrong)
