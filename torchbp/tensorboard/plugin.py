"""The tab's server side: routes that answer what the page asks for, see README.md in this folder.

Every failure in a route is answered as ``{"error": sentence}``; none reaches TensorBoard.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from torchbp.tensorboard._book import Book, Page
from torchbp.tensorboard._layout import PLUGIN
from torchbp.tensorboard._matrix import PLANES, Matrix, matrix, profile
from torchbp.tensorboard._vector import Scalar, Vector

__all__ = ["Plugin"]

_STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_REMOTE = re.compile(r"[a-zA-Z][0-9a-zA-Z.]*://")
_MOST_COLUMNS = 20_000
_log = logging.getLogger(__name__)


class _Refused(Exception):  # noqa: N818  # an answer, not an error of ours
    """What can't be answered: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Plugin(base_plugin.TBPlugin):
    """The tab "Grad flow".

    Args:
        context: TensorBoard's; of it only the log directory is used.
    """

    plugin_name = PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        roots, self._remote = _roots(context)
        self._shown = ", ".join(str(root) for _, root in roots)
        self._book = Book(roots)
        # A white list, so that no name leads anywhere else.
        self._static = {p.name: p for p in _STATIC.iterdir() if p.suffix in _TYPES}

    def is_active(self) -> bool:
        """Whether there is anything of ours below the log directory."""
        try:
            return self._book.any_of_ours()
        except OSError:
            return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's title and its first script."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="Grad flow")

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return what answers which route."""
        return {
            "/runs": _application(self._runs),
            "/overview": _application(self._overview),
            "/matrix": _application(self._matrix),
            "/profile": _application(self._profile),
            "/static/*": _application(self._file),
        }

    def _runs(self, _: Request) -> dict[str, Any]:
        lines, unread = self._book.lines()
        message = self._remote
        if unread:
            message = f"{unread} more folders are still to be read; reload to go on"
        return {"logdir": self._shown, "message": message, "runs": lines}

    def _overview(self, request: Request) -> dict[str, Any]:
        return self._page(request).overview()

    def _matrix(self, request: Request) -> bytes:
        version, quantity = self._quantity(request)
        argument = request.args.get
        planes = [p for p in argument("planes", "").split(",") if p] or list(PLANES)
        if not set(planes) <= set(PLANES):
            raise _Refused(400, f"expected planes of {', '.join(PLANES)}, got {','.join(planes)}")
        columns = _number(request, "columns", 1000)
        if not 1 <= columns <= _MOST_COLUMNS:
            raise _Refused(400, f"expected 1 to {_MOST_COLUMNS} columns, got {columns:g}")
        part = matrix(
            quantity,
            first=_number(request, "first", -float("inf")),
            last=_number(request, "last", float("inf")),
            columns=int(columns),
            planes=planes,
            entries=_entries(request, len(quantity.names)),
        )
        return _encoded(part, request, version)

    def _profile(self, request: Request) -> bytes:
        version, quantity = self._quantity(request)
        return _encoded(profile(quantity, _number(request, "step", 0)), request, version)

    def _file(self, request: Request) -> Response:
        name = request.path.rpartition("/")[2]
        path = self._static.get(name)
        if path is None:
            raise _Refused(404, f"no such file: {name}")
        return http_util.Respond(request, path.read_bytes(), _TYPES[path.suffix])

    def _page(self, request: Request) -> Page:
        run = request.args.get("run", "")
        page = self._book.page(run)
        if page is None:
            raise _Refused(404, f"no run {run!r} in {self._shown}; it may have been deleted")
        return page

    def _quantity(self, request: Request) -> tuple[str, Vector | Scalar]:
        name = request.args.get("quantity", "")
        version, quantities = self._page(request).quantities()
        if name not in quantities:
            run = request.args.get("run", "")
            raise _Refused(404, f"no quantity {name!r} in run {run!r}")
        return version, quantities[name]


def _application(answer: Callable[[Request], Any]) -> Callable[..., Any]:
    """Return a WSGI application of a function; whatever it raises is answered as JSON."""

    @Request.application
    def application(request: Request) -> Response:
        try:
            content = answer(request)
        except _Refused as refused:
            error = {"error": str(refused)}
            return http_util.Respond(request, error, "application/json", refused.status)
        except Exception as failure:
            _log.exception("torchbp: %s", request.path)
            error = {"error": f"{type(failure).__name__}: {failure}"}
            return http_util.Respond(request, error, "application/json", 500)
        if isinstance(content, Response):
            return content
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        return http_util.Respond(request, content, kind)

    return application


def _encoded(part: Matrix, request: Request, version: str) -> bytes:
    run, quantity = request.args["run"], request.args["quantity"]
    return part.encoded(run=run, quantity=quantity, version=version)


def _number(request: Request, name: str, default: float) -> float:
    text = request.args.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        _refuse_number(name, text)
    if number != number:  # noqa: PLR0124  # NaN
        _refuse_number(name, text)
    return number


def _refuse_number(name: str, text: str) -> NoReturn:
    raise _Refused(400, f"expected a number for {name}, got {text!r}")


def _entries(request: Request, count: int) -> list[int] | None:
    text = request.args.get("entries")
    if not text:
        return None
    try:
        entries = [int(part) for part in text.split(",")]
    except ValueError:
        raise _Refused(400, f"expected numbers for entries, got {text!r}") from None
    if not all(0 <= entry < count for entry in entries):
        raise _Refused(400, f"expected entries from 0 to {count - 1}, got {text!r}")
    return entries


def _roots(context: base_plugin.TBContext) -> tuple[list[tuple[str, Path]], str]:
    """Return the local log directories with their names, and a sentence where there are others."""
    flags = context.flags
    specification = getattr(flags, "logdir_spec", "") or ""
    named: list[tuple[str, str]] = []
    if specification and not context.logdir:
        for part in specification.split(","):
            # As TensorBoard parses it: NAME:PATH, where it is no URL and no path with a colon.
            name, colon, path = part.partition(":")
            plain = not colon or part.startswith("/") or _REMOTE.match(part)
            named.append(("", part) if plain else (name, path))
    elif context.logdir:
        named = [("", context.logdir)]
    remote = [path for _, path in named if _REMOTE.match(path)]
    message = ""
    if remote:
        message = f"this tab reads local folders only, not {', '.join(remote)}; copy the runs here"
    local = [(name, Path(path).expanduser()) for name, path in named if not _REMOTE.match(path)]
    return [(name, path.resolve()) for name, path in local], message
