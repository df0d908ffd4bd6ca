"""What TensorBoard imports at every start: the entry point, guarded.

TensorBoard loads entry points without a guard of its own: an exception here would stop all of it. So this
module imports nothing but TensorBoard's base class; what may fail is imported in :meth:`Loader.load`,
and a failure becomes a message in the tab. Never torch.
"""

import json
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from tensorboard.plugins import base_plugin

__all__ = ["Loader"]

_NAME, _TITLE = "torchbp", "Grad flow"


class Loader(base_plugin.TBLoader):
    """Loads the tab."""

    def fix_flags(self, flags: Any) -> None:
        """Ask TensorBoard to keep one of our vectors a tag, enough to know that there are some.

        We read the files ourselves; 1000 of each, of 2000 layers, would be 8 MB a tag for nothing.
        """
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(_NAME, 1)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin:
        """Return the plugin, or one that says why there is none."""
        try:
            return import_module("torchbp.tensorboard.plugin").Plugin(context)
        except Exception:  # whatever it is, TensorBoard goes on
            return _Excuse(traceback.format_exc())


class _Excuse(base_plugin.TBPlugin):
    """A tab that shows why ours can't be shown."""

    plugin_name = _NAME

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def is_active(self) -> bool:
        return False  # where there are data of ours, TensorBoard makes it so

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/excuse.js", tab_name=_TITLE)

    def get_plugin_apps(self) -> dict[str, Callable[..., Iterable[bytes]]]:
        return {"/excuse.js": self._script}

    def _script(self, _: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
        text = f"torchbp could not be loaded, so this tab is empty.\n\n{self._reason}"
        script = (
            "export function render() {\n"
            '  const shown = document.createElement("pre");\n'
            '  shown.style.whiteSpace = "pre-wrap";\n'
            f"  shown.textContent = {json.dumps(text)};\n"
            "  document.body.append(shown);\n"
            "}\n"
        ).encode()
        kind = ("Content-Type", "text/javascript; charset=utf-8")
        start_response("200 OK", [kind, ("X-Content-Type-Options", "nosniff")])
        return [script]
