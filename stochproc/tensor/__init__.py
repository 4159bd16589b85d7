"""Functional tensor decompositions and state-space Gaussian processes, in time linear in the number of data."""

from stochproc.tensor._dense import from_dense
from stochproc.tensor._functional_estimators import FunctionalCP, FunctionalTucker
from stochproc.tensor._latent_display import LatentDisplay
from stochproc.tensor._modes import Mode
from stochproc.tensor._state_space_gp import StateSpaceGP

__all__ = ["FunctionalCP", "FunctionalTucker", "LatentDisplay", "Mode", "StateSpaceGP", "from_dense"]
