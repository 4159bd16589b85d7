"""Real data out of installed packages, and generators whose truth is known.

``load_*`` reads data that scikit-learn, statsmodels, arch and tensorly carry with them (the last three are the
extra ``stochproc[data]``); nothing is ever downloaded. ``make_*`` draws float64 tensors from a model and returns
the model with them. All return a ``sklearn.utils.Bunch``, a dictionary whose keys are attributes too; missing
values are NaN.
"""

from stochproc.datasets._fractional import make_fractional_brownian
from stochproc.datasets._functional import make_functional_tensor
from stochproc.datasets._markets import (
    load_bond_yields,
    load_core_cpi,
    load_crude,
    load_french_factors,
    load_nasdaq,
    load_sp500,
    load_sp500_volatility,
    load_vix,
    load_wti,
)
from stochproc.datasets._measures import make_clouds, make_histograms
from stochproc.datasets._processes import make_gp_regression, make_student_t_process
from stochproc.datasets._series import load_co2, load_elnino, load_macrodata, load_nile, load_sunspots
from stochproc.datasets._tables import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_sample_images,
    load_star98,
    load_wine,
)
from stochproc.datasets._tensors import load_covid19_serology, load_il2, load_indian_pines, load_kinetic

__all__ = [
    "load_bond_yields",
    "load_breast_cancer",
    "load_co2",
    "load_core_cpi",
    "load_covid19_serology",
    "load_crude",
    "load_diabetes",
    "load_digits",
    "load_elnino",
    "load_french_factors",
    "load_il2",
    "load_indian_pines",
    "load_iris",
    "load_kinetic",
    "load_macrodata",
    "load_nasdaq",
    "load_nile",
    "load_sample_images",
    "load_sp500",
    "load_sp500_volatility",
    "load_star98",
    "load_sunspots",
    "load_vix",
    "load_wine",
    "load_wti",
    "make_clouds",
    "make_fractional_brownian",
    "make_functional_tensor",
    "make_gp_regression",
    "make_histograms",
    "make_student_t_process",
]
