"""What gradcheck hands back: findings, capabilities, and how they read."""

import json
import shutil
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Literal

from torch.autograd.gradcheck import GradcheckError

__all__ = ["Capability", "Finding", "GradientError", "Report", "Severity", "Status"]

Severity = Literal["wrong", "refusal", "note"]
Status = Literal["ok", "wrong", "refuses", "not applicable", "not run"]
MANY = 4  # checks that one thing keeps from running
NARROW = 40  # columns: less than that is no terminal to write for
_MARKS: dict[Status, str] = {
    "ok": "ok",
    "wrong": "WRONG",
    "refuses": "refuses",
    "not applicable": "-",
    "not run": "not run",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a check has to say.

    Attributes:
        check: Name of the check.
        severity: "wrong": a number contradicts another that is trusted. "refusal": the function refused loudly.
            "note": worth knowing, no more.
        message: What is wrong, how much of it and where it is worst, in one line.
        input: Which input's gradient, such as ``input 0`` or ``parameter weight``; ``None`` where no single one.
        index: Index of the worst element in that input.
        got: Value found there.
        expected: Value trusted there.
        ratio: ``got / expected``; ``None`` where it says nothing.
        cause: The likely cause, read from got and expected over all elements.
        repeat: A line to paste that runs this check alone, with its seed.
    """

    check: str
    severity: Severity
    message: str
    input: str | None = None
    index: tuple[int, ...] | None = None
    got: float | complex | None = None
    expected: float | complex | None = None
    ratio: float | complex | None = None
    cause: str | None = None
    repeat: str | None = None

    def __str__(self) -> str:
        lines = [f"[{self.check}] {self.message}"]
        if self.cause:
            lines.append(f"    likely cause: {self.cause}")
        if self.repeat and self.severity == "wrong":
            lines.append(f"    repeat:       {self.repeat}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Capability:
    """The outcome of one check.

    Attributes:
        status: "ok", "wrong", "refuses" (loudly), "not applicable" or "not run".
        seconds: Wall time the check took.
        detail: Why, where the status is not "ok".
        tests: What the check tests, in one line.
    """

    status: Status
    seconds: float
    detail: str = ""
    tests: str = ""


@dataclass(frozen=True)
class Report:
    """The result of :func:`torchbp.gradcheck`; falsy exactly when a finding is "wrong".

    Attributes:
        name: What was checked.
        findings: In the order of the checks: the first names the fault best.
        capabilities: Outcome of each check, by name.
        forwards: How often the function was called.
        backwards: How often its backward was.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    capabilities: dict[str, Capability] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0

    def __bool__(self) -> bool:
        return not self.wrong

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that are "wrong"."""
        return tuple(f for f in self.findings if f.severity == "wrong")

    def __str__(self) -> str:
        """One screen: what is wrong, then what refuses, then the outcome of every check.

        Wrapped to the width of the terminal; elsewhere, in a pipe or a log, one line each.
        """
        lines = [f"{self.name}: {self._verdict()}", ""]
        for finding in self.wrong:
            lines += [str(finding), ""]
        lines += [f"note: {f}" for f in self.findings if f.severity == "note"]
        for status, mark in _MARKS.items():
            names = [n for n, c in self.capabilities.items() if c.status == status]
            if not names:
                continue
            lines += [f"{mark:8} {line}" for line in self._listed(status, names)]
        return _wrapped("\n".join(lines).rstrip())

    def _listed(self, status: Status, names: list[str]) -> list[str]:
        """Return the names, with what they have to say where that matters: what keeps many from running does."""
        if status in ("ok", "wrong"):
            return [", ".join(names)]
        by_detail: dict[str, list[str]] = {}
        for name in names:
            by_detail.setdefault(self.capabilities[name].detail, []).append(name)
        least = MANY if status == "not applicable" else 1
        said = {d: some for d, some in by_detail.items() if len(some) >= least}
        left = [n for n in names if self.capabilities[n].detail not in said]
        lines = [f"{', '.join(some)}: {detail}" for detail, some in said.items()]
        return lines + ([", ".join(left)] if left else [])

    def _verdict(self) -> str:
        ran = sum(c.status in ("ok", "wrong") for c in self.capabilities.values())
        seconds = sum(c.seconds for c in self.capabilities.values())
        bad = len({f.check for f in self.wrong})
        if bad:
            return f"gradient wrong in {bad} of {ran} checks ({seconds:.2f} s)"
        return f"no fault found in {ran} checks ({seconds:.2f} s)"

    def to_json(self) -> str:
        """Return the whole report as a JSON object; complex numbers are written as text."""
        record = {
            "name": self.name,
            "ok": bool(self),
            "forwards": self.forwards,
            "backwards": self.backwards,
            "findings": [asdict(f) for f in self.findings],
            "capabilities": {n: asdict(c) for n, c in self.capabilities.items()},
        }
        return json.dumps(_plain(record), indent=2)

    def to_markdown(self) -> str:
        """Return the report as Markdown: the findings, then one table row a check."""
        lines = [f"## `{self.name}`: {self._verdict()}", ""]
        for finding in self.wrong:
            lines.append(f"- **{finding.check}**: {_in_one_line(finding.message)}")
            lines += [f"  - likely cause: {finding.cause}"] if finding.cause else []
            lines += [f"  - repeat: `{finding.repeat}`"] if finding.repeat else []
        lines += [f"- note: {f.message}" for f in self.findings if f.severity == "note"]
        lines += ["", "| check | outcome | ms | what |", "|---|---|---|---|"]
        for name, c in self.capabilities.items():
            what = _in_one_line(c.detail or c.tests).replace("|", "\\|")
            lines.append(f"| {name} | {c.status} | {1000 * c.seconds:.0f} | {what} |")
        return "\n".join(lines)


class GradientError(GradcheckError):
    """A wrong gradient; also a torch ``GradcheckError``.

    Attributes:
        report: The full :class:`Report`.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type["GradientError"], tuple[Report]]:
        return type(self), (self.report,)


def _wrapped(text: str) -> str:
    """Wrap lines with a hanging indent, where output goes to a terminal; a line to paste stays whole."""
    columns = shutil.get_terminal_size(fallback=(0, 0)).columns
    if columns < NARROW:
        return text
    lines = []
    for line in text.splitlines():
        table = line.split(" ")[0] in _MARKS.values()
        indent = " " * (18 if line.startswith("    likely") else 9 if table else 4)
        parts = textwrap.wrap(
            line,
            columns,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line] if line.startswith("    repeat:") or not parts else parts
    return "\n".join(lines)


def _in_one_line(text: str) -> str:
    """Return a text, such as torch's with its matrices, as one line."""
    return " ".join(text.split())


def _plain(value: object) -> object:
    """Return ``value`` in JSON's types; NaN and infinities, which JSON lacks, as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, complex) or (isinstance(value, float) and abs(value) == float("inf")):
        return str(value)
    return str(value) if value != value else value  # noqa: PLR0124  # NaN
