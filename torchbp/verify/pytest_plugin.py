"""pytest plugin: the fixture ``gradcheck`` and the marker ``@pytest.mark.gradcheck``.

A marked test function takes no arguments and returns ``(func, inputs)``; it becomes one test item per check. torch is
imported only once a fixture or a marker is used.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["gradcheck"]

MARK = "gradcheck"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradcheck-level``."""
    group = parser.getgroup("gradcheck")
    group.addoption(
        "--gradcheck-level",
        choices=("quick", "full"),
        default="full",
        help="which gradient checks run: quick or full (default: full)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(**options): the test returns (func, inputs); each gradient check is one test item",
    )


@pytest.fixture
def gradcheck(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """:func:`torchbp.gradcheck` at the level of ``--gradcheck-level``."""
    from torchbp.verify import gradcheck as check

    def run(func: Callable[..., Any], inputs: Any, **options: Any) -> Any:
        return check(
            func, inputs, **{"level": request.config.getoption("--gradcheck-level"), **options}
        )

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> Iterable[pytest.Item] | None:
    """Make one item per check of a marked test function."""
    marks = [m for m in getattr(obj, "pytestmark", ()) if m.name == MARK]
    if (
        not marks
        or not callable(obj)
        or isinstance(obj, type)
        or not collector.funcnamefilter(name)
    ):
        return None
    from torchbp.verify._check import all_checks

    options = marks[0].kwargs
    level = options.get("level") or collector.config.getoption("--gradcheck-level")
    checks = [c for c in all_checks().values() if c.level in ("quick", level)]
    if "differences" in options.get("skip", ()):
        checks = [c for c in checks if not c.differences]
    names = [c.name for c in checks]
    if options.get("checks"):
        names = (
            [options["checks"]] if isinstance(options["checks"], str) else list(options["checks"])
        )
    names = [n for n in names if n not in options.get("skip", ())]
    function = obj if not isinstance(collector, pytest.Class) else getattr(collector.obj(), name)
    return [
        _Item.from_parent(
            collector,
            name=f"{name}[{check}]",
            make=function,
            check=check,
            options=options,
            marks=list(getattr(obj, "pytestmark", ())),
        )
        for check in names
    ]


class _Item(pytest.Item):
    """One check of one marked function."""

    def __init__(
        self,
        *,
        make: Callable[[], Any],
        check: str,
        options: dict[str, Any],
        marks: list[pytest.Mark],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.make, self.check, self.options = make, check, options
        # skip, xfail, slow: the function's marks hold for each of its items.
        self.own_markers += marks
        self.keywords.update({mark.name: mark for mark in marks})

    def runtest(self) -> None:
        from torchbp.verify import gradcheck as check
        from torchbp.verify._check import NothingChecked

        func, inputs, *rest = self.make()
        options = {k: v for k, v in self.options.items() if k not in ("checks", "skip", "level")}
        kwargs = rest[0] if rest else None
        try:
            check(func, inputs, kwargs=kwargs, checks=self.check, **options)
        except NothingChecked as why:
            pytest.skip(str(why))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the finding alone, not a traceback of ours."""
        from torchbp.verify import GradientError

        if isinstance(excinfo.value, GradientError):
            return "\n\n".join(map(str, excinfo.value.report.wrong))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        code = getattr(self.make, "__code__", None)
        return self.path, code.co_firstlineno - 1 if code else None, self.name
