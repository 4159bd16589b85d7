"""Entropic optimal transport that stays fast and exact when the regularisation is weak."""

from stochproc.ot._barycenter import barycenter
from stochproc.ot._batch import solve_batch
from stochproc.ot._display import TransportDisplay
from stochproc.ot._dist import dist
from stochproc.ot._divergence import sinkhorn_divergence
from stochproc.ot._emd import emd, emd2
from stochproc.ot._lazy_plan import LazyPlan
from stochproc.ot._outcome import OTState
from stochproc.ot._pot import sinkhorn, sinkhorn2
from stochproc.ot._result import OTResult
from stochproc.ot._solve import solve
from stochproc.ot._solve_sample import solve_sample
from stochproc.ot._transport import SinkhornTransport
from stochproc.ot._wasserstein_1d import wasserstein_1d
from stochproc.ot._wasserstein_hist import wasserstein_hist

__all__ = [
    "LazyPlan",
    "OTResult",
    "OTState",
    "SinkhornTransport",
    "TransportDisplay",
    "barycenter",
    "dist",
    "emd",
    "emd2",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_divergence",
    "solve",
    "solve_batch",
    "solve_sample",
    "wasserstein_1d",
    "wasserstein_hist",
]
