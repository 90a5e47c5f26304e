"""The site: `sphinx-build -W --keep-going docs build/site`, or `tox -e docs`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

project = "cilnorm"
author = "The cilnorm developers"
copyright = author  # noqa: A001
release = version = version_of("cilnorm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "site_pages",
]
exclude_patterns = ["runs", "_ext", "sg_execution_times.rst"]
html_theme = "furo"
html_title = f"cilnorm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_heading_anchors = 4  # links such as norms.md#rows-in-any-order, as on GitHub
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
python_maximum_signature_line_length = 88
autodoc_mock_imports = ["avalanche"]
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py",
    "within_subsection_order": "FileNameSortKey",
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "reference_url": {},
}
if os.environ.get("CILNORM_SITE_LINKS"):  # names of torch become links; off, for a build must not need the network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
