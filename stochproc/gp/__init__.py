"""Gaussian processes whose covariance is multiplied by a random scale: Student-t and other scale mixtures."""

from stochproc.gp._displays import GPDisplay
from stochproc.gp._estimators import ScaleMixtureGPRegressor
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._exact_posterior import ExactPosterior
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import log_evidence
from stochproc.gp._scale_fit import fit_scale
from stochproc.gp._scale_posterior import ScalePosterior, scale_posterior
from stochproc.gp._scale_priors import (
    BurrXII,
    Delta,
    HalfCauchy,
    InverseGamma,
    as_scale_prior,
    scale_prior_from_config,
)

__all__ = [
    "BurrXII",
    "Delta",
    "ExactPosterior",
    "GPDisplay",
    "HalfCauchy",
    "InverseGamma",
    "Predictive",
    "ScaleMixtureGP",
    "ScaleMixtureGPRegressor",
    "ScalePosterior",
    "ScalePrior",
    "as_scale_prior",
    "fit_scale",
    "log_evidence",
    "scale_posterior",
    "scale_prior_from_config",
]
