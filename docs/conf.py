"""How Sphinx builds these pages. First run Doxygen in this folder: breathe reads what it writes."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from numpydoc.xref import DEFAULT_LINKS

import bnbp

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bnbp"
author = "the bnbp developers"
release = version = version_of("bnbp")  # of the installed package, which is also the one autodoc imports

extensions = [
    "access",
    "breathe",
    "command_line",
    "describe",
    "figures",
    "mathml",
    "measured",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
highlight_language = "python"

html_theme = "furo"
html_title = f"bnbp {release}"
html_static_path = ["_static"]
html_css_files = ["bnbp.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = False

# Colours of code whose contrast is enough on furo's backgrounds.
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

copybutton_prompt_text = r">>> |\.\.\. |\$ "  # neither these nor what a program has printed is copied
copybutton_prompt_is_regexp = True

breathe_projects = {"bnbp": "_build/doxygen"}
breathe_default_project = "bnbp"
breathe_show_include = False  # each page would repeat the one header
cpp_maximum_signature_line_length = python_maximum_signature_line_length = 88

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, and which types go together
autosummary_generate = False  # the pages of the functions are written by hand
numpydoc_show_class_members = False  # the pages list the members that a reader needs

# The types of results are links. No other word of a type is: Python's and NumPy's own pages are elsewhere.
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {word: word for word in DEFAULT_LINKS} | {
    name: f"{module.__name__}.{name}"
    for module in (bnbp, bnbp.exact)
    for name in module.__all__
    if isinstance(getattr(module, name), type)
}

# What no page of ours documents. (Links to other projects would need the network during the build.)
nitpick_ignore_regex = [
    (r"cpp:.*", r"std(::.*)?|(u?int|size|ptrdiff)\d*_t"),  # the C++ standard library
    (r"cpp:identifier", r"bnbp(::op)?"),  # namespaces, which breathe does not declare
    (r"py:.*", r"numpy\..*"),  # NumPy
]
