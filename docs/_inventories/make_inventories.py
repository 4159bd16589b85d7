"""Write the inventories beside this file: where each name that the documentation links to lives on the web.

The documentation is built without a network, so intersphinx reads these files instead of fetching the
projects' own. They hold only names we refer to. To link to a new one, add it below and run this script: it
imports every name, so that a misspelt one fails here and not on a reader.
"""

import importlib
import zlib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Project(NamedTuple):
    """Where a project documents its objects, and which of them we link to."""

    page: str
    """Page of an object below its site; uses ``{name}``, ``{module}``, its last word ``{section}``."""
    classes: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    labels: tuple[tuple[str, str, str], ...] = ()
    """Section labels, each with its page and title."""
    elsewhere: tuple[tuple[str, str], ...] = ()
    """Pairs of a name listed above and its own page, where the pattern does not fit."""


PROJECTS = {
    "python": Project(
        page="library/{module}.html#{name}",
        classes=(
            "collections.abc.Callable",
            "collections.abc.Sequence",
            "enum.Enum",
            "logging.Logger",
            "pathlib.Path",
            "typing.NamedTuple",
        ),
        functions=("functools.partial", "math.erf", "warnings.filterwarnings"),
        modules=("json", "logging", "math", "pathlib", "pickle", "warnings"),
        # Built-ins have one page a kind, and no module in their name.
        elsewhere=(
            ("bool", "library/functions.html#bool"),
            ("dict", "library/stdtypes.html#dict"),
            ("float", "library/functions.html#float"),
            ("int", "library/functions.html#int"),
            ("list", "library/stdtypes.html#list"),
            ("object", "library/functions.html#object"),
            ("slice", "library/functions.html#slice"),
            ("str", "library/stdtypes.html#str"),
            ("tuple", "library/stdtypes.html#tuple"),
            ("ImportError", "library/exceptions.html#ImportError"),
            ("NotImplementedError", "library/exceptions.html#NotImplementedError"),
            ("RuntimeError", "library/exceptions.html#RuntimeError"),
            ("TypeError", "library/exceptions.html#TypeError"),
            ("UserWarning", "library/exceptions.html#UserWarning"),
            ("ValueError", "library/exceptions.html#ValueError"),
        ),
    ),
    "numpy": Project(
        page="reference/generated/{name}.html#{name}",
        classes=("numpy.ndarray", "numpy.random.Generator", "numpy.random.RandomState"),
        functions=("numpy.load", "numpy.savez", "numpy.linalg.eigh", "numpy.polynomial.hermite.hermgauss"),
        data=("numpy.float32", "numpy.float64"),
        elsewhere=(
            ("numpy.float32", "reference/arrays.scalars.html#numpy.float32"),
            ("numpy.float64", "reference/arrays.scalars.html#numpy.float64"),
            ("numpy.random.Generator", "reference/random/generator.html#numpy.random.Generator"),
            ("numpy.random.RandomState", "reference/random/legacy.html#numpy.random.RandomState"),
        ),
    ),
    "scipy": Project(
        page="reference/generated/{name}.html#{name}",
        classes=(
            "scipy.optimize.OptimizeResult",
            "scipy.sparse.csr_array",
            "scipy.sparse.linalg.LinearOperator",
        ),
        functions=(
            "scipy.integrate.quad",
            "scipy.linalg.cho_factor",
            "scipy.linalg.cho_solve",
            "scipy.linalg.expm",
            "scipy.optimize.brentq",
            "scipy.optimize.minimize",
            "scipy.sparse.linalg.cg",
            "scipy.sparse.linalg.spsolve",
            "scipy.special.gammaln",
            "scipy.special.logsumexp",
        ),
        data=("scipy.stats.burr12", "scipy.stats.halfcauchy", "scipy.stats.invgamma", "scipy.stats.t"),
    ),
    "torch": Project(
        page="generated/{name}.html#{name}",
        classes=(
            "torch.Generator",
            "torch.Tensor",
            "torch.autograd.Function",
            "torch.device",
            "torch.dtype",
            "torch.nn.Module",
            "torch.nn.modules.module.Module",
            "torch.nn.Parameter",
            "torch.nn.parallel.DistributedDataParallel",
            "torch.optim.Adam",
            "torch.optim.LBFGS",
        ),
        functions=(
            "torch.autograd.gradcheck",
            "torch.cdist",
            "torch.exp2",
            "torch.func.functional_call",
            "torch.linalg.cholesky",
            "torch.linalg.cholesky_ex",
            "torch.linalg.eigh",
            "torch.linalg.solve_triangular",
            "torch.logsumexp",
            "torch.no_grad",
            "torch.set_default_dtype",
            "torch.set_num_threads",
        ),
        modules=("torch.distributed", "torch.special"),
        elsewhere=(
            ("torch.Tensor", "tensors.html#torch.Tensor"),
            ("torch.device", "tensor_attributes.html#torch.device"),
            ("torch.dtype", "tensor_attributes.html#torch.dtype"),
            ("torch.nn.modules.module.Module", "generated/torch.nn.Module.html#torch.nn.Module"),
            ("torch.autograd.Function", "autograd.html#torch.autograd.Function"),
            ("torch.autograd.gradcheck", "generated/torch.autograd.gradcheck.gradcheck.html"),
            ("torch.nn.Parameter", "generated/torch.nn.parameter.Parameter.html"),
            ("torch.distributed", "distributed.html#module-torch.distributed"),
            ("torch.special", "special.html#module-torch.special"),
        ),
    ),
    "sklearn": Project(
        page="modules/generated/{name}.html#{name}",
        classes=(
            "sklearn.base.BaseEstimator",
            "sklearn.base.ClassifierMixin",
            "sklearn.base.RegressorMixin",
            "sklearn.base.TransformerMixin",
            "sklearn.compose.TransformedTargetRegressor",
            "sklearn.gaussian_process.GaussianProcessRegressor",
            "sklearn.metrics.PredictionErrorDisplay",
            "sklearn.model_selection.GridSearchCV",
            "sklearn.multioutput.MultiOutputRegressor",
            "sklearn.pipeline.Pipeline",
            "sklearn.preprocessing.StandardScaler",
        ),
        functions=(
            "sklearn.base.clone",
            "sklearn.datasets.load_diabetes",
            "sklearn.metrics.r2_score",
            "sklearn.model_selection.cross_val_score",
            "sklearn.model_selection.train_test_split",
            "sklearn.utils.estimator_checks.check_estimator",
        ),
        exceptions=("sklearn.exceptions.ConvergenceWarning", "sklearn.exceptions.NotFittedError"),
        labels=(("r2_score", "modules/model_evaluation.html#r2-score", "R² score"),),
    ),
    "gpytorch": Project(
        page="{section}.html#{name}",
        classes=(
            "gpytorch.kernels.Kernel",
            "gpytorch.kernels.kernel.Kernel",
            "gpytorch.kernels.MaternKernel",
            "gpytorch.kernels.RBFKernel",
            "gpytorch.kernels.ScaleKernel",
            "gpytorch.likelihoods.GaussianLikelihood",
            "gpytorch.mlls.ExactMarginalLogLikelihood",
            "gpytorch.models.ApproximateGP",
            "gpytorch.models.ExactGP",
        ),
        elsewhere=(
            ("gpytorch.mlls.ExactMarginalLogLikelihood", "marginal_log_likelihoods.html"),
            ("gpytorch.kernels.kernel.Kernel", "kernels.html#gpytorch.kernels.Kernel"),
        ),
    ),
    "linear_operator": Project(
        page="linear_operator.html#linear_operator.LinearOperator",
        classes=(
            "linear_operator.LinearOperator",
            "linear_operator.operators.LinearOperator",
            "linear_operator.operators._linear_operator.LinearOperator",
        ),
    ),
    "matplotlib": Project(
        page="api/_as_gen/{name}.html#{name}",
        classes=("matplotlib.axes.Axes", "matplotlib.figure.Figure"),
        functions=("matplotlib.pyplot.subplots",),
        elsewhere=(
            ("matplotlib.axes.Axes", "api/axes_api.html#matplotlib.axes.Axes"),
            ("matplotlib.figure.Figure", "api/figure_api.html#matplotlib.figure.Figure"),
        ),
    ),
    "pandas": Project(
        page="reference/api/{name}.html#{name}",
        classes=("pandas.DataFrame", "pandas.DatetimeIndex", "pandas.Series"),
        functions=("pandas.read_csv",),
    ),
}


def find(name: str) -> object:
    """Import a dotted name; raises ImportError or AttributeError if there is no such thing."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    found = importlib.import_module("builtins")
    return getattr(found, name)


def lines(project: Project) -> list[str]:
    """Return one inventory line an object, sorted by name, then the labels."""
    pages = dict(project.elsewhere)
    roles = {
        "class": project.classes,
        "function": project.functions,
        "exception": project.exceptions,
        "data": project.data,
        "module": project.modules,
    }
    listed = {name: role for role, names in roles.items() for name in names}
    for name in pages:
        if name not in listed:
            # What is only in `elsewhere` is a built-in.
            listed[name] = "exception" if name.endswith(("Error", "Warning")) else "class"
    out = []
    for name, role in sorted(listed.items()):
        find(name)
        module = name if role == "module" else name.rpartition(".")[0]
        page = pages.get(name) or project.page.format(
            name=f"module-{name}" if role == "module" else name,
            module=module,
            section=module.rpartition(".")[2],
        )
        out.append(f"{name} py:{role} 1 {page} -")
    return out + [f"{name} std:label -1 {page} {title}" for name, page, title in project.labels]


def main() -> None:
    """Write one inventory a project, the same bytes each time."""
    for key, project in PROJECTS.items():
        body = "\n".join(lines(project)) + "\n"
        header = (
            "# Sphinx inventory version 2\n"
            f"# Project: {key}\n"
            "# Version: \n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        (HERE / f"{key}.inv").write_bytes(header.encode() + zlib.compress(body.encode(), 9))
        print(f"{key}: {body.count(chr(10))} names")


if __name__ == "__main__":
    main()
