"""Configuration of the documentation; built without a network by ``make docs``."""

import importlib
import inspect
import os
import re

# Before anything imports pykeops: it would print a banner into the output of the tutorials.
os.environ.setdefault("PYKEOPS_VERBOSE", "0")
os.environ.setdefault("KEOPS_VERBOSE", "0")

from sphinx.util import logging

import stochproc

logger = logging.getLogger(__name__)

project = "stochproc"
author = "The stochproc developers"
copyright = author
release = version = stochproc.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_inventories", "tutorials", "**/sg_execution_times.rst"]
templates_path = ["_templates"]
default_role = None
nitpicky = True
# scikit-learn documents it without listing it in its inventory.
nitpick_ignore = [("py:class", "sklearn.base.OneToOneFeatureMixin")]

# Pages.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"stochproc {release}"
html_static_path = ["_static"]
html_css_files = ["stochproc.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
# One file with its fonts inside, so that mathematics is there without a network.
mathjax_path = "mathjax/tex-svg.js"

# API.
autosummary_generate = True
autodoc_member_order = "bysource"
# Types and shapes are in the docstrings, where they can be read; jaxtyping annotations in a signature cannot.
autodoc_typehints = "none"
# A method without a docstring of its own would show that of torch or scikit-learn.
autodoc_inherit_docstrings = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Links to other projects, from committed files; see _inventories/make_inventories.py.
intersphinx_mapping = {
    key: (site, f"_inventories/{key}.inv")
    for key, site in {
        "gpytorch": "https://docs.gpytorch.ai/en/stable/",
        "linear_operator": "https://linear-operator.readthedocs.io/en/stable/",
        "matplotlib": "https://matplotlib.org/stable/",
        "numpy": "https://numpy.org/doc/stable/",
        "pandas": "https://pandas.pydata.org/docs/",
        "python": "https://docs.python.org/3/",
        "scipy": "https://docs.scipy.org/doc/scipy/",
        "sklearn": "https://scikit-learn.org/stable/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

# Tutorials.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "auto_tutorials",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "write_computation_times": False,
    "min_reported_time": float("inf"),
    "show_signature": False,
    "capture_repr": (),
    "download_all_examples": False,
    "remove_config_comments": True,
    "reference_url": {"stochproc": None},
    "doc_module": ("stochproc",),
    "backreferences_dir": "api/generated/backreferences",
}


PARTS = [name for name in stochproc.__all__ if not name.startswith("_")]
# Public namespaces within a part come after it, each with its page.
PARTS.insert(PARTS.index("kernels") + 1, "kernels.duals")


def public_classes() -> dict[type, str]:
    """Return the one public path of every class of the library."""
    paths = {}
    for part in PARTS:
        module = importlib.import_module(f"stochproc.{part}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                paths[thing] = f"{module.__name__}.{name}"
    return paths


PUBLIC = public_classes()

# A docstring's example may use its own part without importing it, as in its module; a warning fails it.
doctest_global_setup = "\n".join(
    ["import warnings", "warnings.simplefilter('error', UserWarning)"]
    + [f"from stochproc.{part} import *" for part in PARTS]
)


def show_public_bases(app, name, obj, options, bases):
    """Name bases by their public path, and private ones by what they are made of."""

    def readable(base):
        if base in PUBLIC:
            return [f":py:class:`{PUBLIC[base]}`"]
        if base.__module__.startswith("stochproc"):
            return [found for above in base.__bases__ for found in readable(above)]
        return [] if base.__module__ in ("abc", "typing") else [base]

    shown = [found for base in obj.__bases__ for found in readable(base)]
    bases[:] = dict.fromkeys(base for base in shown if base is not object or len(shown) == 1)


def skip_foreign_members(app, what, name, obj, skip, options):
    """Leave out what a class inherits from torch, scikit-learn or GPyTorch, which document it."""
    # `score` is scikit-learn's own for most estimators, and people look for it.
    source = inspect.unwrap(obj.fget if isinstance(obj, property) else getattr(obj, "__func__", obj))
    module = getattr(source, "__module__", None) or "stochproc"
    if inspect.isroutine(source) and not module.startswith("stochproc") and name != "score":
        return True
    # scikit-learn makes these for metadata routing.
    return True if name.startswith("set_") and name.endswith("_request") else None


# A literal, or the star of a shape such as (*batch, n, d) outside one.
LITERAL_OR_STAR = re.compile(r"(``.*?``)|(?<=[( ])\*(?=#?[\w.]+[,)])")
# A reference that begins with an initial, such as "[1] C. E. Rasmussen".
INITIAL = re.compile(r"^(\s*\.\. \[\w+\] )(?=[A-Za-z]\. )")


def escape_shapes_and_initials(app, what, name, obj, options, lines):
    """Keep reST from reading the star of a shape as emphasis, and an initial as item C of a list."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "... ")):
            lines[i] = INITIAL.sub(r"\1\\", LITERAL_OR_STAR.sub(lambda m: m[1] or r"\*", line))


def require_api_pages(app, env):
    """Warn of every public name that no page of the API describes."""
    described = env.domains.python_domain.objects
    for part in PARTS:
        module = importlib.import_module(f"stochproc.{part}")
        for name in module.__all__:
            path = f"{module.__name__}.{name}"
            if path not in described:
                logger.warning("%s has no API page; add it to docs/api/%s.rst", path, part.split(".")[0])


def setup(app):
    """Connect the handlers above."""
    app.connect("env-check-consistency", require_api_pages)
    # Before numpydoc (priority 500), which rearranges the lines.
    app.connect("autodoc-process-docstring", escape_shapes_and_initials, priority=400)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("autodoc-skip-member", skip_foreign_members)
