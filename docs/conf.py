"""How Sphinx makes a site of this folder; `make docs` builds it and stops at the first broken reference."""

from importlib import metadata

project = "pyro_lrblora"
author = "the pyro_lrblora authors"
version = release = metadata.version(project)
default_role = "code"  # what docstrings put in single backticks
smartquotes_action = "D"  # dashes; the quotes in docstrings are Python's

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    # Other projects, whose sites a build without a network cannot ask.
    ("py:.*", r"(torch|pyro|numpy|np|pandas|pd|transformers|datasets|collections|pathlib)\..*"),
    ("py:.*", r"Tensor|TorchDistribution|PyroModule"),
    # Internals that signatures name and no page shows.
    ("py:.*", r"pyro_lrblora\..*\.(_\w+|Bound\w+|DataPlate|Document|EcdfTest|Fisher|LearnedScale)"),
]

html_theme = "furo"
html_title = project
html_theme_options = {"light_css_variables": {"code-font-size": "75%"}}  # lines have up to 120 columns
html_show_copyright = False
