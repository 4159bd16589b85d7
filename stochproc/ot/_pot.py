"""Drop-in replacements for the two main functions of POT, with its argument order and its extras."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stochproc.ot._result import OTResult
from stochproc.ot._solve import solve

__all__ = ["sinkhorn", "sinkhorn2"]


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str = "sinkhorn",
    numItermax: int | None = None,
    stopThr: float | None = None,
    verbose: bool | int = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Any, Any] | None = None,
    **options: Any,
) -> Any:
    r"""Return the entropic transport plan, with the arguments of ``ot.sinkhorn`` of POT.

    Parameters
    ----------
    a, b : array of shape (n,) and (m,)
        Weights of equal mass; empty or None is uniform.
    M : array of shape (n, m)
        Costs.
    reg : float
        Positive, in the unit of M.
    method : str, default="sinkhorn"
        Accepted for compatibility: every name of POT runs the default solver of :func:`solve`, which has the same
        solution; "newton", "sns" and "ssns" mean what they mean there.
    numItermax : int, default=None
        Passes over the pairs at most; None is 2000.
    stopThr : float, default=None
        Tolerance of err, the L1 distance of the marginals of the plan from a and b relative to the mass; None
        is 1e-9 (float64) or 1e-5 (float32).
    verbose : bool, default=False
        Show a progress bar.
    log : bool, default=False
        Also return a dict.
    warn : bool, default=True
        Whether failing to converge issues a warning.
    warmstart : pair of arrays, default=None
        Logarithms of the scalings to start from, ``(log u, log v)``.
    **options
        Of :func:`solve`.

    Returns
    -------
    array of shape (n, m)
        The plan; with ``log``, a pair of it and a dict with ``u``, ``v`` (scalings: the plan is
        ``u[:, None] * exp(-M / reg) * v``; where they do not fit floating point use the next two), ``log_u``,
        ``log_v``, ``alpha``, ``beta`` (``reg`` times those), ``err`` (list), ``niter`` and ``result``.

    Raises
    ------
    ValueError, TypeError
        As :func:`solve`.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If err is above the tolerance at the end and ``warn`` is set.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc import ot
    >>> ot.sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1.0).round(3)
    array([[0.366, 0.134],
           [0.134, 0.366]])
    """
    result = _run(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart, options)
    return (result.plan, _log_of(result, a, b)) if log else result.plan


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str = "sinkhorn",
    numItermax: int | None = None,
    stopThr: float | None = None,
    verbose: bool | int = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Any, Any] | None = None,
    **options: Any,
) -> Any:
    r"""Return the cost :math:`\langle P, M \rangle` of the entropic plan, with the arguments of POT's ``ot.sinkhorn2``.

    Parameters
    ----------
    a, b, M, reg, method, numItermax, stopThr, verbose, log, warn, warmstart, **options
        As in :func:`sinkhorn`.

    Returns
    -------
    float
        With ``log``, a pair of it and the dict of :func:`sinkhorn`.

    Raises
    ------
    ValueError, TypeError
        As :func:`solve`.

    Examples
    --------
    >>> from stochproc import ot
    >>> round(float(ot.sinkhorn2([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1.0)), 3)
    0.269
    """
    result = _run(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart, options)
    return (result.value_linear, _log_of(result, a, b)) if log else result.value_linear


def _run(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str,
    budget: int | None,
    tol: float | None,
    verbose: bool | int,
    warn: bool,
    warmstart: tuple[Any, Any] | None,
    options: dict[str, Any],
) -> OTResult:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    start = None
    if warmstart is not None:
        start = _start(warmstart, a, b, M, reg)
    own = ("newton", "sns", "ssns")
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore", ConvergenceWarning)
        return solve(
            M,
            _given(a),
            _given(b),
            reg,
            method=method if method in own else "auto",
            tol=tol,
            max_iter=budget,
            potentials_init=start,
            verbose=verbose,
            **options,
        )


def _given(weights: Any) -> Any:
    """Return weights, or None where POT means uniform ones."""
    return None if weights is None or len(weights) == 0 else weights


def _start(warmstart: Any, a: Any, b: Any, M: Any, reg: Any) -> tuple[Any, Any]:
    """Return the potentials that scalings stand for: exp(f / reg) a = u."""
    if not isinstance(warmstart, (tuple, list)) or len(warmstart) != 2:
        raise TypeError(f"warmstart must be a pair (log u, log v); got {type(warmstart).__name__}.")
    like = M if torch.is_tensor(M) else None
    out = []
    for name, log_scaling, weights in zip(("log u", "log v"), warmstart, (a, b), strict=True):
        part = (
            log_scaling.detach()
            if torch.is_tensor(log_scaling)
            else torch.as_tensor(np.array(log_scaling, dtype=float))
        )
        if _given(weights) is None:
            # Uniform weights only move the gauge.
            log_w = torch.zeros_like(part)
        else:
            log_w = torch.as_tensor(weights if torch.is_tensor(weights) else np.array(weights, dtype=float))
            log_w = torch.where(log_w > 0, log_w.detach(), 1.0).log()
            if log_w.shape != part.shape:
                raise ValueError(f"warmstart must hold {name} of shape {tuple(log_w.shape)}; got {tuple(part.shape)}.")
            # Weights of zero have scalings of zero, and nothing depends on them.
            part = torch.where(torch.as_tensor(part == -torch.inf) & (log_w == 0), 0.0, part)
        potential = float(reg) * (part - log_w)
        out.append(potential if like is not None else potential.numpy())
    return out[0], out[1]


def _log_of(result: OTResult, a: Any, b: Any) -> dict[str, Any]:
    """Return POT's dict: scalings, their logarithms, err and number of iterations."""
    f, g = result.potentials
    eps = result.reg
    form = result._form
    parts = []
    for potential, weights in ((f, form.a.detach()), (g, form.b.detach())):
        log_weights = weights.log()
        parts.append(potential / eps + (log_weights if torch.is_tensor(potential) else log_weights.cpu().numpy()))
    log_u, log_v = parts
    exp = torch.exp if torch.is_tensor(log_u) else np.exp
    with np.errstate(over="ignore"):
        u, v = exp(log_u), exp(log_v)
    return {
        "u": u,
        "v": v,
        "log_u": log_u,
        "log_v": log_v,
        "alpha": eps * log_u,
        "beta": eps * log_v,
        "err": [err for _, err in result.log],
        "niter": result.n_iter,
        "result": result,
    }
