"""The main function: solve a transport problem given by its costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_choice
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._dense_solve import METHODS, solve_dense
from stochproc.ot._form import Form
from stochproc.ot._gradients_unrolled import Unrolled, solve_unrolled
from stochproc.ot._inputs import DenseInputs, check_budget, read, read_dense
from stochproc.ot._outcome import OTState, Outcome, Tracker
from stochproc.ot._result import OTResult, warn_unless_converged
from stochproc.ot._unbalanced_solve import is_hard, read_rho, solve_unbalanced

__all__ = ["check_options", "check_unbalanced", "plain", "read_start", "solve", "solve_balanced"]


def solve(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: Any = None,
    *,
    reg_type: str = "KL",
    unbalanced: Any = None,
    method: str = "auto",
    tol: float | int | None = None,
    max_iter: int | None = None,
    potentials_init: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    round: bool = False,
    storage: str = "auto",
    callback: Callable[[OTState], bool | None] | None = None,
    verbose: bool | int = False,
) -> OTResult:
    r"""Solve entropic optimal transport between two weight vectors for a given matrix of costs.

    Minimises over plans P >= 0 with row sums a and column sums b

    .. math:: \langle P, M \rangle + \varepsilon \sum_{ij} P_{ij} \log \frac{P_{ij}}{a_i b_j},
       \qquad \varepsilon = \texttt{reg}.

    Parameters
    ----------
    M : array or Tensor of shape (n, m)
        Costs, of any sign, in any unit; ``+inf`` forbids a pair.
    a, b : array or Tensor of shape (n,) and (m,), default=None
        Non-negative weights of equal total mass; None is uniform, of mass 1. Zeros are allowed.
    reg : float or 0-d Tensor
        Positive, in the unit of M. For no regularisation see :func:`emd`.
    reg_type : {"KL", "entropy"}, default="KL"
        Whether ``value`` regularises by the divergence from :math:`a b^T`, as above, or by
        :math:`\sum P \log P`. The plan is the same.
    unbalanced : float or pair of floats, default=None
        Let mass be created and destroyed, at a price: weight rho of the divergences of the two marginals from a
        and b, in the unit of M; ``inf`` for a side that stays exact. None is balanced.
    method : {"auto", "newton", "sns", "sinkhorn", "ssns"}, default="auto"
        "newton" anneals reg and takes truncated Newton steps on the semi-dual, guarded by Sinkhorn steps; "sns" is
        Sinkhorn-Newton-Sparse as published [1]_; "ssns" is the safe and sparse Newton method [2]_; "sinkhorn"
        scales rows and columns in the log domain. "auto" is "sinkhorn" where costs differ by at most 10 reg and no
        pair is forbidden, else "newton".
    tol : float, default=None
        Largest err, the L1 distance of the marginals of the plan from a and b relative to the mass. None is 1e-9 in
        float64 and 1e-5 in float32.
    max_iter : int, default=None
        Passes over the pairs at most; None is 2000.
    potentials_init : pair of arrays (n,) and (m,), default=None
        Potentials to start from, such as ``potentials`` of a similar problem; dropped if they help less than
        starting afresh.
    grad : {"implicit", "envelope", "unroll"}, default="implicit"
        How results depend on M, a, b and reg in the autograd graph: "implicit" differentiates the optimum, for every
        output; "envelope" does so for ``value`` alone; "unroll" runs Sinkhorn sweeps inside the graph, for
        comparisons: derivatives of any order, at the memory of all sweeps.
    round : bool, default=False
        Round ``plan`` to one whose marginals are a and b to the last digit.
    storage : {"auto", "dense", "sparse"}, default="auto"
        "sparse" finishes on the entries of the plan that matter, checked by a full pass. "auto" does so from a million
        pairs on.
    callback : callable, default=None
        Called after every pass with an :class:`OTState`; returning True stops.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    OTResult
        Plan, potentials, values, certificates and how the solver ended; arrays of the kind, dtype and device of
        the inputs.

    Raises
    ------
    ValueError
        If an argument is out of its range, shapes do not fit, the masses differ, or a row or column with weight has
        no finite cost.
    TypeError
        If NumPy and torch, or devices, are mixed, or a dtype is neither integer, float32 nor float64.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If err is above tol at the end; the result is the best there is.

    Notes
    -----
    A pass costs O(n m); with the default method some 20 to 100 are needed down to reg of 1e-5 of the range of M. Memory
    is three arrays of the size of M beyond the input. float32 input is computed on in float32 while that can reach
    tol, which needs ``tol > 1e-8 range(M) / reg``, and in float64 beyond. Gradients of plan, potentials and
    ``value_linear`` solve one linear system; only ``value`` may be differentiated twice. Derivatives in a and b
    refer to changes that keep the masses equal.

    References
    ----------
    .. [1] X. Tang et al., "Accelerating Sinkhorn algorithms with sparse Newton iterations", ICLR 2024.
    .. [2] Z. Tang and Y. Qiu, "Safe and sparse Newton method for entropic-regularized optimal transport",
       NeurIPS 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc import ot
    >>> M = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> result = ot.solve(M, np.array([0.5, 0.5]), np.array([0.5, 0.5]), reg=0.1)
    >>> result.plan.round(4)
    array([[0.5, 0. ],
           [0. , 0.5]])
    >>> result.status.value, result.err < 1e-9
    ('converged', True)
    """
    check_options(reg_type=reg_type, method=method, grad=grad, storage=storage, callback=callback)
    soft = unbalanced is not None and not is_hard(unbalanced)
    inputs = read_dense(M, a, b, reg, balanced=not soft)
    budget = check_budget(tol, max_iter, inputs.M.dtype)
    start = read_start(potentials_init, inputs.a, inputs.b)
    rho = read_rho(unbalanced, inputs.M)
    tracker = Tracker(*budget, callback, verbose)
    form: Form
    if rho is not None:
        check_unbalanced(reg_type=reg_type, method=method, grad=grad, round=round)
        form, outcome = solve_unbalanced(inputs, rho, tracker, grad=grad, start=start)
        name = "newton"
    else:
        outcome, name, run = solve_balanced(inputs, tracker, method=method, start=start, storage=storage, grad=grad)
        form = DenseForm(inputs, outcome.f, outcome.g, grad=grad, rounded=round, run=run)
    result = OTResult(form, outcome, tracker, given=inputs.given, reg=plain(reg), reg_type=reg_type, method=name)
    warn_unless_converged(result)
    return result


def solve_balanced(
    inputs: DenseInputs,
    tracker: Tracker,
    *,
    method: str,
    start: tuple[Tensor, Tensor] | None,
    storage: str,
    grad: str,
) -> tuple[Outcome, str, Unrolled | None]:
    """Solve outside the graph or, for unrolled gradients of something, by sweeps inside it."""
    if grad == "unroll" and method not in ("auto", "sinkhorn"):
        raise ValueError(f"method must be 'auto' or 'sinkhorn' for grad='unroll'; got {method!r}.")
    if grad == "unroll" and torch.is_grad_enabled() and any(t.requires_grad for t in inputs[1:]):
        run, outcome = solve_unrolled(inputs, tracker, start)
        return outcome, "sinkhorn", run
    return *solve_dense(inputs, tracker, method=method, start=start, storage=storage), None


def check_unbalanced(*, reg_type: str, method: str, grad: str, round: bool) -> None:
    """Raise ValueError for what an unbalanced problem has no version of."""
    if method not in ("auto", "newton"):
        raise ValueError(f"method must be 'auto' or 'newton' for an unbalanced problem; got {method!r}.")
    if reg_type != "KL":
        # Where masses move, another reference measure has another plan.
        raise ValueError(f"reg_type must be 'KL' for an unbalanced problem; got {reg_type!r}.")
    if grad == "unroll":
        raise ValueError("grad must be 'implicit' or 'envelope' for an unbalanced problem; got 'unroll'.")
    if round:
        raise ValueError("round must be False for an unbalanced problem, which has no marginals to keep; got True.")


def check_options(*, reg_type: str, method: str, grad: str, storage: str = "auto", callback: Any = None) -> None:
    """Raise ValueError, listing the choices, for a word that is none of them."""
    check_choice("reg_type", reg_type, ("KL", "entropy"))
    check_choice("method", method, ("auto", *METHODS))
    check_choice("grad", grad, ("implicit", "envelope", "unroll"))
    check_choice("storage", storage, ("auto", "dense", "sparse"))
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function or None; got {type(callback).__name__}.")


def plain(reg: Any) -> Any:
    """Return reg as a number where it is one."""
    if isinstance(reg, Tensor):
        return float(reg.detach()) if reg.ndim == 0 else reg.detach()
    return float(reg)


def read_start(potentials: tuple[Any, Any] | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Check potentials to start from."""
    if potentials is None:
        return None
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise TypeError(f"potentials_init must be a pair (f, g); got {type(potentials).__name__}.")
    _, found = read(f=potentials[0], g=potentials[1])
    out = []
    for name, weights in (("f", a), ("g", b)):
        value = found[name]
        if value is None or value.shape != weights.shape:
            came = None if value is None else tuple(value.shape)
            raise ValueError(f"potentials_init must hold {name} of shape {tuple(weights.shape)}; got {came}.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"potentials_init must be finite; got NaN or infinity in {name}.")
        out.append(value.detach().to(a.device))
    return out[0], out[1]
