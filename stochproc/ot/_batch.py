"""Many transport problems at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._checks import check_choice
from stochproc._warnings import warn_caller
from stochproc.ot._batch_form import BatchForm, BatchResult, RaggedForm
from stochproc.ot._batch_inputs import read_ragged, read_ragged_start, read_stack, read_stack_start
from stochproc.ot._batch_newton import BatchOutcome, newton_batch
from stochproc.ot._dense_solve import solve_dense
from stochproc.ot._inputs import DenseInputs, check_budget
from stochproc.ot._outcome import OTState, Outcome, Tracker
from stochproc.ot._result import OTResult
from stochproc.solvers import Status

__all__ = ["solve_batch"]

# Dense factorisations of the smaller side beyond this cost more than conjugate gradients.
FACTOR_UP_TO = 512


def solve_batch(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: Any = None,
    *,
    reg_type: str = "KL",
    tol: float | int | None = None,
    max_iter: int | None = None,
    potentials_init: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    round: bool = False,
    callback: Callable[[OTState], bool | None] | None = None,
    verbose: bool | int = False,
) -> OTResult:
    r"""Solve many entropic optimal transport problems at once, each to its own end.

    Every item anneals, searches and stops by itself; a round of the solver sweeps all that are left together, which
    for problems of up to some hundred points is many times faster than one :func:`solve` after the other.

    Parameters
    ----------
    M : array or Tensor of shape (B, n, m) or (n, m), or list of B arrays (n_i, m_i)
        Costs, of any sign, in any unit; ``+inf`` forbids a pair. One matrix (n, m) is shared by all items and never
        copied for them. In a list sizes may differ.
    a, b : array or Tensor of shape (B, n) and (B, m), or (n,) and (m,), or lists, default=None
        Non-negative weights, of equal total mass in each item; None is uniform, of mass 1. Zeros are allowed.
    reg : float or array or Tensor of shape (B,)
        Positive, in the unit of M.
    reg_type : {"KL", "entropy"}, default="KL"
        Whether ``value`` regularises by the divergence from :math:`a b^T` or by :math:`\sum P \log P`. The plan is
        the same. POT's function of this name has "entropy" by default.
    tol : float, default=None
        Largest err of each item, the L1 distance of the marginals of the plan from a and b relative to the mass.
        None is 1e-9 in float64 and 1e-5 in float32.
    max_iter : int, default=None
        Passes over the pairs of an item at most; None is 2000.
    potentials_init : pair of arrays (B, n) and (B, m), or of lists, default=None
        Potentials to start from, such as ``potentials`` of similar problems; dropped for the items where they help
        less than starting afresh.
    grad : {"implicit", "envelope"}, default="implicit"
        How results depend on M, a, b and reg in the autograd graph: "implicit" differentiates the optimum, for every
        output; "envelope" does so for ``value`` alone.
    round : bool, default=False
        Round each plan to one whose marginals are a and b to the last digit.
    callback : callable, default=None
        Called after every round with an :class:`OTState` of the worst item; returning True stops all.
    verbose : bool, default=False
        Show a progress bar, one step a round.

    Returns
    -------
    OTResult
        Everything has a leading axis B; ``err``, ``gap`` and ``n_iter`` are tensors (B,), ``status`` and
        ``converged`` lists. For a list of problems, plans, potentials, marginals and images are lists of arrays.

    Raises
    ------
    ValueError
        If an argument is out of its range, shapes do not fit, the masses of an item differ, or a row or column with
        weight has no finite cost.
    TypeError
        If NumPy and torch, or devices, are mixed, or a dtype is neither integer, float32 nor float64.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        Once, if any item has an err above tol at the end; the results are the best there are.

    Notes
    -----
    A round costs O(n m + k^2 max(n, m)) an item, k = min(n, m), with a dense factorisation; where k is above 512, items
    are solved one by one. Beside a copy of M (for the removal of row minima), plans of the items at work take at most
    64 MB on the CPU (1 GiB on a GPU), however large B is; new items enter as others finish. On a GPU the host waits
    once a round for the sweep, and for the check of each factorisation. Items in float32 are solved in float32 as far
    as its rounding allows, then checked and, if need be, finished in float64.

    Examples
    --------
    >>> import torch
    >>> from stochproc import ot
    >>> M = (torch.eye(2) < 0.5).double().expand(3, 2, 2)
    >>> result = ot.solve_batch(M, reg=torch.tensor([0.1, 1.0, 10.0]))
    >>> result.plan[:, 0, 0]
    tensor([0.5000, 0.3655, 0.2625], dtype=torch.float64)
    >>> result.converged
    [True, True, True]
    """
    check_choice("reg_type", reg_type, ("KL", "entropy"))
    check_choice("grad", grad, ("implicit", "envelope"))
    form: BatchForm | RaggedForm
    if isinstance(M, (list, tuple)):
        ragged = read_ragged(M, a, b, reg)
        tracker = Tracker(*check_budget(tol, max_iter, ragged.dtype), callback, verbose)
        starts = read_ragged_start(potentials_init, ragged)
        solved = [_solve(group.inputs, tracker, starts[k] if starts else None) for k, group in enumerate(ragged.groups)]
        given, regs = ragged.given, ragged.reg
        pairs = zip(ragged.groups, solved, strict=True)
        form = RaggedForm(ragged, [BatchForm(u.inputs, x.f, x.g, grad=grad, rounded=round) for u, x in pairs])
        outcome = _merged(solved, form.order)
    else:
        inputs = read_stack(M, a, b, reg)
        tracker = Tracker(*check_budget(tol, max_iter, inputs.M.dtype), callback, verbose)
        outcome = _solve(inputs, tracker, read_stack_start(potentials_init, inputs))
        given, regs = inputs.given, inputs.reg
        form = BatchForm(inputs, outcome.f, outcome.g, grad=grad, rounded=round)
    tracker.close()
    tracker.stats.update(outcome.stats)
    # Each item has its own number of passes.
    tracker.stats["passes"] = outcome.n_iter
    about = _about(outcome)
    ended = Outcome(outcome.f, outcome.g, outcome.err, outcome.status, about)  # type: ignore[arg-type]
    regs = regs.detach()
    shown = float(regs) if regs.ndim == 0 else given.back(regs)
    result = BatchResult(form, ended, tracker, given=given, reg=shown, reg_type=reg_type, method="newton")
    if about:
        from sklearn.exceptions import ConvergenceWarning

        warn_caller(about, ConvergenceWarning)
    return result


@torch.no_grad()
def _solve(inputs: DenseInputs, tracker: Tracker, start: tuple[Tensor, Tensor] | None) -> BatchOutcome:
    """Solve problems of one size; the potentials are those of the caller's masses."""
    M, a, b = (t.detach() for t in inputs[1:4])
    if min(M.shape[-2:]) > FACTOR_UP_TO:
        return _one_by_one(inputs, tracker, start)
    a, b = a.double(), b.double()
    mass = a.sum(-1, keepdim=True)
    eps = inputs.reg.detach().expand(a.shape[0])

    def report(number: int, eps: float, err: float, dual_value: float) -> bool:
        del number
        return _relay(tracker, eps, err, dual_value)

    cost = M.unsqueeze(0) if M.ndim == 2 else M
    out = newton_batch(cost, a / mass, b / b.sum(-1, keepdim=True), eps, tracker.tol, tracker.max_iter, start, report)
    # The plan of mass s has a_i b_j of mass s^2.
    return out._replace(f=out.f - (eps * mass.squeeze(-1).log()).unsqueeze(-1))


def _relay(tracker: Tracker, eps: float, err: float, dual_value: float) -> bool:
    """Record a round; return whether the callback stops, or had stopped, the batch."""
    if tracker.ended is not Status.STOPPED:
        tracker.record(eps, err, dual_value)
    return tracker.ended is Status.STOPPED


def _one_by_one(inputs: DenseInputs, tracker: Tracker, start: tuple[Tensor, Tensor] | None) -> BatchOutcome:
    B = inputs.a.shape[0]
    ended, passes = [], []
    stats = dict.fromkeys(("newton", "cg", "sinkhorn", "line_search"), 0)
    for i in range(B):
        M = inputs.M if inputs.M.ndim == 2 else inputs.M[i]
        reg = inputs.reg if inputs.reg.ndim == 0 else inputs.reg[i]

        single = Tracker(
            tracker.tol, tracker.max_iter, lambda state: _relay(tracker, state.eps, state.err, state.dual_value)
        )
        problem = DenseInputs(inputs.given, M, inputs.a[i], inputs.b[i], reg)
        pair = None if start is None else (start[0][i], start[1][i])
        ended.append(solve_dense(problem, single, method="newton", start=pair)[0])
        passes.append(single.stats["passes"])
        for name in stats:
            stats[name] += single.stats[name]
    return BatchOutcome(
        torch.stack([x.f for x in ended]),
        torch.stack([x.g for x in ended]),
        torch.tensor([x.err for x in ended], dtype=torch.float64),
        [x.status for x in ended],
        [x.message for x in ended],
        torch.tensor(passes),
        stats,
    )


def _merged(solved: list[BatchOutcome], order: Tensor) -> BatchOutcome:
    """Return the outcomes of groups as one, without potentials, in the order of the list."""
    places = order.tolist()
    status = [s for x in solved for s in x.status]
    message = [s for x in solved for s in x.message]
    stats: dict[str, Any] = {}
    for x in solved:
        for name, count in x.stats.items():
            stats[name] = stats.get(name, 0) + count
    return BatchOutcome(
        solved[0].f,
        solved[0].g,
        torch.cat([x.err for x in solved])[order],
        [status[i] for i in places],
        [message[i] for i in places],
        torch.cat([x.n_iter for x in solved])[order],
        stats,
    )


def _about(outcome: BatchOutcome) -> str:
    """Return one sentence about the items that did not converge; empty if all did."""
    left = [i for i, status in enumerate(outcome.status) if status is not Status.CONVERGED]
    if not left:
        return ""
    worst = left[int(np.argmax(outcome.err[left].numpy()))]
    return (
        f"{len(left)} of {len(outcome.status)} transport problems did not converge; the worst is item {worst} "
        f"(status '{outcome.status[worst].value}'): {outcome.message[worst]}"
    )
