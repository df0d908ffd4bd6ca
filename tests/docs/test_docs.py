"""The pages of docs/ hold: Python runs and prints what they say, commands parse, links lead somewhere."""

import argparse
import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

from torchbp.cli import _main

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = ("tutorial", "howto")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]+)?\)")
COMMAND = re.compile(r"^(?:\$ )?(torchbp [a-z].*)$", re.MULTILINE)
ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def id_of(path):
    return path.stem


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run_and_print_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall((ROOT / "docs" / f"{name}.md").read_text())
    space = {"__name__": name}
    printed = None
    for language, text in blocks:
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, f"{name}.md", "exec"), space)
            printed = out.getvalue()
        elif language == "text":
            assert printed is not None, f"{name}.md: a text block without Python before it"
            same = doctest.OutputChecker().check_output(rounded(text), rounded(printed), ELLIPSIS)
            assert same, f"{name}.md says\n{text}\nbut it prints\n{printed}"
            printed = None
        else:
            printed = None


def rounded(text):
    """Decimal fractions differ from machine to machine; words and whole numbers don't."""
    return re.sub(r"-?\d+\.\d+(e[-+]\d+)?", "#", text)


def commands():
    for page in [*PAGES, ROOT / "README.md"]:
        for language, text in FENCE.findall(page.read_text()):
            if language in {"", "sh", "console"}:
                for line in COMMAND.findall(text):
                    yield pytest.param(line, id=f"{page.stem}-{line[:50]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_parse(line):
    _, *words = shlex.split(line, comments=True)
    parsed = _main._parser(_main.commands()).parse_args(words)
    assert isinstance(parsed, argparse.Namespace)


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target, anchor in LINK.findall(text):
        if not target.startswith("http"):
            path = page.parent / target
            assert path.exists(), f"{page.name}: {target}"
            if anchor and path.suffix == ".md":
                assert anchor[1:] in anchors(path), f"{page.name}: {target}{anchor}"


def anchors(path):
    """As the forge makes them of headings, and the site."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    trees = [text for language, text in FENCE.findall(index) if language == "{toctree}"]
    named = set(re.findall(r"^(?:.* <)?([a-z]+)>?$", "\n".join(trees), re.MULTILINE))
    assert {page.stem for page in PAGES} - named == {"index"}
