"""pytest plugin: the fixture ``gradcheck`` and the marker ``@pytest.mark.gradcheck``.

A marked test returns ``(func, inputs)``, or ``(func, inputs, kwargs)``; it is run once for each check, as one that is
parametrized over them: its fixtures, its other marks and parameters hold. torch is imported only once a fixture or a
marker is used.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest

__all__ = ["gradcheck"]

MARK = "gradcheck"
CHECK = "gradcheck_check"  # the parameter whose value is a check's name
OURS = ("kwargs", "raise_exception", "repeat")  # arguments of gradcheck that the plugin gives


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item per check of a marked test function."""
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None:
        return
    try:
        names = _names(mark, metafunc.config.getoption("--gradcheck-level"))
        if inspect.iscoroutinefunction(metafunc.function):
            raise ValueError(f"{MARK}: expected a test that returns, got one that is async")
    except ValueError as error:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {error}") from None
    metafunc.fixturenames.append(CHECK)
    metafunc.parametrize(CHECK, names)


def _names(mark: pytest.Mark, level: Any) -> list[str]:
    """Return the names of the checks that a mark asks for; raise ValueError where it cannot be read."""
    from torchbp.verify import gradcheck as check
    from torchbp.verify.request import chosen

    parameters = list(inspect.signature(check).parameters)[2:]  # after func and inputs
    known = [name for name in parameters if name not in OURS]
    if mark.args:
        raise ValueError(f"{MARK}: expected options by name, got {mark.args!r}; checks= names some")
    for name in mark.kwargs:
        if name not in known:
            raise ValueError(f"{MARK}: expected options among {', '.join(known)}, got {name!r}")
    given = mark.kwargs
    found = chosen(given.get("level", level), given.get("checks"), given.get("skip", ()))
    return [c.name for c in found]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Refuse a marked test that is not run once a check: nothing would be checked, and it would pass."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        checked = callspec is not None and CHECK in callspec.params
        if isinstance(item, pytest.Function) and item.get_closest_marker(MARK) and not checked:
            raise pytest.UsageError(
                f"{item.nodeid}: {MARK}: expected a function, or a method of a class that is no "
                "unittest.TestCase; move it out of that, or mark others alone"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Make one check of what a marked test returns."""
    mark = pyfuncitem.get_closest_marker(MARK)
    if mark is None:
        return None
    from torchbp.verify import gradcheck as check
    from torchbp.verify._check import NothingChecked

    names = inspect.signature(pyfuncitem.obj).parameters
    given = pyfuncitem.obj(**{n: x for n, x in pyfuncitem.funcargs.items() if n in names})
    func, inputs, kwargs = _returned(given, pyfuncitem.originalname)
    options = {k: v for k, v in mark.kwargs.items() if k not in ("checks", "level")}
    options["skip"] = [n for n in ("differences",) if n in options.get("skip", ())]
    name = str(pyfuncitem.callspec.params[CHECK])
    try:
        check(func, inputs, kwargs=kwargs, checks=name, **options)
    except NothingChecked as why:
        pytest.skip(str(why))
    return True


def _returned(given: Any, name: str) -> tuple[Callable[..., Any], Any, Mapping[str, Any] | None]:
    parts = list(given) if isinstance(given, (tuple, list)) else [given]
    func, inputs, kwargs, *more = [*parts, None, None][: max(3, len(parts))]
    right = len(parts) > 1 and callable(func) and not more
    if not right or not (kwargs is None or isinstance(kwargs, Mapping)):
        kinds = ", ".join(type(x).__name__ for x in parts)
        raise TypeError(
            f"{MARK}: expected (func, inputs) or (func, inputs, kwargs) from {name}, got ({kinds}); "
            "return what to check, several inputs as one tuple"
        )
    return func, inputs, kwargs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the finding alone, not a traceback of ours."""
    report = yield
    if call.excinfo is not None and report.failed and item.get_closest_marker(MARK):
        from torchbp.verify import GradientError

        if isinstance(call.excinfo.value, GradientError):
            report.longrepr = "\n\n".join(map(str, call.excinfo.value.report.wrong))
    return report
