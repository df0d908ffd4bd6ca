"""How ``make docs`` builds the site: Markdown by MyST, the reference from docstrings, furo's theme."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "torchbp"
author = "The torchbp authors"
copyright = f"{author}, MIT licence"  # noqa: A001
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_reference",
]
exclude_patterns = ["pictures"]

myst_heading_anchors = 3
nitpicky = False  # torch's names are not looked up: the site is built without a network

autodoc_mock_imports = ["lightning", "transformers"]  # of the callbacks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # prose: what stands before its first colon is not a type

html_math_renderer = "mathml"  # of _reference.py
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = "torchbp"
html_copy_source = False
html_show_sphinx = False
