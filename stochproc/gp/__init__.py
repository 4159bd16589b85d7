"""Gaussian processes whose covariance is multiplied by a random scale: Student-t and other scale mixtures."""

from stochproc.gp import arch
from stochproc.gp._classifier import ScaleMixtureGPClassifier
from stochproc.gp._displays import GPDisplay
from stochproc.gp._estimators import ScaleMixtureGPRegressor
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._exact_posterior import ExactPosterior
from stochproc.gp._independent import IndependentNoiseGP
from stochproc.gp._independent_posterior import IndependentPosterior
from stochproc.gp._independent_predictive import MixturePredictive
from stochproc.gp._large import LargeScaleMixtureGP
from stochproc.gp._large_posterior import LargePosterior
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import log_evidence
from stochproc.gp._scale_fit import fit_scale
from stochproc.gp._scale_gig import GIG
from stochproc.gp._scale_importance import ImportanceScale, importance_posterior
from stochproc.gp._scale_mixture import Mixture
from stochproc.gp._scale_posterior import ScalePosterior, scale_posterior
from stochproc.gp._scale_priors import (
    BurrXII,
    Delta,
    HalfCauchy,
    InverseGamma,
    as_scale_prior,
    scale_prior_from_config,
)
from stochproc.gp._scale_priors_light import Gamma, LogNormal
from stochproc.gp._scale_priors_sigma import HalfNormal, HalfStudentT
from stochproc.gp._svi import ScaleMixtureSVGP
from stochproc.gp._svi_links import LatentMarginals
from stochproc.gp._trained import TrainedLaw, trained_law
from stochproc.gp._trained_ensemble import TrainedEnsemble
from stochproc.gp._trained_flow import GradientFlow
from stochproc.gp._trained_network import KernelPair
from stochproc.gp._trained_solution import FlowSolution

__all__ = [
    "GIG",
    "BurrXII",
    "Delta",
    "ExactPosterior",
    "FlowSolution",
    "GPDisplay",
    "Gamma",
    "GradientFlow",
    "HalfCauchy",
    "HalfNormal",
    "HalfStudentT",
    "ImportanceScale",
    "IndependentNoiseGP",
    "IndependentPosterior",
    "InverseGamma",
    "KernelPair",
    "LargePosterior",
    "LargeScaleMixtureGP",
    "LatentMarginals",
    "LogNormal",
    "Mixture",
    "MixturePredictive",
    "Predictive",
    "ScaleMixtureGP",
    "ScaleMixtureGPClassifier",
    "ScaleMixtureGPRegressor",
    "ScaleMixtureSVGP",
    "ScalePosterior",
    "ScalePrior",
    "TrainedEnsemble",
    "TrainedLaw",
    "arch",
    "as_scale_prior",
    "fit_scale",
    "importance_posterior",
    "log_evidence",
    "scale_posterior",
    "scale_prior_from_config",
    "trained_law",
]
