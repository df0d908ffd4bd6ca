"""The arrows between the parts, and that importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchbp"

# part -> the parts of torchbp it may import, besides itself
ARROWS = {
    "ops": set(),
    "functional": {"ops"},
    "nn": {"ops", "functional"},
    "swap": {"ops"},
    "recompute": {"ops", "swap", "_random"},
    "verify": {"_random"},
    "monitor": {"tensorboard", "_random"},
    "tensorboard": set(),
    "_random": set(),
}
FOREIGN = {"verify": {"tensorboard"}, "ops": {"tensorboard", "numpy"}, "tensorboard": {"torch"}}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ARROWS:
            yield part, path


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            module = node.module or ""
            names |= {f"{module}.{a.name}" for a in node.names} if module == "torchbp" else {module}
    return names


@pytest.mark.parametrize(
    ("part", "path"), list(sources()), ids=lambda v: v.name if isinstance(v, Path) else v
)
def test_arrows(part, path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in FOREIGN.get(part, set()), f"{path} imports {name}"
        if top == "torchbp" and rest:
            assert rest.split(".")[0] in ARROWS[part] | {part}, f"{path} imports {name}"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import torchbp; dir(torchbp)", {"torch", "tensorboard", "numpy"}),
        ("import torchbp; torchbp.nn.Linear; torchbp.watch; torchbp.gradcheck", {"tensorboard"}),
        ("import torchbp.tensorboard", {"torch"}),
        ("import torchbp; torchbp.tensorboard", {"torch"}),
    ],
)
def test_imports_are_light(statement, absent):
    assert not absent & modules_after(statement)


def test_public_face():
    import torchbp

    for name in torchbp.__all__:
        assert getattr(torchbp, name) is not None
        assert name in dir(torchbp)
    for part in ("monitor", "swap", "tensorboard"):
        assert getattr(torchbp, part).__name__ == f"torchbp.{part}"
    with pytest.raises(AttributeError, match="has no attribute 'sigmoid'"):
        _ = torchbp.sigmoid


def test_names_not_written_by_hand_are_torchs_own():
    import torch

    import torchbp

    for ours, theirs in ((torchbp.nn, torch.nn), (torchbp.functional, torch.nn.functional)):
        missing = [n for n in dir(theirs) if not n.startswith("_") and not hasattr(ours, n)]
        assert not missing
        assert set(dir(ours)) >= {n for n in dir(theirs) if not n.startswith("_")}
    assert torchbp.nn.Conv2d is torch.nn.Conv2d
    assert torchbp.functional.conv2d is torch.nn.functional.conv2d
    assert torchbp.nn.functional is torchbp.functional


def test_private_names_are_torchs_own():
    import torch

    import torchbp
    from torchbp.functional import _in_projection_packed

    assert _in_projection_packed is torch.nn.functional._in_projection_packed
    assert torchbp.nn._reduction is torch.nn._reduction
    for module, name in ((torchbp.functional, "_nothing"), (torchbp.nn, "nothing")):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute"):
            getattr(module, name)


def test_submodules_are_torchs_own():
    import torch.nn.utils.prune
    import torchbp.nn.utils.prune
    from torchbp.nn.utils.rnn import PackedSequence

    import torchbp.nn.functional as F

    assert F is torchbp.functional
    assert PackedSequence is torch.nn.utils.rnn.PackedSequence
    assert torchbp.nn.utils.prune is torch.nn.utils.prune
    assert torch.nn.utils.prune.__spec__.name == "torch.nn.utils.prune"
    with pytest.raises(ModuleNotFoundError, match=r"torchbp\.nn\.nothing"):
        __import__("torchbp.nn.nothing")
