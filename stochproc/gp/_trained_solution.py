"""Gradient flow on one training set, solved by one symmetric eigendecomposition; matrices in, matrices out."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_same_kind
from stochproc._warnings import warn_caller
from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp._trained_flow import GradientFlow
from stochproc.solvers import cholesky_or_raise

__all__ = ["JITTER", "FlowSolution", "Rows"]

# Share of the mean diagonal of K(X, X) that is added where rounding made it singular; it adds that share times the
# squared weights of the training points to the variances.
JITTER = {torch.float32: 1e-6, torch.float64: 1e-10}
# A direction whose eigenvalue is zero to rounding stays untrained if training would multiply the rounding errors of
# the tangent kernel by more than this over its own size.
AMPLIFIED = 1e-3


class Rows(NamedTuple):
    """New points in the coordinates of the solution; ``FlowSolution.rows`` makes it.

    Parameters
    ----------
    tangent : Tensor of shape (m, n)
        Th(x, X) V.
    whitened : Tensor of shape (m, n)
        K(x, X) L^-T with K(X, X) = L L^T.
    """

    tangent: Float[Tensor, "m n"]
    whitened: Float[Tensor, "m n"]


@dataclass(frozen=True)
class FlowSolution:
    r"""Networks after training on one data set, as functions of kernel matrices.

    With :math:`Th(X, X) = V \operatorname{diag}(l) V^\top` and
    :math:`B = Th(x, X)\, V \operatorname{diag}(\phi(l)) V^\top` the output of a network that started as :math:`f_0` is
    :math:`f_0(x) + B (y - f_0(X))`. Over :math:`f_0 \sim N(0, s K)` it is normal with location B y and covariance s
    times that of :math:`f_0(x) - B f_0(X)`.

    Parameters
    ----------
    flow : GradientFlow
        How the networks were trained.
    eigenvalues : Tensor of shape (n,)
        Of the tangent kernel, ascending and non-negative.
    eigenvectors : Tensor of shape (n, n)
        V, by columns.
    targets : Tensor of shape (n, C)
        V^T y.
    root : Tensor of shape (n, n) or (n,)
        V^T L for a square root L of K(X, X); its diagonal where that is diagonal (read-out training).
    factor : Tensor of shape (n, n) or None
        L, lower triangular; None where ``root`` is diagonal.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import GradientFlow
    >>> K = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 1.0]], dtype=torch.float64)
    >>> solution = FlowSolution.of(GradientFlow(), K[:2, :2], None, torch.ones(2, dtype=torch.float64))
    >>> rows = solution.rows(K[2:, :2])
    >>> solution.location(rows)[:, 0], solution.variance(rows, K[2:, 2])
    (tensor([0.4667], dtype=torch.float64), tensor([0.7467], dtype=torch.float64))
    """

    flow: GradientFlow
    eigenvalues: Float[Tensor, " n"]
    eigenvectors: Float[Tensor, "n n"]
    targets: Float[Tensor, "n C"]
    root: Float[Tensor, "n *or_n"]
    factor: "Float[Tensor, 'n n'] | None"

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        flow: GradientFlow,
        kernel: Float[Tensor, "n n"],
        tangent: "Float[Tensor, 'n n'] | None",
        y: Float[Tensor, "n *outputs"],
    ) -> "FlowSolution":
        """Train on targets, given the kernel matrices of the training inputs.

        Parameters
        ----------
        flow : GradientFlow
            How to train.
        kernel : Tensor of shape (n, n)
            K(X, X), the covariance of the untrained networks at s = 1.
        tangent : Tensor of shape (n, n) or None
            Th(X, X), the tangent kernel at s = 1. None trains the last layer only, whose tangent kernel is K.
        y : Tensor of shape (n,) or (n, C)
            Targets; C outputs share kernels and scale.

        Raises
        ------
        ValueError
            If shapes do not fit or an entry is not finite.
        NotPositiveDefiniteError
            If a matrix has an eigenvalue that is negative beyond rounding.

        Warns
        -----
        NumericalWarning
            If directions stay untrained: their eigenvalue is below n eps times the largest, so that it is zero to
            rounding, and long training would amplify rounding alone. In exact arithmetic an eigenvalue of zero means
            that training moves nothing in its direction, for how long ever. Also if K(X, X) has a Cholesky factor only
            with jitter above 1e-10 (float32: 1e-6) of its mean diagonal; up to that it is part of the method.

        Notes
        -----
        9 n³ operations for the eigendecomposition, n³/3 and 2 n³ for a root of K(X, X) in its coordinates.
        """
        targets = y.reshape(len(y), -1)
        _check_matrices(targets, kernel=kernel, tangent=tangent)
        values, vectors = torch.linalg.eigh(kernel if tangent is None else tangent)
        cut = _zero_to_rounding(values)
        if bool(values[0] < -10 * cut):
            name = "kernel" if tangent is None else "tangent kernel"
            raise NotPositiveDefiniteError(
                f"the {name} matrix of the training inputs must be positive semi-definite; got eigenvalues from "
                f"{float(values[0]):.3g} to {float(values[-1]):.3g}."
            )
        singular = bool(values[0] <= cut)
        values = values.clamp(min=0)
        mean = kernel.diagonal().mean()
        if tangent is None:
            root, factor = (values + (JITTER[kernel.dtype] * mean if singular else 0)).sqrt(), None
            # A kernel that is zero on all training inputs has a root of zero, which whitens zeros only.
            root = root.clamp(min=torch.finfo(root.dtype).tiny)
        else:
            factor = cholesky_or_raise(kernel, "the kernel matrix of the training inputs", jitter=JITTER[kernel.dtype])
            root = vectors.mT @ factor
        solution = cls(flow, values, vectors, vectors.mT @ targets, root, factor)
        solution._warn_if_untrained()
        return solution

    def rows(self, kernel: Float[Tensor, "m n"], tangent: "Float[Tensor, 'm n'] | None" = None) -> Rows:
        """Return new points as the other methods take them.

        Parameters
        ----------
        kernel : Tensor of shape (m, n)
            K(x, X).
        tangent : Tensor of shape (m, n) or None
            Th(x, X); None after training of the last layer only.
        """
        if self.factor is None:
            projected = kernel @ self.eigenvectors
            return Rows(projected, projected / self.root)
        if tangent is None:
            raise ValueError("tangent must be given, as all layers were trained; got None.")
        whitened = torch.linalg.solve_triangular(self.factor.mT, kernel, upper=True, left=False)
        return Rows(tangent @ self.eigenvectors, whitened)

    def weights(self, scale: "Float[Tensor, ' J'] | None" = None) -> Float[Tensor, "*J n"]:
        """Return ``GradientFlow.weights`` at the eigenvalues, 0 for directions that stay untrained.

        Parameters
        ----------
        scale : Tensor of shape (J,) or None, default=None
            Scales, for a law that depends on them.
        """
        weights = self.flow.weights(self.eigenvalues, scale)
        cut = _zero_to_rounding(self.eigenvalues)
        # Not >: of a tangent kernel that is zero this product may be NaN.
        return weights.masked_fill((self.eigenvalues <= cut) & ~(weights * cut <= AMPLIFIED), 0.0)

    def location(self, rows: Rows, scale: "Float[Tensor, ' J'] | None" = None) -> Float[Tensor, "*J m C"]:
        """Return B y.

        Parameters
        ----------
        rows : Rows
            New points.
        scale : Tensor of shape (J,) or None, default=None
            Scales, for a law that depends on them: one location each.
        """
        return rows.tangent @ (self.weights(scale).unsqueeze(-1) * self.targets)

    def variance(
        self, rows: Rows, prior: Float[Tensor, " m"], scale: "Float[Tensor, ' J'] | None" = None
    ) -> Float[Tensor, "*J m"]:
        r"""Return the variance of each new output over s, without their covariances.

        Parameters
        ----------
        rows : Rows
            New points.
        prior : Tensor of shape (m,)
            K(x, x).
        scale : Tensor of shape (J,) or None, default=None
            Scales, for a law that depends on them: one variance each.

        Returns
        -------
        Tensor of shape (m,) or (J, m)
            Non-negative: the variance of :math:`f_0(x)` given :math:`f_0(X)`, plus the square of what training adds,
            :math:`|L^{-1} K(X, x) - L^\top B^\top|^2`.

        Warns
        -----
        NumericalWarning
            If the first of the two terms came out below -1e-10 (float32: -1e-6) K(x, x), where 0 is returned for it.

        Notes
        -----
        O(n²) a row, and O(n) where only the last layer was trained; times J with scales.
        """
        given = prior - rows.whitened.square().sum(1)
        bad = (given < -JITTER[given.dtype] * prior).detach()
        if bool(bad.any()):
            warn_caller(
                f"{int(bad.sum())} of {len(prior)} variances given the initial outputs on the training inputs came out "
                f"negative, down to {float((given / prior)[bad].min()):.2g} of the prior variance, and are set to 0: "
                "the kernel matrix of the training inputs is too ill-conditioned.",
                NumericalWarning,
            )
        if scale is None:
            return given.clamp(min=0) + self.moved(rows, self.weights()).square().sum(1)
        # One degree of training at a time, as J matrices of all rows would not fit; scales far out share theirs.
        weights, which = self._distinct(self.weights(scale))
        return given.clamp(min=0) + torch.stack([self.moved(rows, w).square().sum(1) for w in weights])[which]

    def moved(self, rows: Rows, weights: Float[Tensor, " n"]) -> Float[Tensor, "m n"]:
        """Return (K(x, X) K(X, X)^-1 - B) L: how the trained outputs hang on the initial ones on the training inputs.

        Parameters
        ----------
        rows : Rows
            New points.
        weights : Tensor of shape (n,)
            Of one scale, from :meth:`weights`.
        """
        weighted = rows.tangent * weights
        spread = weighted * self.root if self.factor is None else weighted @ self.root
        return rows.whitened - spread

    def covariance(
        self,
        rows: Rows,
        prior: Float[Tensor, "m m"],
        scale: "Float[Tensor, ' J'] | None" = None,
        shares: "Float[Tensor, ' J'] | None" = None,
    ) -> Float[Tensor, "m m"]:
        """Return the covariance of new outputs over s, for a law that depends on the scale summed over scales.

        Parameters
        ----------
        rows : Rows
            New points.
        prior : Tensor of shape (m, m)
            K(x, x').
        scale, shares : Tensor of shape (J,) or None, default=None
            Scales and their factors in the sum over them; one scale needs no factor.

        Returns
        -------
        Tensor of shape (m, m)
            Positive semi-definite up to rounding.
        """
        total = prior - rows.whitened @ rows.whitened.mT
        weights, which = self._distinct(torch.atleast_2d(self.weights(scale)))
        parts = total.new_ones(len(which)) if shares is None else shares.to(total)
        parts = total.new_zeros(len(weights)).index_add_(0, which, parts)
        total = total * parts.sum()
        for w, part in zip(weights, parts.tolist(), strict=True):
            moved = self.moved(rows, w)
            total.addmm_(moved, moved.mT, alpha=part)
        return total

    def _distinct(self, weights: Float[Tensor, "J n"]) -> tuple[Float[Tensor, "K n"], Tensor]:
        """Rows of weights that differ, in order, and which of them each row is."""
        # What moves outputs by less than their rounding is no training.
        started = weights * self.eigenvalues[-1] > torch.finfo(weights.dtype).eps / 16
        return torch.unique_consecutive(torch.where(started, weights, 0.0), dim=0, return_inverse=True)

    def _warn_if_untrained(self) -> None:
        # With one learning rate for all, networks of very large scale are trained for as good as ever.
        flow = replace(self.flow, time=float("inf")) if self.flow.depends_on_scale else self.flow
        zero = self.eigenvalues <= _zero_to_rounding(self.eigenvalues)
        untrained = int((zero & (replace(self, flow=flow).weights() == 0)).sum()) if self.flow.time > 0 else 0
        if untrained:
            warn_caller(
                f"{untrained} of {len(zero)} eigenvalues of the tangent kernel on the training inputs are zero to "
                f"rounding, at most {float(_zero_to_rounding(self.eigenvalues)):.3g}: training moves nothing in those "
                "directions, so that it does not meet the targets there. Distinct inputs, a ridge or a finite time "
                "would avoid it.",
                NumericalWarning,
            )


def _zero_to_rounding(eigenvalues: Tensor) -> Tensor:
    return len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1].clamp(min=0)


def _check_matrices(targets: Tensor, **matrices: "Tensor | None") -> None:
    check_same_kind(y=targets, **matrices)
    check_finite("y", targets)
    n = len(targets)
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        if not n or matrix.shape != (n, n):
            raise ValueError(f"{name} must have shape (n, n) = {(n, n)}, n >= 1 as y; got {tuple(matrix.shape)}.")
        check_finite(name, matrix)
