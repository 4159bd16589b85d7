"""Functional Bayesian CP and Tucker decompositions as scikit-learn estimators."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator, RegressorMixin

from stochproc.tensor._functional import FunctionalDecomposition
from stochproc.tensor._functional_parameters import resolve
from stochproc.tensor._starting_parts import Settings

__all__ = ["FunctionalCP", "FunctionalTucker"]


class FunctionalCP(FunctionalDecomposition, RegressorMixin, BaseEstimator):
    r"""CP decomposition of a tensor whose indices are real numbers, with functions for factors and calibrated spread.

    An entry at coordinates :math:`(x_1, \dots, x_K)` is
    :math:`y = \sum_r \prod_k u^k_r(x_k) + \varepsilon`, with independent Gaussian processes :math:`u^k_r` in the
    coordinate of each mode (or one value a category) and noise of learned variance. The posterior is found by
    coordinate ascent on a lower bound of the evidence; processes are Markov, so that everything is linear in the rows
    and in the distinct points of each mode. No grid is ever formed.

    Parameters
    ----------
    rank : int, default=3
        Number of components; with ``ard`` the largest number.
    modes : list or None, default=None
        One entry a column of X: "continuous", "discrete" or a :class:`Mode`, which also says the period or a kernel
        of its own. None: all continuous; integers are never taken for categories unless asked. Categories are numbers
        below 2**53 in size or text; among text, numbers stand for their decimal text.
    kernel : str or Kernel, default="matern12"
        Covariance of the functions of continuous modes: "matern12", "matern32", "matern52", "rbf", or a kernel with a
        state space and variance of about 1. Rough by default; "matern32" where the functions are smooth.
    lengthscale : float, sequence or None, default=None
        Where lengthscales start, in the units of the columns: one number, or one (or None) a mode. None is half the
        range.
    variance : float, default=0.3
        Prior variance of each function, where it starts if it is learned.
    noise : float or None, default=None
        Known variance of the noise in squared units of scaled y (standard deviation 1); None learns it.
    learn_hyperparameters : bool, default=True
        Whether lengthscales are learned, within a third of the median gap and ten times the range of the points, under
        a log-normal prior of spread 0.7 around their start.
    share_lengthscale : bool, default=True
        Whether the components of a mode have one lengthscale, or each its own.
    learn_variance : bool, default=False
        Whether variances are learned too; data sets so far gained nothing by it.
    ard : bool, default=False
        Prune the rank: learn a variance a component under a wide prior, drop components whose share of the whole stays
        below 1e-3 for three sweeps, and merge those that say the same. ``rank_`` reports what is left.
    damping : float, default=0.0
        Share of the old messages that each update keeps, in [0, 1). The bound never falls with 0.
    center : bool, default=True
        Whether to centre y, so that predictions return to its mean far from the data. A rank-R function less a
        constant has rank R + 1: False where the rank itself matters.
    early_stopping : bool, default=True
        From 200 rows on: hold out some rows, stop after four sweeps that do not predict them better by a thousandth of
        a nat, and refit all rows for the best number of sweeps. The bound keeps rising while predictions get worse
        where the noise is not Gaussian.
    validation_fraction : float, default=0.1
        Share of the rows that are held out, in (0, 1).
    max_iter : int, default=100
        Most sweeps.
    tol : float, default=1e-5
        Without held-out rows: stop when the bound changed by less than this share of itself in three sweeps.
    n_init : int, default=2
        Number of starts that get four sweeps each. A later one takes the place of an earlier one if it predicts
        held-out rows better by three standard errors, or by the bound where none are held out.
    init : {"auto", "degree", "greedy", "random"} or list of array, default="auto"
        "degree" starts at products of polynomials by total degree and needs no seed, "greedy" picks them one by one,
        "auto" tries both, and more starts are perturbed or random. Arrays give the functions at the distinct points
        of each mode in ascending order, (n_points, rank) each.
    handle_unknown : {"prior", "error"}, default="prior"
        What to predict for categories that ``fit`` did not see.
    method : {"auto", "scan", "sequential"}, default="auto"
        How smoothers run; see ``stochproc.solvers.kalman_smoother``.
    chunk_size : int, default=65536
        Most rows worked on at a time, which bounds the extra memory.
    batch_size : int or None, default=None
        Rows of a mini-batch: each sweep takes all rows in batches, with natural-gradient steps that shrink; the bound
        may fall then. None takes all rows at once.
    device : str, torch.device or None, default=None
        Where to compute; None is the CPU.
    random_state : int, RandomState, Generator or None, default=None
        Chooses held-out rows and random starts; None takes the same ones in every fit.
    verbose : int, default=0
        1 shows a line a sweep on stderr.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the present fit, with the rows it is given, without holding out any. Modes and rank
        must be the same; centre, scale, kernels, and priors of hyperparameters stay, whatever the parameters say.

    Attributes
    ----------
    rank_ : int
        Components left.
    core_ : ndarray of shape (rank, .., rank) or None
        Superdiagonal of ones; None if it would have more than 4096 entries.
    index_ : list of ndarray
        Distinct points of each mode in ascending order, or its categories.
    lengthscale_, variance_ : list of ndarray of shape (rank,)
        Of each mode; the lengthscale is None for categories or a kernel without one.
    noise_variance_ : float
        Posterior noise variance, 1 / E[precision], in squared units of y.
    elbo_ : ndarray of shape (n_sweeps,)
        Lower bound of log p(y) after each sweep of the final fit, in nats and the units of y; plus, up to
        a constant, the log prior of learned hyperparameters.
    validation_score_ : ndarray
        Mean log density of held-out rows after each sweep before the refit; empty if none were held out.
    n_iter_ : int
        Sweeps of the final fit.
    converged_ : bool
        Whether the stopping rule was met before ``max_iter``.
    start_ : str
        Which start was kept.
    n_features_in_ : int
        Number of modes.
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    FunctionalTucker : With a learned core and a rank a mode.
    from_dense : Rows of a dense tensor with missing entries.
    StateSpaceGP : One mode and one function, exactly.

    Notes
    -----
    A sweep takes O(n R^2 + N (R s)^3) time, for N distinct points and s states a function, and O(n R + N (R s)^2)
    memory. The posterior is factorised over modes: intervals are a little narrow where modes explain each other.

    References
    ----------
    .. [1] S. Fang et al., "Functional Bayesian Tucker decomposition for continuous-indexed tensor data", ICLR 2024.
    .. [2] J. Winn, C. M. Bishop, "Variational message passing", JMLR 2005.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.tensor import FunctionalCP
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(0, 1, (300, 2))
    >>> y = np.sin(6 * X[:, 0]) * np.cos(4 * X[:, 1])
    >>> model = FunctionalCP(rank=1, kernel="matern32", center=False).fit(X, y)
    >>> mean, std = model.predict([[0.25, 0.1]], return_std=True)
    >>> bool(abs(mean[0] - np.sin(1.5) * np.cos(0.4)) < 0.05)
    True
    """

    def __init__(
        self,
        rank: int = 3,
        *,
        modes: Any = None,
        kernel: Any = "matern12",
        lengthscale: Any = None,
        variance: float | int = 0.3,
        noise: float | int | None = None,
        learn_hyperparameters: bool = True,
        share_lengthscale: bool = True,
        learn_variance: bool = False,
        ard: bool = False,
        damping: float | int = 0.0,
        center: bool = True,
        early_stopping: bool = True,
        validation_fraction: float | int = 0.1,
        max_iter: int = 100,
        tol: float | int = 1e-5,
        n_init: int = 2,
        init: Any = "auto",
        handle_unknown: str = "prior",
        method: str = "auto",
        chunk_size: int = 65_536,
        batch_size: int | None = None,
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
        warm_start: bool = False,
    ) -> None:
        self.rank = rank
        self.modes = modes
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.variance = variance
        self.noise = noise
        self.learn_hyperparameters = learn_hyperparameters
        self.share_lengthscale = share_lengthscale
        self.learn_variance = learn_variance
        self.ard = ard
        self.damping = damping
        self.center = center
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.init = init
        self.handle_unknown = handle_unknown
        self.method = method
        self.chunk_size = chunk_size
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    def _settings(self, n_modes: int) -> Settings:
        return resolve(self, n_modes, tucker=False)


class FunctionalTucker(FunctionalDecomposition, RegressorMixin, BaseEstimator):
    r"""Tucker decomposition of a tensor whose indices are real numbers: functions for factors, and a learned core.

    An entry at coordinates :math:`(x_1, \dots, x_K)` is
    :math:`y = \sum_{r_1 \dots r_K} W_{r_1 \dots r_K} \prod_k u^k_{r_k}(x_k) + \varepsilon`, with a Gaussian core W
    and Gaussian processes as in :class:`FunctionalCP`, from which it starts.

    Parameters
    ----------
    rank : int or sequence of int, default=3
        Functions of each mode: one number, or one a mode. Their product is the size d of the core, at most 4096; from
        1025 on its posterior is taken to be independent by entry.
    core_variance : float or "learn", default=1.0
        Prior variance of each entry of the core; "learn" maximises the bound in it.
    modes, kernel, lengthscale, variance, noise, learn_hyperparameters, share_lengthscale, learn_variance
        See :class:`FunctionalCP`.
    ard, damping, center, early_stopping, validation_fraction, max_iter, tol, n_init, init, handle_unknown
        See :class:`FunctionalCP`; ``ard`` prunes each mode by itself.
    method, chunk_size, batch_size, device, random_state, verbose, warm_start
        See :class:`FunctionalCP`.

    Attributes
    ----------
    rank_ : tuple of int
        Functions left in each mode.
    core_ : ndarray of shape (R_1, .., R_K)
        Posterior mean of the core; its axes are the columns of X in order.
    index_, lengthscale_, variance_, noise_variance_, elbo_, validation_score_, n_iter_, converged_, start_
        See :class:`FunctionalCP`.
    n_features_in_ : int
        Number of modes.
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    FunctionalCP : Without a core.

    Notes
    -----
    With p = R (R + 1) / 2 a sweep takes O(n p^K + d^3 + N (R s)^3) time. Rows are taken in chunks: memory grows with n
    by K R numbers a row, never with R^(2 K).

    References
    ----------
    .. [1] S. Fang et al., "Functional Bayesian Tucker decomposition for continuous-indexed tensor data", ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.tensor import FunctionalTucker
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(0, 1, (300, 2))
    >>> y = np.sin(6 * X[:, 0]) * np.cos(4 * X[:, 1])
    >>> model = FunctionalTucker(rank=(2, 1), kernel="matern32").fit(X, y)
    >>> model.core_.shape, bool(model.score(X, y) > 0.99)
    ((2, 1), True)
    """

    def __init__(
        self,
        rank: Any = 3,
        *,
        core_variance: Any = 1.0,
        modes: Any = None,
        kernel: Any = "matern12",
        lengthscale: Any = None,
        variance: float | int = 0.3,
        noise: float | int | None = None,
        learn_hyperparameters: bool = True,
        share_lengthscale: bool = True,
        learn_variance: bool = False,
        ard: bool = False,
        damping: float | int = 0.0,
        center: bool = True,
        early_stopping: bool = True,
        validation_fraction: float | int = 0.1,
        max_iter: int = 100,
        tol: float | int = 1e-5,
        n_init: int = 2,
        init: Any = "auto",
        handle_unknown: str = "prior",
        method: str = "auto",
        chunk_size: int = 65_536,
        batch_size: int | None = None,
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
        warm_start: bool = False,
    ) -> None:
        self.rank = rank
        self.core_variance = core_variance
        self.modes = modes
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.variance = variance
        self.noise = noise
        self.learn_hyperparameters = learn_hyperparameters
        self.share_lengthscale = share_lengthscale
        self.learn_variance = learn_variance
        self.ard = ard
        self.damping = damping
        self.center = center
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.init = init
        self.handle_unknown = handle_unknown
        self.method = method
        self.chunk_size = chunk_size
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    def _settings(self, n_modes: int) -> Settings:
        return resolve(self, n_modes, tucker=True)
