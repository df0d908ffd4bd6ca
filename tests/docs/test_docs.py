"""The pages hold: Python and commands run and print what they say, links lead somewhere."""

import contextlib
import doctest
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import torchbp
from torchbp.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = ("tutorial", "howto")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]+)?\)")
COMMAND = re.compile(
    r"^(?:\$ )?(torchbp [a-z].*)\n((?:(?!\$ |torchbp |python ).*\n)*)", re.MULTILINE
)
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
    """Every command of torchbp's on the pages, with the lines that the page says it prints."""
    for page in [*PAGES, ROOT / "README.md"]:
        for language, text in FENCE.findall(page.read_text()):
            if language in {"", "sh", "console"}:
                for line, printed in COMMAND.findall(text):
                    yield pytest.param(page, line, printed, id=f"{page.stem}-{line[:50].strip()}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two real runs, a sick one and a healthy one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, layer in (("sick", torch.nn.Sigmoid), ("healthy", torch.nn.ReLU)):
        torch.manual_seed(0)
        hidden = [part for _ in range(12) for part in (torch.nn.Linear(32, 32), layer())]
        model = torch.nn.Sequential(*hidden, torch.nn.Linear(32, 4))
        for module in model:
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.kaiming_normal_(module.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with torchbp.watch(model, optimizer, log_dir=folder / name):
            for _ in range(60):
                x, y = torch.randn(64, 32), torch.randint(4, (64,))
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    return folder


SICK = {"runs/nightly", "runs/first", "runs/plain", "runs/demo/sigmoid"}
GPT = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.models import GPT
def make_gpt():
    return GPT(vocabulary=2000, width=64, depth=2, heads=2, length=128)
"""


def set_out(page, words, runs):
    """Put into the current folder what the command reads; return the exit status that is expected."""
    if words[0] == "report":
        named = [word for word in words if word.startswith("runs/")]
        for name in named:
            shutil.copytree(runs / ("sick" if name in SICK else "healthy"), name)
        return int(bool(SICK & {*named}))
    file, _, name = words[1].partition(":")
    blocks = [text for language, text in FENCE.findall(page.read_text()) if language == "python"]
    for text in blocks:
        if f"class {name}(" in text:
            imports = "import torch\nimport torchbp\nfrom torch.autograd import Function\n"
            own = text.split("print(")[0]
            Path(file).write_text(own if "import torch" in own else imports + own)
            return int(file == "wrong.py")
    Path(file).write_text(GPT.format(root=str(ROOT)))
    return 0


@pytest.mark.parametrize(("page", "line", "printed"), list(commands()))
def test_commands_run_and_print_what_the_page_says(
    page, line, printed, runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    _, *words = shlex.split(line, comments=True)
    expected = set_out(page, words, runs)
    assert main(words) == expected
    if words[0] == "gradcheck":  # a report shows a run of the reader's own
        got = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(rounded(printed), rounded(got), ELLIPSIS), got


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
    named = set(re.findall(r"^(?:.* <)?([a-z-]+)>?$", "\n".join(trees), re.MULTILINE))
    assert {page.stem for page in PAGES} - named == {"index"}
