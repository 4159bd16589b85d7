"""Tables and images that come with scikit-learn and statsmodels, each with a line on its licence."""

from typing import Any

import numpy as np

from stochproc.datasets._bunch import describe, need

__all__ = [
    "load_breast_cancer",
    "load_diabetes",
    "load_digits",
    "load_iris",
    "load_sample_images",
    "load_star98",
    "load_wine",
]

_UCI = "Creative Commons Attribution 4.0 (UCI machine learning repository); copy distributed by scikit-learn"


def load_digits(*, n_class: int = 10, return_X_y: bool = False) -> Any:
    """Load 1797 handwritten digits of 8 x 8 pixels, ten classes.

    Parameters
    ----------
    n_class : int, default=10
        Number of classes, from the digit 0 upwards, between 1 and 10.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (n, 64) with grey levels 0 to 16, ``images`` (n, 8, 8), ``target`` (n,) integers,
        ``feature_names``, ``target_names``, ``DESCR``. Nothing is missing.

    Examples
    --------
    >>> load_digits().data.shape
    (1797, 64)
    """
    return _from_sklearn("load_digits", "grey levels 0 to 16", _UCI, return_X_y, n_class=n_class)


def load_diabetes(*, scaled: bool = True, return_X_y: bool = False) -> Any:
    """Load the disease progression of 442 diabetes patients, ten features, regression.

    Parameters
    ----------
    scaled : bool, default=True
        Features centred and of unit sum of squares; False keeps their units.
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (442, 10), ``target`` (442,) between 25 and 346, ``feature_names``, ``DESCR``. Nothing is missing.

    Examples
    --------
    >>> X, y = load_diabetes(return_X_y=True)
    >>> X.shape, y.shape
    ((442, 10), (442,))
    """
    units = "progression one year after baseline, no unit; features without unit if scaled"
    licence = "published with Efron et al., Annals of Statistics 32 (2004); copy distributed by scikit-learn"
    return _from_sklearn("load_diabetes", units, licence, return_X_y, scaled=scaled)


def load_breast_cancer(*, return_X_y: bool = False) -> Any:
    """Load 569 breast tumours described by 30 features of cell nuclei, two classes.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (569, 30), ``target`` (569,) with 0 malignant and 1 benign, ``feature_names``, ``target_names``,
        ``DESCR``. Nothing is missing.
    """
    return _from_sklearn("load_breast_cancer", "pixels and shape ratios of the nuclei", _UCI, return_X_y)


def load_wine(*, return_X_y: bool = False) -> Any:
    """Load 13 chemical measurements of 178 wines from three cultivars.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (178, 13), ``target`` (178,) integers, ``feature_names``, ``target_names``, ``DESCR``. Nothing is
        missing.
    """
    return _from_sklearn("load_wine", "as in feature_names; alcohol in per cent by volume", _UCI, return_X_y)


def load_iris(*, return_X_y: bool = False) -> Any:
    """Load sepal and petal sizes of 150 irises of three species.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (150, 4) in centimetres, ``target`` (150,) integers, ``feature_names``, ``target_names``, ``DESCR``.
        Nothing is missing.
    """
    return _from_sklearn("load_iris", "centimetres", _UCI, return_X_y)


def load_star98(*, return_X_y: bool = False) -> Any:
    """Load test results and circumstances of 303 school districts of California in 1998, twelve features, regression.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(data, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (303, 12), ``target`` (303,) the percentage of pupils above the national median in mathematics,
        ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.

    Notes
    -----
    The products of features that come with the data, made for a linear model, are left out.
    """
    from sklearn.utils import Bunch

    frame = need("statsmodels.api", "load_star98").datasets.star98.load_pandas().data
    names = [name for name in frame.columns[2:] if "_" not in name]
    data = frame[names].to_numpy(dtype=np.float64)
    above, below = (frame[name].to_numpy(dtype=np.float64) for name in ("NABOVE", "NBELOW"))
    target = 100 * above / (above + below)
    if return_X_y:
        return data, target
    DESCR = describe(
        "Test results and circumstances of 303 school districts of California, 1998.",
        origin="J. Gill, Generalized Linear Models: A Unified Approach (2000), from the STAR programme",
        units="target in per cent of pupils; features in per cent, years, thousands of dollars and ratios",
        licence="the author retains all rights; distributed by statsmodels with his express permission",
    )
    return Bunch(data=data, target=target, feature_names=names, DESCR=DESCR)


def load_sample_images() -> Any:
    """Load two colour photographs of 427 x 640 pixels, a Chinese palace and a flower.

    Returns
    -------
    sklearn.utils.Bunch
        ``images`` (2, 427, 640, 3) bytes, ``data`` the same as float64 in [0, 1], ``names``, ``DESCR``.

    Examples
    --------
    >>> load_sample_images().data.shape
    (2, 427, 640, 3)
    """
    from sklearn.datasets import load_sample_images as load
    from sklearn.utils import Bunch

    raw = load()
    images = np.stack(raw.images)
    names = [str(name).replace("\\", "/").rpartition("/")[2].partition(".")[0] for name in raw.filenames]
    return Bunch(images=images, data=images / 255.0, names=names, DESCR=raw.DESCR)


def _from_sklearn(name: str, units: str, licence: str, return_X_y: bool, **options: Any) -> Any:
    from sklearn import datasets

    raw = getattr(datasets, name)(**options)
    if return_X_y:
        return raw.data, raw.target
    raw.DESCR = f"{raw.DESCR.rstrip()}\n\nUnits: {units}\nMissing values: none\nLicence: {licence}\n"
    return raw
