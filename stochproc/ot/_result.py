"""What transport solvers return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc._base import Given
from stochproc._warnings import warn_caller
from stochproc.ot._form import Form
from stochproc.ot._inputs import read
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.solvers import Convergence, Status

__all__ = ["OTResult"]


class OTResult:
    r"""A solved transport problem; what is costly is computed on first access and kept.

    Arrays are of the caller's kind: NumPy for NumPy, and torch tensors of the caller's dtype, on the caller's
    device and, where an input requires gradients, in its autograd graph. Everything has a leading axis in a batch.

    Attributes
    ----------
    plan : array of shape (n, m)
        The transport plan.
    lazy_plan : array or operator
        The plan, or for point clouds without a stored cost an operator with ``@``, ``.T``, ``row(i)``,
        ``to_sparse(threshold)`` and ``shape``.
    sparse_plan : SciPy COO array or sparse torch tensor
        Entries above 1e-12 of the smaller of their two weights.
    potentials : tuple of arrays of shape (n,) and (m,)
        Dual potentials of the KL form, in the unit of the cost, with :math:`\sum_j b_j g_j = 0`.
    potential_a, potential_b : array
        The two, one by one.
    value : float
        Regularised cost, in the form asked for by ``reg_type``.
    value_linear : float
        :math:`\langle P, M \rangle`.
    dual_value : float
        Value of the dual at the potentials; a lower bound of the regularised cost.
    gap : float
        Primal value at the plan rounded to exact marginals, minus ``dual_value``; a certificate. Infinite where
        rounding would need a forbidden pair.
    lower_bound : float
        Lower bound of the cost without regularisation.
    marginals : tuple of arrays
        Sums of the rows and of the columns of the plan.
    marginal_a, marginal_b : array
        The two, one by one.
    err : float
        :math:`\|P 1 - a\|_1 + \|P^T 1 - b\|_1`, relative to the mass.
    n_iter : int
        Passes over the pairs.
    converged : bool
        Whether err is at most the tolerance.
    status : Status
        How the solver ended; a list in a batch.
    convergence : Convergence
        The same as other solvers report it.
    stats : dict
        Counts of passes, Newton steps, iterations of conjugate gradients, Sinkhorn steps and trial steps, and the
        seconds taken.
    log : list of tuple
        (eps, err) of each pass.
    reg : float
        Regularisation.
    method : str
        The solver that ran.
    """

    def __init__(
        self,
        form: Form,
        outcome: Outcome,
        tracker: Tracker,
        *,
        given: Given,
        reg: Any,
        reg_type: str = "KL",
        method: str = "newton",
    ) -> None:
        self._form, self._given, self._cache = form, given, {}  # type: tuple[Form, Given, dict[str, Any]]
        self.reg, self.reg_type, self.method = reg, reg_type, method
        self._graph = torch.is_grad_enabled()
        self.err, self.status = outcome.err, outcome.status
        self.stats, self.log = tracker.stats, tracker.log
        self.n_iter: Any = tracker.stats["passes"]
        worst, iterations = outcome.err, tracker.stats["passes"]
        if isinstance(outcome.err, Tensor):
            worst = float(outcome.err.max()) if outcome.err.numel() else 0.0
            iterations = int(iterations.max()) if isinstance(iterations, Tensor) and iterations.numel() else 0
        self.convergence = Convergence(iterations, worst, tracker.tol, message=outcome.message)

    @property
    def converged(self) -> Any:
        """Whether err is at most the tolerance."""
        if isinstance(self.status, list):
            return [status is Status.CONVERGED for status in self.status]
        return self.status is Status.CONVERGED

    def _kept(self, name: str, compute: Any) -> Any:
        if name not in self._cache:
            # What is kept is in the graph or not by what held at the solve, not by where it is first asked for.
            with torch.inference_mode(False), torch.set_grad_enabled(self._graph):
                self._cache[name] = compute()
        return self._cache[name]

    def _array(self, name: str, compute: Any) -> Any:
        return self._kept(name, lambda: self._out(compute()))

    def _out(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._out(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        out = self._given.back(value)
        # A 0-d array of NumPy is not a number to everybody.
        return out if self._given.is_torch or out.ndim else out[()]

    @property
    def plan(self) -> Any:
        """The transport plan (n, m)."""
        return self._array("plan", self._form.plan)

    @property
    def lazy_plan(self) -> Any:
        """The plan, or an operator that multiplies by it."""
        return self._array("lazy_plan", self._form.lazy_plan)

    @property
    def sparse_plan(self) -> Any:
        """The plan without its negligible entries."""
        return self._kept("sparse_plan", self._sparse)

    def _sparse(self) -> Any:
        plan = self._form.sparse_plan()
        if self._given.is_torch:
            return plan
        from scipy.sparse import coo_array

        rows, columns = plan.indices().cpu().numpy()
        return coo_array((plan.values().cpu().numpy(), (rows, columns)), shape=tuple(plan.shape))

    @property
    def potentials(self) -> tuple[Any, Any]:
        """Dual potentials of rows and columns, in the unit of the cost."""
        return self._array("potentials", self._form.potentials)

    @property
    def potential_a(self) -> Any:
        """Dual potential of the rows."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Any:
        """Dual potential of the columns."""
        return self.potentials[1]

    def _of_type(self, value: Tensor, shift: Tensor) -> Tensor:
        return value + shift.to(value.dtype) if self.reg_type == "entropy" else value

    @property
    def value(self) -> Any:
        """Regularised cost."""
        return self._array("value", lambda: self._of_type(self._form.value(), self._form.entropy_shift()))

    @property
    def value_linear(self) -> Any:
        """Cost of the plan, <P, M>."""
        return self._array("value_linear", self._form.value_linear)

    @property
    def dual_value(self) -> Any:
        """Value of the dual at the potentials."""
        return self._array(
            "dual_value", lambda: self._of_type(self._form.dual_value(), self._form.entropy_shift().detach())
        )

    @property
    def gap(self) -> Any:
        """Primal value at the rounded plan minus dual value: a certificate of both."""
        return self._kept("gap", self._gap)

    def _gap(self) -> Any:
        gap = (self._form.primal_value() - self._form.dual_value()).detach()
        return gap if gap.ndim else gap.item()

    @property
    def lower_bound(self) -> Any:
        """Lower bound of the cost without regularisation."""
        return self._array("lower_bound", self._form.lower_bound)

    @property
    def marginals(self) -> tuple[Any, Any]:
        """Sums of the rows and of the columns of the plan."""
        return self._array("marginals", self._form.marginals)

    @property
    def marginal_a(self) -> Any:
        """Sums of the rows of the plan."""
        return self.marginals[0]

    @property
    def marginal_b(self) -> Any:
        """Sums of the columns of the plan."""
        return self.marginals[1]

    def a_to_b(self, X: Any = None, *, values: Any = None) -> Any:
        r"""Map the first side to the second: to each row the mean of its partners.

        Parameters
        ----------
        X : array of shape (k, d), default=None
            New points, mapped by :math:`x \mapsto \sum_j \mathrm{softmax}_j((g_j - c(x, y_j)) / \varepsilon + \log
            b_j)\, y_j`; only where the problem was given by points. None takes the rows of the problem.
        values : array of shape (m, p), default=None
            What is averaged. None takes the points of the second side; a problem given by M, which has none,
            then returns the averaging weights themselves, (n, m).

        Returns
        -------
        array of shape (k, p)

        Raises
        ------
        ValueError
            If X is given for a problem that knows no metric, or shapes do not fit.
        """
        return self._images(X, values, forward=True)

    def b_to_a(self, Y: Any = None, *, values: Any = None) -> Any:
        """Map the second side to the first; the mirror image of :meth:`a_to_b`.

        Parameters
        ----------
        Y : array of shape (k, d), default=None
        values : array of shape (n, p), default=None

        Returns
        -------
        array of shape (k, p)

        Raises
        ------
        ValueError
            As in :meth:`a_to_b`.
        """
        return self._images(Y, values, forward=False)

    def _images(self, points: Any, values: Any, *, forward: bool) -> Any:
        name = "X" if forward else "Y"
        given, found = read(**{name: points, "values": values})
        if (points is not None or values is not None) and given.is_torch != self._given.is_torch:
            wanted = "torch tensors" if self._given.is_torch else "NumPy arrays"
            raise TypeError(f"{name} and values must be {wanted} like the inputs of the problem.")
        dtype = self._form.a.dtype
        where, averaged = (None if t is None else t.to(dtype) for t in (found[name], found["values"]))
        size = (self._form.b if forward else self._form.a).shape[-1]
        if averaged is not None and (averaged.ndim < 2 or averaged.shape[-2] != size):
            raise ValueError(f"values must have shape ({size}, p); got {tuple(averaged.shape)}.")
        return self._out(self._form.images(where, averaged, forward=forward))

    def __repr__(self) -> str:
        batch = f", {len(self.status)} items" if isinstance(self.status, list) else f", {self.status.value}"
        return (
            f"OTResult(method={self.method!r}{batch}, err={self.convergence.residual:.2e}, "
            f"n_iter={self.convergence.iterations})"
        )


def warn_unless_converged(result: OTResult) -> None:
    """Issue the one warning of a solve that did not reach its tolerance."""
    if torch.is_tensor(result.err) or result.converged is True:
        return
    from sklearn.exceptions import ConvergenceWarning

    warn_caller(
        f"transport did not converge (status '{result.status.value}'): {result.convergence.message}",
        ConvergenceWarning,
    )
