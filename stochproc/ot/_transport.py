"""Move one cloud of points onto another, as a scikit-learn transformer with the arguments of POT's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, metadata_routing
from sklearn.utils.validation import validate_data
from torch import Tensor

from stochproc._base import FLOATS, as_array, as_numbers, old_fit_unless_new
from stochproc._checks import check_choice, check_positive
from stochproc._persistence import as_tensor
from stochproc.exceptions import DataWarning
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._inputs import check_budget, check_weights
from stochproc.ot._solve import check_options, check_unbalanced, solve
from stochproc.ot._solve_sample import solve_sample
from stochproc.ot._transport_labels import check_partners, classes_of, codes_of, read_labels
from stochproc.ot._transport_maps import MAPS, TransportMaps
from stochproc.ot._transport_state import LogCost, Transport, cost_scale
from stochproc.ot._unbalanced_solve import read_rho

__all__ = ["SinkhornTransport"]

NORMS = (None, "max", "median", "mean", "log", "loglog")
# These measure with variances of the very points at hand, so that a new point would change the cost.
_DATA_DEPENDENT = ("seuclidean", "mahalanobis")


class SinkhornTransport(TransportMaps, BaseEstimator):
    r"""Move sources onto targets by entropic optimal transport.

    ``fit`` finds the plan between two clouds of points; ``transform`` moves points of the first cloud, seen or new, to
    where the plan sends them on average:

    .. math:: T(x) = \sum_j w_j(x)\, y_j, \qquad
       w_j(x) \propto b_j \exp\frac{g_j - c(x, y_j)}{\varepsilon}.

    Arguments are those of POT's class of this name. In domain adaptation, a classifier is trained on moved sources
    with their labels, and applied to targets.

    Parameters
    ----------
    reg_e : float, default=0.1
        Entropic regularisation, positive: in the unit of the metric, or relative to the costs as ``norm`` leaves them.
        Images of points are means over a wider and wider neighbourhood as it grows.
    metric : str or callable, default="sqeuclidean"
        Cost of a pair of points, as in :func:`solve_sample`, but not "seuclidean" or "mahalanobis".
    method : {"auto", "newton", "sns", "sinkhorn", "ssns"}, default="auto"
        Solver; see :func:`solve`.
    tol : float, default=None
        Largest error of the marginals; None is 1e-9, and 1e-6 for problems too large to store.
    max_iter : int, default=None
        Passes over the pairs at most; None is 2000.
    norm : {None, "max", "median", "mean", "log", "loglog"}, default=None
        Divide costs by their largest, median or mean, or take :math:`\log(1 + c)`, once or twice. "mean" is not in POT.
    out_of_sample_map : {"continuous", "ferradans"}, default="continuous"
        Where points go: by the formula above, or along with the nearest point that ``fit`` saw, by the same
        difference [2]_. On those points the two agree.
    reg_m : float or pair of floats, default=None
        Let mass be created and destroyed: ``unbalanced`` of :func:`solve`, in the unit of ``reg_e``. None is balanced.

    Attributes
    ----------
    coupling_ : ndarray or Tensor of shape (n_sources, n_targets), or operator
        The plan, computed on access. For problems too large to store, an operator with ``@``, ``.T``, ``row(i)`` and
        ``to_sparse(threshold)``.
    cost_ : ndarray or Tensor of shape (n_sources, n_targets)
        Costs after ``norm``, infinite at pairs that labels forbid, computed on access; absent if too large to store.
    mu_s, mu_t : ndarray or Tensor of shape (n_sources,) and (n_targets,)
        Masses of sources and targets, of sum 1 each.
    xs_, xt_ : ndarray or Tensor of shape (n_sources, n_features) and (n_targets, n_features)
        Sources and targets.
    potentials_ : tuple of two ndarrays or Tensors
        Dual potentials of sources and targets, in the unit of ``reg_e``.
    n_iter_ : int
        Passes over the pairs.
    converged_ : bool
        Whether the error of the marginals is at most ``tol``.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Names of the columns, where Xs had some.

    See Also
    --------
    solve_sample : The plan as a function, differentiable.
    TransportDisplay : Draws points and plan.

    Notes
    -----
    Computation is in float64, on the device of Xs if that is a tensor; results have the kind and precision of what came
    in. Labels on both sides need stored costs; without, problems too large to store are solved without, where the
    metric and the method can. Moving k points takes O(k n_targets n_features) time.

    In a pipeline targets are passed as ``pipeline.fit(Xs, ys, sinkhorntransport__Xt=Xt)``; steps before do not see them
    then. To send them through those steps as well, use scikit-learn's metadata routing with
    ``SinkhornTransport().set_fit_request(Xt=True)`` and ``Pipeline(..., transform_input=["Xt"])``. A classifier at the
    end predicts targets by itself, ``pipeline[-1].predict(Xt)``: the pipeline as a whole takes sources.

    References
    ----------
    .. [1] N. Courty, R. Flamary, D. Tuia, A. Rakotomamonjy, "Optimal transport for domain adaptation", IEEE TPAMI 2017.
    .. [2] S. Ferradans, N. Papadakis, G. Peyre, J.-F. Aujol, "Regularized discrete optimal transport", SIAM Journal on
       Imaging Sciences 2014.
    .. [3] A.-A. Pooladian, J. Niles-Weed, "Entropic estimation of optimal transport maps", arXiv:2109.12004.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.ot import SinkhornTransport
    >>> Xs = np.random.default_rng(0).uniform(size=(50, 2))
    >>> model = SinkhornTransport(reg_e=1e-4).fit(Xs, Xt=Xs + [3.0, -1.0])
    >>> bool(np.allclose(model.transform(Xs), Xs + [3.0, -1.0], atol=1e-2))
    True
    """

    # What routing passes by name; Xs and ys are what scikit-learn calls X and y.
    __metadata_request__fit = {  # noqa: RUF012 - read by scikit-learn from the class
        "Xs": metadata_routing.UNUSED,
        "ys": metadata_routing.UNUSED,
        "Xt": None,
        "yt": None,
    }
    __metadata_request__transform = {  # noqa: RUF012
        "Xs": metadata_routing.UNUSED,
        "ys": metadata_routing.UNUSED,
    }

    def __init__(
        self,
        reg_e: float = 0.1,
        metric: Any = "sqeuclidean",
        method: str = "auto",
        tol: float | None = None,
        max_iter: int | None = None,
        norm: str | None = None,
        out_of_sample_map: str = "continuous",
        reg_m: Any = None,
    ) -> None:
        self.reg_e = reg_e
        self.metric = metric
        self.method = method
        self.tol = tol
        self.max_iter = max_iter
        self.norm = norm
        self.out_of_sample_map = out_of_sample_map
        self.reg_m = reg_m

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(
        self,
        Xs: Any = None,
        ys: Any = None,
        Xt: Any = None,
        yt: Any = None,
        *,
        sample_weight: Any = None,
        sample_weight_t: Any = None,
        y: Any = None,
    ) -> SinkhornTransport:
        """Find the plan from sources to targets.

        Parameters
        ----------
        Xs : array-like of shape (n_sources, n_features)
            Sources: NumPy, pandas or torch.
        ys : array-like of shape (n_sources,), default=None
            Labels of the sources. They matter only together with ``yt``.
        Xt : array-like of shape (n_targets, n_features), default=None
            Targets, of the same kind. None means the sources themselves, which makes ``transform`` a smoother; since
            that is seldom meant, it warns.
        yt : array-like of shape (n_targets,), default=None
            Labels of the targets. If both are given, no source goes to a target of another label; -1, on either side,
            is unknown and goes with every label.
        sample_weight, sample_weight_t : array-like of shape (n_sources,) and (n_targets,), default=None
            Non-negative masses of sources and targets, each scaled to a sum of 1; None is uniform. Where Xt is None,
            those of the sources serve both sides.
        y : array-like of shape (n_sources,), default=None
            Another name of ``ys``, by which scikit-learn's tools pass it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, data hold NaN or infinity, shapes do not fit, weights are negative or all 0,
            or labels leave points without a partner or mass without a way.
        TypeError
            If one of Xs and Xt is a tensor and the other is not, they are on two devices, data are sparse, or both ys
            and y are given.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the error of the marginals is above ``tol`` at the end.
        DataWarning
            If Xt is None.

        Notes
        -----
        After a failure the estimator is what it was before: unfitted, or with its old fit.
        """
        if y is not None:
            if ys is not None:
                raise TypeError("ys and y are two names of one argument; got both.")
            ys = y
        with old_fit_unless_new(self, "_solved"), torch.no_grad():
            self._fit(Xs, ys, Xt, yt, sample_weight, sample_weight_t)
        return self

    def _fit(self, Xs: Any, ys: Any, Xt: Any, yt: Any, weights_s: Any, weights_t: Any) -> None:
        """Do the work of ``fit``; nothing but what validation sets changes before the last step."""
        self._check_parameters()
        _check_kinds(Xs, Xt)
        sources = validate_data(self, as_array(Xs), dtype=FLOATS)
        if Xt is None:
            if yt is not None or weights_t is not None:
                raise ValueError("Xt must be given where yt or sample_weight_t is; got None.")
            warnings.warn(
                "Xt is None: the sources are transported onto themselves, which smooths them. Pass Xt=..., in a "
                "pipeline as sinkhorntransport__Xt=..., to move them elsewhere.",
                DataWarning,
                stacklevel=4,
            )
            targets, weights_t = sources, weights_s
        else:
            targets = self._validated_targets(Xt, sources.shape[1])
        dtype = np.promote_types(sources.dtype, targets.dtype).name
        device = Xs.device if isinstance(Xs, Tensor) else torch.device("cpu")
        # Rows in a piece, as a file keeps them: the order of memory changes last bits.
        X, Y = (as_tensor(points, torch.float64, device).contiguous() for points in (sources, targets))
        a = _as_masses("sample_weight", weights_s, X)
        b = _as_masses("sample_weight_t", weights_t, Y)
        rho = read_rho(self.reg_m, X, "reg_m")

        classes, rows, columns = None, None, None
        if ys is not None and yt is not None:
            labels = [read_labels("ys", ys, len(X)), read_labels("yt", yt, len(Y))]
            classes = classes_of(("ys", labels[0]), ("yt", labels[1]))
            rows, columns = (codes_of(n, v, classes).to(device) for n, v in zip(("ys", "yt"), labels, strict=True))
            check_partners(classes, rows, columns, a, b, balanced=rho is None)

        logs = {"log": 1, "loglog": 2}.get(self.norm or "", 0)
        metric = LogCost(self.metric, logs) if logs else self.metric
        scale = cost_scale(self.norm, metric, X[a > 0], Y[b > 0])
        solved = Transport(X, Y, a, b, a, b, float(self.reg_e) * scale, metric, rows=rows, columns=columns)
        result = self._solve(solved, None if rho is None else tuple(float(r) * scale for r in rho))
        solved.f, solved.g = result.potentials
        solved.lazy = not isinstance(result._form, DenseForm)
        about = {
            "scale": scale,
            "dtype": dtype,
            "torch": isinstance(Xs, Tensor),
            "metric": self.metric,
            "logs": logs,
        }
        self._finish(solved, about, classes, int(result.n_iter), bool(result.converged))

    def _check_parameters(self) -> None:
        check_positive("reg_e", self.reg_e)
        check_choice("norm", self.norm, NORMS)
        check_choice("out_of_sample_map", self.out_of_sample_map, MAPS)
        check_options(reg_type="KL", method=self.method, grad="implicit")
        check_budget(self.tol, self.max_iter, torch.float64)
        if self.reg_m is not None:
            check_unbalanced(reg_type="KL", method=self.method, grad="implicit", round=False)
        if self.metric in _DATA_DEPENDENT:
            raise ValueError(
                f"metric must not depend on the data, as a new point would change it; got {self.metric!r}. Standardise "
                "the points instead, with scikit-learn's StandardScaler or PCA(whiten=True)."
            )

    def _validated_targets(self, Xt: Any, n_features: int) -> np.ndarray:
        """Check the targets against the sources."""
        found = check_array(as_array(Xt), dtype=FLOATS, input_name="Xt", estimator=self)
        if found.shape[1] != n_features:
            raise ValueError(f"Xt must have as many columns as Xs, {n_features}; got {found.shape[1]}.")
        validate_data(self, as_array(Xt), reset=False, skip_check_array=True)
        return found

    def _solve(self, problem: Transport, rho: tuple[float, ...] | None) -> Any:
        options: dict[str, Any] = {"method": self.method, "tol": self.tol, "max_iter": self.max_iter, "unbalanced": rho}
        weights: dict[str, Any] = {"a": problem.a, "b": problem.b, "reg": problem.eps}
        if problem.rows is not None:
            return solve(problem.cost(), **weights, **options)
        # Published methods need the costs stored; then memory is the caller's to have.
        lazy: Any = "auto" if self.method in ("auto", "newton") else False
        return solve_sample(problem.X, problem.Y, metric=problem.metric, lazy=lazy, **weights, **options)


def _check_kinds(Xs: Any, Xt: Any) -> None:
    """Raise TypeError unless there are sources, and targets are of their kind and on their device."""
    if Xs is None:
        raise TypeError("Xs must be an array of points; got None.")
    if Xt is None:
        return
    if isinstance(Xs, Tensor) != isinstance(Xt, Tensor):
        named = " and ".join(f"{type(v).__name__} for {n}" for n, v in (("Xs", Xs), ("Xt", Xt)))
        raise TypeError(f"Xs and Xt must be both NumPy (or pandas) or both torch; got {named}.")
    if isinstance(Xs, Tensor) and Xs.device != Xt.device:
        raise TypeError(f"Xs and Xt must be on one device; got {Xs.device} and {Xt.device}.")


def _as_masses(name: str, weights: Any, points: Tensor) -> Tensor:
    """Return masses of sum 1, uniform for None."""
    n = len(points)
    if weights is None:
        return points.new_full((n,), 1 / n)
    array = np.asarray(as_array(weights))
    if array.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one weight a point; got {array.shape}.")
    masses = as_tensor(as_numbers(name, array), torch.float64, points.device)
    if not bool(masses.any()):
        raise ValueError(f"{name} must not be zero everywhere.")
    check_weights(name, masses)
    return masses / masses.sum()
