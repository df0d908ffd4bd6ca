"""docs/gradcheck.md names every check, with the line of its record."""

from pathlib import Path

from torchbp.verify._check import all_checks

PAGE = Path(__file__).parents[2] / "docs" / "gradcheck.md"


def test_every_check_is_in_the_table():
    page = PAGE.read_text()
    missing = [
        c.name
        for c in all_checks().values()
        if f"| `{c.name}` | {c.level} | {c.tests} |" not in page
    ]
    assert not missing
