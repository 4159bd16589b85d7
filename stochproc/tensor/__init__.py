"""State-space Gaussian processes: exact regression in time, in time linear in the number of data."""

from stochproc.tensor._state_space_gp import StateSpaceGP

__all__ = ["StateSpaceGP"]
