"""The page's modules as one script: a report has no URLs to import from.

The modules keep to a form (README.md in this folder) that makes this a matter of lines: imports are
dropped, ``export`` is dropped, and what a module needs is laid before it. So are comments that have
a line of their own, and indentation: a report is small.
"""

import re
from pathlib import Path

__all__ = ["bundle", "slim"]

_IMPORT = re.compile(r'import \{ [\w, ]+ \} from "\./([\w.-]+\.js)";')
_EXPORT = re.compile(r"export (?=(async function|function|const|class) )")
_STARTS = ("import ", "import{", "export ")


def bundle(entry: Path) -> str:
    """Return the module ``entry`` and all that it needs as one script.

    Raises:
        ValueError: A module does not keep to the form.
    """
    done: dict[str, str] = {}
    _lay(entry, done, ())
    return "\n".join(done.values())


def _lay(module: Path, done: dict[str, str], above: tuple[str, ...]) -> None:
    if module.name in above:
        raise ValueError(f"bundle: expected no cycle, got {' -> '.join((*above, module.name))}")
    if module.name in done:
        return
    lines = []
    for number, line in enumerate(_joined(module.read_text("utf-8")), 1):
        wanted = _IMPORT.fullmatch(line)
        if wanted:
            _lay(module.with_name(wanted[1]), done, (*above, module.name))
            continue
        kept = _EXPORT.sub("", line, count=1) if line.startswith("export ") else line
        if kept.startswith(_STARTS):
            message = (
                f'bundle: expected `import {{ a, b }} from "./x.js";` or `export` before a '
                f"declaration, got {line!r} ({module.name}, line {number})"
            )
            raise ValueError(message)
        lines.append(kept)
    text = "\n".join(lines)
    if "</script" in text.lower() or "<!--" in text:
        message = f"bundle: expected no </script and no <!-- in {module.name}; split the string"
        raise ValueError(message)
    done[module.name] = slim(text)


def _joined(text: str) -> list[str]:
    """Return the lines; an import that a formatter broke over several is one."""
    return re.sub(
        r"^import \{\s+([\w,\s]+?),?\s+\} from",
        lambda found: f"import {{ {' '.join(found[1].split())} }} from",
        text,
        flags=re.MULTILINE,
    ).splitlines()


def slim(text: str) -> str:
    """Return JavaScript or CSS without indentation and the comments that have lines of their own."""
    if any("\n" in string for string in re.findall(r"`(?:\\.|[^`\\])*`", text)):
        return text  # a line may belong to a string
    without = re.sub(r"^\s*/\*\*?(?:[^*]|\*(?!/))*\*/\s*$", "", text, flags=re.MULTILINE)
    lines = (line.strip() for line in without.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))
