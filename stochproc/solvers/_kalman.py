"""Filtering and smoothing of state-space models given messages in information form."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice
from stochproc.solvers._kalman_blocks import Blocks
from stochproc.solvers._kalman_gradient import Run, log_normaliser
from stochproc.solvers._kalman_points import check_arguments, merge, transitions
from stochproc.solvers._kalman_smoothed import Smoothed
from stochproc.solvers._result import Convergence, Result, Status

__all__ = ["kalman_smoother"]

# From so many points on "auto" scans (table "crossover" of benchmarks/bench_solvers_kalman.py).
SCAN_FROM = 24
# Steps that a block of the scan takes one by one: few while calls are what costs, more when arithmetic does
# (table "block length" there).
SHORT_BLOCKS, LONG_BLOCKS = 8, 32
LONG_FROM = 1 << 14


def kalman_smoother(
    ss: Any,
    times: Float[Tensor, "*#batch n"],
    Lam: Float[Tensor, "*#batch n r r"],
    eta: Float[Tensor, "*#batch n r"],
    *,
    query: "Float[Tensor, '*#batch m'] | None" = None,
    mean: "Float[Tensor, '...'] | float | int" = 0.0,
    offset: "Float[Tensor, '*#batch n r'] | None" = None,
    method: str = "auto",
) -> Result[Smoothed]:
    r"""Condition a state-space model on messages about its outputs: filter, smoother and evidence in one pass.

    The outputs :math:`f_i = H x_i` at ``times`` get the messages
    :math:`\exp(\eta_i^\top f_i - \tfrac12 f_i^\top \Lambda_i f_i)`, which ``messages`` makes of noisy data. No matrix
    that may be singular is ever inverted: repeated times, processes without noise or with a known beginning,
    unobserved points (:math:`\Lambda_i = 0`) and precisions of any rank are ordinary cases.

    Parameters
    ----------
    ss : StateSpace
        The prior, of D states and r outputs. Only ``transition``, ``prior``, ``H`` and ``batch_shape`` are used.
    times : Tensor of shape (\*#batch, n)
        Non-decreasing, in the unit of time of ``ss``; n is at least 1. Several messages may have one time.
    Lam : Tensor of shape (\*#batch, n, r, r)
        Symmetric positive semidefinite precisions.
    eta : Tensor of shape (\*#batch, n, r)
        Linear parts. The two trailing axes are there also for r = 1.
    query : Tensor of shape (\*#batch, m), default=None
        Times, in any order, at which the outputs are wanted; None is ``times``. They become points without a
        message.
    mean : float or Tensor of shape () or (\*#batch, r), default=0
        Constant prior mean of the outputs.
    offset : Tensor of shape (\*#batch, n, r), default=None
        Write the messages around these values, :math:`\eta^\top (f - o) - \tfrac12 (f - o)^\top \Lambda (f - o)`. With
        the data as offset (``messages(..., around_data=True)``) the evidence of very precise data keeps its digits.
    method : {"auto", "sequential", "scan"}, default="auto"
        ``"sequential"`` goes through all points one by one; ``"scan"`` through many blocks side by side, and joins
        them by a parallel scan of logarithmic depth. They differ by rounding. ``"auto"`` scans from 24 points on.

    Returns
    -------
    Result[Smoothed]
        ``mean`` (\*batch, m, r), ``cov`` (\*batch, m, r, r) and ``log_z`` (\*batch,) and, computed when asked for,
        moments of the states; the batch is what all arguments broadcast to. ``log_z`` is differentiable once in
        all tensors and in what ``ss`` depends on, by a closed form; everything else is detached.

        ``status`` is ``CONVERGED``; ``BREAKDOWN`` if a precision is not symmetric positive semidefinite (its whole
        series is NaN); ``NONFINITE`` if the messages hold NaN or infinity or a result overflows; ``STAGNATED`` if
        rounding spoilt more than the tolerance, the square root of eps. ``convergence.residual`` is the largest
        disagreement of two blocks where they meet, or the largest variance that rounding made negative (it is
        returned as 0), relative to the scale of the outputs. ``convergence.iterations`` counts the steps taken one
        after the other. ``stats`` has ``method`` and, one entry a series, ``mismatch``, ``negative_variance``,
        ``indefinite`` and ``nonfinite``.

    Raises
    ------
    TypeError
        If ``ss`` is no state space, or a tensor is not float32 or float64, or dtypes or devices differ.
    ValueError
        If shapes do not fit, times are not finite or decrease, ``method`` is unknown, or a time lies before the
        beginning of ``ss``.

    Notes
    -----
    Time O(n D³), memory O(n D²). The filter takes the r outputs of a time one by one in coordinates in which their
    errors are independent, with Joseph's correction; the smoother is in Bryson-Frazier form. In float64, under noise
    of 1e-10 of the prior variance and steps of 1e-9, means and variances of Matern processes were right to 2e-12.

    References
    ----------
    .. [1] S. Sarkka and A. F. Garcia-Fernandez, "Temporal parallelization of Bayesian smoothers", IEEE TAC 2021.
    .. [2] G. J. Bierman, "Factorization Methods for Discrete Sequential Estimation", 1977 (adjoint smoother).

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Matern
    >>> from stochproc.solvers import kalman_smoother, messages
    >>> times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> Lam, eta, constant = messages(torch.tensor([1.0, -1.0], dtype=torch.float64), 0.1)
    >>> far = torch.tensor([0.5, 1e6], dtype=torch.float64)
    >>> posterior = kalman_smoother(Matern(nu=1.5).state_space(), times, Lam, eta, query=far).unwrap()
    >>> posterior.mean.squeeze(-1).abs() < 1e-12, posterior.cov[1].item()
    (tensor([True, True]), 1.0)
    """
    batch = check_arguments(ss, times, Lam, eta, query, mean, offset)
    check_choice("method", method, ("auto", "sequential", "scan"))
    points = merge(times, query, Lam, eta, offset)
    n, n_series = points.times.shape[-1], math.prod(batch)
    if method == "auto":
        method = "scan" if n >= SCAN_FROM else "sequential"
    blocks = Blocks(n, n_series, ss.H.shape[-1])
    if method == "scan":
        length = SHORT_BLOCKS if n * n_series < LONG_FROM else LONG_BLOCKS
        blocks = Blocks.of_length(n, n_series, ss.H.shape[-1], length)
    H = ss.H.to(times)
    A, Q = transitions(ss, points.times)
    P0 = ss.prior(points.times[..., 0])
    c = torch.as_tensor(mean, dtype=times.dtype, device=times.device).expand(
        *getattr(mean, "shape", ())[:-1], H.shape[0]
    )
    shift = _shift(mean, c, points.offset, n)

    def flat(x: Tensor, own: int) -> Tensor:
        tail = x.shape[x.ndim - own :]
        return x.expand(*batch, *tail).reshape(n_series, *tail)

    done, log_z, f, cov = log_normaliser(
        blocks,
        flat(P0, 2),
        flat(A, 3),
        flat(Q, 3),
        H,
        flat(points.Lam, 3),
        flat(points.eta, 2),
        None if shift is None else flat(shift, 2),
    )
    log_z, f, cov = log_z.reshape(batch), f.reshape(*batch, *f.shape[1:]), cov.reshape(*batch, *cov.shape[1:])
    status, convergence, stats = _verdict(done, log_z.detach(), f, cov)
    if shift is not None:
        f = f + c.detach().unsqueeze(-2)
    if query is not None:
        f, cov = _gather(f, points.positions, batch), _gather(cov, points.positions, batch)
    times, positions = points.times.detach().expand(*batch, n), points.positions.expand(*batch, -1)
    value = Smoothed(f, cov, log_z, times, positions, done)
    return Result(value, status, convergence, {"method": method, **stats})


def _shift(mean: "Tensor | float | int", c: Tensor, offset: "Tensor | None", n: int) -> "Tensor | None":
    """Around what the messages are written, relative to the prior mean c; None is zero."""
    if offset is not None:
        return offset - c.unsqueeze(-2)
    if isinstance(mean, Tensor) or mean != 0:
        return -c.unsqueeze(-2).expand(*c.shape[:-1], n, c.shape[-1])
    return None


def _gather(x: Tensor, positions: Tensor, batch: torch.Size) -> Tensor:
    inner = x.shape[len(batch) + 1 :]
    if positions.ndim == 1:
        return x.index_select(len(batch), positions)
    index = positions.reshape(*positions.shape, *[1] * len(inner))
    return x.gather(len(batch), index.expand(*batch, positions.shape[-1], *inner))


def _verdict(done: Run, log_z: Tensor, f: Tensor, cov: Tensor) -> tuple[Status, Convergence, dict[str, Tensor]]:
    """How it went, series by series and in all."""
    batch = log_z.shape
    indefinite, mismatch, negative = (
        x.reshape(batch) for x in (done.indefinite, done.mismatch, done.negative_variance)
    )
    finite = log_z.isfinite() & f.sum((-2, -1)).isfinite() & cov.sum((-3, -2, -1)).isfinite()
    nonfinite = ~finite & ~indefinite
    stats = {"mismatch": mismatch, "negative_variance": negative, "indefinite": indefinite, "nonfinite": nonfinite}
    tolerance = math.sqrt(torch.finfo(log_z.dtype).eps)
    error = torch.maximum(mismatch, negative).masked_fill(~finite, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
    residual, blocks = float(error.max()), done.blocks
    steps = blocks.length + blocks.n_blocks.bit_length() - 1
    status, message = Status.CONVERGED, ""
    if bool(nonfinite.any()):
        status = Status.NONFINITE
        message = f"the messages hold NaN or infinity, or a result overflows{_which(nonfinite)}"
    elif bool(indefinite.any()):
        status = Status.BREAKDOWN
        message = f"Lam is not symmetric positive semidefinite everywhere{_which(indefinite)}"
    elif residual > tolerance:
        status = Status.STAGNATED
        message = (
            f"rounding spoilt {residual:.2g} of the scale of the outputs{_which(error > tolerance)}; "
            "use float64, method='sequential', or less precise messages"
        )
    return status, Convergence(steps, residual, tolerance, message=message), stats


def _which(bad: Tensor) -> str:
    if bad.ndim == 0:
        return ""
    return f" ({int(bad.sum())} of {bad.numel()} series, the first at {tuple(bad.nonzero()[0].tolist())})"
