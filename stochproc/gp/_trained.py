"""The law of infinitely wide networks that gradient flow has trained, as a process that predicts."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_finite, check_integer, check_same_kind
from stochproc.gp._cross import as_other_points, cross_covariance
from stochproc.gp._independent_predictive import MixturePredictive
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_posterior import PointScale, ScalePosterior
from stochproc.gp._scale_priors import as_scale_prior
from stochproc.gp._trained_flow import GradientFlow
from stochproc.gp._trained_scale import law_of_scale
from stochproc.gp._trained_solution import JITTER, FlowSolution, Rows
from stochproc.solvers import cholesky_or_raise

__all__ = ["TrainedLaw", "trained_law"]

# Entries of one block of the cross-covariance: 4 MiB in float64.
BLOCK_ELEMENTS = 2**19


@dataclass(frozen=True)
class TrainedLaw:
    r"""Outputs of trained networks as a process; ``trained_law`` makes it.

    Given s it is Gaussian. Over the prior of s it is a scale mixture: for an inverse gamma prior a Student-t process of
    2a degrees of freedom, however many the data, since training does not update the law of s.

    Parameters
    ----------
    net : torch.nn.Module
        A copy of the network.
    X : Tensor of shape (n, d)
        Training inputs.
    solution : FlowSolution
        Training on these inputs, in coordinates.
    alpha : Tensor of shape (n, C)
        Weights of the training points in the mean.
    scale : ScalePosterior
        The law of s, which is the prior.
    scale_prior : ScalePrior
        A copy of the prior of s.
    single_output : bool
        Whether y was given as (n,), so that predictions are too.
    """

    net: Any
    X: Float[Tensor, "n *point"]
    solution: FlowSolution
    alpha: Float[Tensor, "n C"]
    scale: ScalePosterior
    scale_prior: ScalePrior
    single_output: bool

    def mean(self, X: Float[Tensor, "m *point"]) -> Float[Tensor, "m *outputs"]:
        """Return the mean of the trained outputs, O(n) a row; no variance is computed.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            Differentiable in ``X``. Where the prior has so heavy a tail that no mean exists, it is the median if
            training does not depend on the scale, and the mean of the means given s otherwise.
        """
        kernel = self.net.nngp if self.solution.factor is None else self.net.ntk
        return self._shape(torch.cat([cross_covariance(kernel, rows, self.X) @ self.alpha for rows in self._blocks(X)]))

    def variance(self, X: Float[Tensor, "m *point"]) -> Float[Tensor, "m *outputs"]:
        """Return the variance of the trained outputs over networks and scales, without their covariances.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            The same for all outputs unless training depends on the scale.

        Raises
        ------
        ValueError
            If it does not exist, as E[s] is infinite.
        """
        return self.predictive(X).variance

    def predictive(self, X: Float[Tensor, "m *point"]) -> "Predictive | MixturePredictive":
        """Return the law of each row of trained outputs.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Predictive or MixturePredictive
            The second where networks of different scale are trained to a different degree; its methods cost some 200
            times as much.
        """
        blocks = list(self._blocks(X))
        if self._by_scale:
            return MixturePredictive(self, X, False)
        means, variances = zip(*[self._given_scale(x) for x in blocks], strict=True)
        return Predictive(self._shape(torch.cat(means)), torch.cat(variances), self.scale)

    def covariance(self, X: Float[Tensor, "m *point"]) -> Float[Tensor, "m m *outputs"]:
        r"""Return the joint covariance of the trained outputs at new inputs, over networks and scales.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m, m) or (m, m, C)
            Positive semi-definite up to rounding; its diagonal is :meth:`variance`. Where training depends on the
            scale it is :math:`E[s C_s]` plus the covariance of the means given s.

        Raises
        ------
        ValueError
            If it does not exist, as E[s] is infinite.

        Notes
        -----
        O(m² n), times some 129 scales where training depends on them.
        """
        variance = self.variance(X).reshape(len(X), -1).mT
        rows, prior = self._rows(X), self.net.nngp(X)
        if self._by_scale:
            log_s, log_weights = self.nodes
            s, shares = log_s.exp(), log_weights.exp()
            total = self.solution.covariance(rows, prior, s, shares * s)
            location = self.solution.location(rows, s) * shares.sqrt().to(X)[:, None, None]
            centred = location - shares.sqrt().to(X)[:, None, None] * self._mean_of(rows)
            total = total + torch.einsum("jmc,jkc->cmk", centred, centred)
        else:
            total = self.scale.mean * self.solution.covariance(rows, prior, self._known_scale)
            total = total.expand(self.alpha.shape[1], len(X), len(X))
        # One triangle decides, so that the result is symmetric to the last bit.
        total = total.tril() + total.tril(-1).mT
        total = torch.diagonal_scatter(total, variance.expand(total.shape[:2]), dim1=-2, dim2=-1).movedim(0, -1)
        return total[..., 0] if self.single_output else total

    def sample(
        self,
        X: Float[Tensor, "m *point"],
        n_samples: int = 1,
        *,
        generator: "torch.Generator | None" = None,
    ) -> Float[Tensor, "samples m *outputs"]:
        """Draw trained networks jointly over new inputs: initial outputs are drawn, then trained.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        n_samples : int, default=1
            Number of networks; each has a scale of its own, shared by its rows and outputs.
        generator : torch.Generator or None, default=None
            Source of randomness, on the device of ``X``.

        Returns
        -------
        Tensor of shape (n_samples, m) or (n_samples, m, C)

        Notes
        -----
        O(m n² + m³ + n_samples (n² + m n)). 1e-10 (float32: 1e-6) of the mean prior variance is added to the
        covariance of the initial outputs given those on the training inputs, which is singular to rounding where
        inputs coincide; more than that gives a ``NumericalWarning``.
        """
        check_integer("n_samples", n_samples, 1)
        check_same_kind(X=X, X_train=self.X)
        rows, prior = self._rows(X), self.net.nngp(X)
        rest = prior - rows.whitened @ rows.whitened.mT
        rest = rest.tril() + rest.tril(-1).mT
        first = (JITTER[X.dtype] * prior.diagonal().mean()).clamp(min=torch.finfo(X.dtype).tiny)
        rest.diagonal().add_(first)
        jitter = float(first / rest.diagonal().abs().mean())
        root = cholesky_or_raise(rest, "the covariance of the initial outputs", jitter=jitter, points=X.flatten(1))

        solution, n_outputs = self.solution, self.alpha.shape[1]
        scale = self.scale.sample(n_samples, generator=generator)
        sigma = scale.sqrt().to(X)[:, None, None]
        kind: dict[str, Any] = {"dtype": X.dtype, "device": X.device, "generator": generator}
        at_training = torch.randn(n_samples, len(self.X), n_outputs, **kind)
        elsewhere = torch.randn(n_samples, len(X), n_outputs, **kind)
        # In coordinates: the initial outputs on the training inputs, then what training moves them by.
        start = solution.root[:, None] * at_training if solution.factor is None else solution.root @ at_training
        steps = solution.weights(scale if solution.flow.depends_on_scale else None).unsqueeze(-1)
        trained = steps * (solution.targets - sigma * start)
        draws = sigma * (rows.whitened @ at_training + root @ elsewhere) + rows.tangent @ trained
        return draws[..., 0] if self.single_output else draws

    @property
    def nodes(self) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"]]:
        """Nodes in log s and their log weights, where training depends on the scale."""
        scale: Any = self.scale
        return scale.log_s, scale.log_weights

    @property
    def rows_at_once(self) -> int:
        """How many rows of predictions at all nodes fit one block of memory."""
        return max(1, BLOCK_ELEMENTS // max(len(self.X), len(self.nodes[0]) * self.alpha.shape[1]))

    def rotate(self, X: Float[Tensor, "m *point"]) -> tuple[Float[Tensor, "m 2 n"], Float[Tensor, " m"]]:
        """Return new rows in the coordinates of the solution, and their prior variances."""
        return torch.stack(self._rows(X), 1), self.net.diag(X)

    def at_scales(
        self, rotated: Float[Tensor, "m 2 n"], prior: Float[Tensor, " m"], log_s: Float[Tensor, " J"]
    ) -> tuple[Float[Tensor, "m C J"], Float[Tensor, "m J"]]:
        """Return means and variances of rows at given scales, float64."""
        rows, s = Rows(*rotated.unbind(1)), log_s.exp()
        means = self.solution.location(rows, s).to(torch.float64)
        variances = self.solution.variance(rows, prior, s).to(torch.float64)
        return means.permute(1, 2, 0), variances.mT * s

    @property
    def constant(self) -> Float[Tensor, " C"]:
        """Mean of the untrained outputs: zero."""
        return self.alpha.new_zeros(self.alpha.shape[1])

    @property
    def _by_scale(self) -> bool:
        """Whether networks of the law are trained to different degrees."""
        return self.solution.flow.depends_on_scale and not isinstance(self.scale, PointScale)

    @property
    def _known_scale(self) -> "Tensor | None":
        return self.alpha.new_tensor([self.scale.value]) if isinstance(self.scale, PointScale) else None

    def _given_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location (m, C) and variance before the scale (m,) of a law that does not depend on it."""
        rows, scale = self._rows(x), self._known_scale
        location = self.solution.location(rows, scale)
        variance = self.solution.variance(rows, self.net.diag(x), scale)
        return (location, variance) if scale is None else (location[0], variance[0])

    def _mean_of(self, rows: Rows) -> Tensor:
        return rows.tangent @ (self.solution.eigenvectors.mT @ self.alpha)

    def _blocks(self, X: Tensor) -> Iterator[Tensor]:
        check_same_kind(X=X, X_train=self.X)
        if X.ndim != self.X.ndim or X.shape[1:] != self.X.shape[1:]:
            expected = ", ".join(map(str, ("m", *self.X.shape[1:])))
            raise ValueError(f"X must have shape ({expected}); got {tuple(X.shape)}.")
        yield from X.split(max(16, BLOCK_ELEMENTS // len(self.X)))

    def _rows(self, x: Tensor) -> Rows:
        if self.solution.factor is None:
            return self.solution.rows(cross_covariance(self.net.nngp, x, self.X))
        kernels = self.net.nngp_ntk(as_other_points(x, self.X), self.X)
        return self.solution.rows(*(kernel[: len(x)] for kernel in kernels))

    def _shape(self, value: Tensor) -> Tensor:
        return value[:, 0] if self.single_output else value


def trained_law(
    net: Any,
    X: Float[Tensor, "n *point"],
    y: Float[Tensor, "n *outputs"],
    *,
    flow: "GradientFlow | None" = None,
    scale_prior: "ScalePrior | str" = "inverse_gamma",
    train: str = "all",
) -> TrainedLaw:
    r"""Train infinitely many infinitely wide networks on data, from random initial weights; return their law.

    The initial outputs are :math:`f_0 \mid s \sim N(0, s K)` with a scale s drawn from ``scale_prior`` for each
    network. Gradient flow takes them to

    .. math:: f(x) = f_0(x) + B (y - f_0(X)), \qquad B = Th(x, X)\, V \operatorname{diag}(\phi(l)) V^\top.

    Parameters
    ----------
    net : network
        A network of ``gp.arch``, or whatever has its functions ``nngp``, ``ntk``, ``nngp_ntk`` and ``diag``, such as a
        :class:`KernelPair`. Copied.
    X : Tensor of shape (n, d)
        Training inputs.
    y : Tensor of shape (n,) or (n, C)
        Targets, centred: the untrained networks have mean 0.
    flow : GradientFlow or None, default=None
        How they are trained; None is until convergence.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Law of s, before and after training. Copied.
    train : {"all", "readout"}, default="all"
        Which layers are trained. After "readout", the last one, until convergence without ridge the law given s is
        the posterior of a Gaussian process without noise; with a ridge its location is the posterior mean for noise of
        that variance, its covariance is smaller.

    Returns
    -------
    TrainedLaw

    Raises
    ------
    ValueError
        If shapes or an option are wrong, or an entry is not finite.
    NotPositiveDefiniteError
        If a kernel matrix is not positive semi-definite.

    Warns
    -----
    NumericalWarning
        If the tangent kernel is singular to rounding and training would amplify that; see ``FlowSolution``.

    Notes
    -----
    One symmetric eigendecomposition, 9 n³ operations, and memory for four n x n matrices.

    References
    ----------
    .. [1] J. Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
       2019.
    .. [2] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import GradientFlow, KernelPair, trained_law
    >>> X = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    >>> law = trained_law(KernelPair("matern32"), X, torch.sin(6 * X[:, 0]), train="readout")
    >>> law.mean(X[:1]), law.scale.df
    (tensor([...e-1...], dtype=torch.float64), 4.0)
    """
    check_choice("train", train, ("all", "readout"))
    _check_data(X, y)
    prior = copy.deepcopy(as_scale_prior(scale_prior)).requires_grad_(False)
    net = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        kernel, tangent = net.nngp_ntk(X) if train == "all" else (net.nngp(X), None)
        solution = FlowSolution.of(GradientFlow() if flow is None else flow, kernel, tangent, y)
        scale: Any = law_of_scale(prior, by_scale=solution.flow.depends_on_scale, device=X.device)
        weights = _mean_weights(solution, scale, X)
        alpha = solution.eigenvectors @ (weights.unsqueeze(-1) * solution.targets)
    return TrainedLaw(net, X.clone(), solution, alpha, scale, prior, y.ndim == 1)


def _check_data(X: Tensor, y: Tensor) -> None:
    check_same_kind(X=X, y=y)
    if X.ndim < 2 or not len(X):
        raise ValueError(f"X must have shape (n, d) with n >= 1; got {tuple(X.shape)}.")
    if y.ndim not in (1, 2) or len(y) != len(X):
        raise ValueError(f"y must have shape ({len(X)},) or ({len(X)}, C); got {tuple(y.shape)}.")
    check_finite("X", X)


def _mean_weights(solution: FlowSolution, scale: Any, like: Tensor) -> Tensor:
    """Return the weights of the eigenvectors in the mean of the trained networks over their scales."""
    if isinstance(scale, PointScale):
        return solution.weights(like.new_tensor([scale.value]))[0]
    if solution.flow.depends_on_scale:
        # The mean is linear in the weights, so that their average over the scales gives it.
        return scale.log_weights.exp().to(like) @ solution.weights(scale.log_s.exp())
    return solution.weights()
