"""How Sphinx builds these pages. First run Doxygen in this folder: breathe reads what it writes."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "bnbp"
author = "the bnbp developers"
release = version = version_of("bnbp")  # of the installed package, which is also the one autodoc imports

extensions = ["breathe", "command_line", "figures", "mathml", "measured", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
exclude_patterns = ["_build"]
highlight_language = "python"

html_theme = "furo"
html_title = f"bnbp {release}"
html_static_path = ["_static"]
html_css_files = ["bnbp.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = False

breathe_projects = {"bnbp": "_build/doxygen"}
breathe_default_project = "bnbp"
breathe_show_include = False  # each page would repeat the one header
cpp_maximum_signature_line_length = python_maximum_signature_line_length = 88

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, and which types go together
numpydoc_show_class_members = False  # api.rst lists the members that a reader needs

# What no page of ours documents. (Links to other projects would need the network during the build.)
nitpick_ignore_regex = [
    (r"cpp:.*", r"std(::.*)?|(u?int|size|ptrdiff)\d*_t"),  # the C++ standard library
    (r"cpp:identifier", r"bnbp(::op)?"),  # namespaces, which breathe does not declare
    (r"py:.*", r"numpy\..*"),  # NumPy
]
