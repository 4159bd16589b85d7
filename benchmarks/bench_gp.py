"""Exact scale-mixture regression: speed against scikit-learn and GPyTorch, and accuracy on held-out rows.

Run ``python benchmarks/bench_gp.py [--device cuda] [--only TABLE ...]``. All competitors get the same standardised
data, the same start and the same zero mean, so their log marginal likelihoods are in the same units. The real sets
beside scikit-learn's are read from ``../shared/data/uci`` where that folder exists, and left out where not.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import math
import pathlib
import time
import warnings
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.stats import norm
from sklearn.datasets import load_diabetes
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from timing import arguments, interleave, run_tables, target_row

from stochproc.gp import ScaleMixtureGP, ScaleMixtureGPRegressor
from stochproc.kernels import RBF, matvec

UCI = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "uci"
PRIORS = ("delta", "inverse_gamma", "half_cauchy", "burr_xii")
NOISE = 0.1
ADAM_STEPS = 150


class Data(NamedTuple):
    """Standardised by the training rows; ``scale`` is the standard deviation of y in its own units."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    scale: float


def standardised(X: np.ndarray, y: np.ndarray, test: np.ndarray) -> Data:
    train = np.setdiff1d(np.arange(len(y)), test)
    X, y = np.asarray(X, np.float64), np.asarray(y, np.float64)
    spread = X[train].std(0)
    X = (X - X[train].mean(0)) / np.where(spread > 0, spread, 1.0)
    scale = float(y[train].std())
    y = (y - y[train].mean()) / scale
    return Data(X[train], y[train], X[test], y[test], scale)


def synthetic(seed: int, n: int = 1000, d: int = 8) -> Data:
    """A draw from an ARD RBF process with lengthscales 1.5 to 20 and a noise of 5 % of the signal."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n + 200, d))
    u = X / np.geomspace(1.5, 20, d)
    sq = ((u[:, None] - u[None]) ** 2).sum(-1)
    y = np.linalg.cholesky(np.exp(-sq / 2) + 0.05 * np.eye(len(X))) @ rng.standard_normal(len(X))
    return standardised(X, y, np.arange(n, n + 200))


def real(name: str, split: int = 0) -> Data:
    if name == "diabetes":
        X, y = load_diabetes(return_X_y=True)
        return standardised(X, y, np.random.default_rng(split).choice(len(y), len(y) // 10, replace=False))
    with np.load(UCI / f"{name}.npz") as z:
        return standardised(z["X"], z["y"], z["test_idx"][split].astype(int))


def real_names() -> list[str]:
    return ["diabetes", *(n for n in ("yacht", "energy", "concrete") if (UCI / f"{n}.npz").exists())]


def fit_ours(data: Data, prior: str, device: str, mean: str = "zero") -> ScaleMixtureGPRegressor:
    model = ScaleMixtureGPRegressor(
        scale_prior=prior,
        noise=NOISE,
        mean=mean,
        normalize_X=False,
        normalize_y=False,
        # One start, as the peers have.
        n_restarts=1,
        device=device,
    )
    return model.fit(data.X, data.y)


def fit_sklearn(data: Data) -> GaussianProcessRegressor:
    d = data.X.shape[1]
    kernel = ConstantKernel(1.0, (1e-5, 1e5)) * SklearnRBF([math.sqrt(d)] * d, (1e-5, 1e5))
    return GaussianProcessRegressor(kernel + WhiteKernel(NOISE, (1e-8, 1e5))).fit(data.X, data.y)


def fit_gpytorch(data: Data, wanted: float, device: str) -> tuple[int, float]:
    """Run Adam until log p(y) is within 0.1 nat of ``wanted``; return the steps taken and the best value."""
    import gpytorch

    X, y = (torch.as_tensor(a, device=device) for a in (data.X, data.y))

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any) -> None:
            super().__init__(X, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=X.shape[1]))

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    constraint = gpytorch.constraints.GreaterThan(1e-8)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint).double().to(device)
    model = Model(likelihood).double().to(device)
    likelihood.noise = NOISE
    model.covar_module.outputscale = 1.0
    model.covar_module.base_kernel.lengthscale = math.sqrt(X.shape[1])
    model.train()
    likelihood.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    best = -math.inf
    with (
        gpytorch.settings.fast_computations(False, False, False),
        gpytorch.settings.max_cholesky_size(100_000),
    ):
        for step in range(ADAM_STEPS):
            adam.zero_grad()
            loss = -objective(model(X), y)
            best = max(best, -loss.item() * len(y))
            if best >= wanted - 0.1:
                return step, best
            loss.backward()
            adam.step()
    return ADAM_STEPS, best


def cpu_time(function: Any) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    result = function()
    return clock() - start, result


@functools.cache
def sklearn_of(name: str) -> tuple[float, GaussianProcessRegressor]:
    """Fit once for the two tables that need it."""
    data = synthetic(int(name[-1])) if name.startswith("synthetic") else real(name)
    return cpu_time(lambda: fit_sklearn(data))


def fit(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a fit. Ours runs five times around one fit of each of the slow ones, and its median counts."""
    rows = []
    for name in ["synthetic 0", "synthetic 1", "synthetic 2", *real_names()]:
        data = synthetic(int(name[-1])) if name.startswith("synthetic") else real(name)
        ours = [cpu_time(lambda d=data: fit_ours(d, "delta", args.device)) for _ in range(2)]
        sklearn_time, peer = sklearn_of(name)
        ours += [cpu_time(lambda d=data: fit_ours(d, "delta", args.device)) for _ in range(2)]
        best = ours[-1][1].log_marginal_likelihood_
        gpytorch_time, (steps, reached) = cpu_time(lambda d=data, b=best: fit_gpytorch(d, b, args.device))
        ours += [cpu_time(lambda d=data: fit_ours(d, "delta", args.device))]
        seconds = float(np.median([s for s, _ in ours]))
        more = {
            "n": len(data.y),
            "d": data.X.shape[1],
            "seconds": seconds,
            "iterations": ours[-1][1].n_iter_,
            "log_p": best,
        }
        other = peer.log_marginal_likelihood_value_
        rows.append(
            target_row(
                f"scikit-learn / ours, {name}",
                sklearn_time / seconds,
                4.0,
                at_least=True,
                **more,
                base_seconds=sklearn_time,
                base_log_p=other,
                higher="equal" if abs(other - best) <= 0.1 else ("ours" if best > other else "base"),
            )
        )
        rows.append(
            target_row(
                f"GPyTorch + Adam / ours, {name}",
                gpytorch_time / seconds,
                2.0,
                at_least=True,
                **more,
                base_seconds=gpytorch_time,
                base_log_p=reached,
                base_iterations=steps,
                higher="ours, Adam cut off" if steps == ADAM_STEPS else "equal",
            )
        )
    return rows


def priors(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a fit by the prior of the scale, over that of the Gaussian process."""
    rows = []
    for name in ("synthetic 0", "synthetic 1", "diabetes"):
        data = synthetic(int(name[-1])) if name.startswith("synthetic") else real(name)
        runs = {p: (lambda p=p, d=data: fit_ours(d, p, args.device)) for p in PRIORS}
        timings = interleave(runs, device=args.device, at_least=0, warmups=0)
        rows += [
            target_row(
                f"{p} / delta, fit of {name}",
                timings.ratio(p, "delta"),
                1.05 if p == "inverse_gamma" else 1.15,
                spread=timings.spread(p, "delta"),
                seconds=timings.median(p),
            )
            for p in PRIORS[1:]
        ]
    return rows


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean of 10,000 points from n = 2000 against one product K(X*, X) @ alpha, dense and in row blocks."""
    rows = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        X, Xs = rng.standard_normal((2000, 8)), rng.standard_normal((10_000, 8))
        model = ScaleMixtureGPRegressor(RBF(3.0), optimizer=None, device=args.device).fit(X, np.sin(X).sum(1))
        posterior = model.posterior_
        points = torch.as_tensor((Xs - X.mean(0)) / X.std(0)).to(posterior.X)
        kernel, alpha = posterior.kernel, posterior.alpha
        with torch.no_grad():
            runs = {
                "predict": lambda m=model, x=Xs: m.predict(x),
                "dense": lambda k=kernel, p=points, q=posterior, a=alpha: k(p, q.X) @ a,
                "blocks": lambda k=kernel, p=points, q=posterior, a=alpha: matvec(k, p, q.X, a),
            }
            timings = interleave(runs, device=args.device)
            found = runs["dense"]()[:, 0].cpu().numpy() * np.sin(X).sum(1).std() + np.sin(X).sum(1).mean()
        rows += [
            target_row(
                f"predict / K(X*, X) @ alpha, {base}",
                timings.ratio("predict", base),
                1.2,
                spread=timings.spread("predict", base),
                seed=seed,
                milliseconds=1e3 * timings.median("predict"),
                base_milliseconds=1e3 * timings.median(base),
                difference=float(np.abs(model.predict(Xs) - found).max()),
            )
            for base in ("dense", "blocks")
        ]
    return rows


def profile(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Where one evaluation of the likelihood and its gradient spends its time, in milliseconds, d = 8."""
    rows = []
    for n in (500, 1000, 2000):
        data = synthetic(0, n)
        X, y = (torch.as_tensor(a, device=args.device) for a in (data.X, data.y))
        model = ScaleMixtureGP(RBF([math.sqrt(8)] * 8), "delta", noise=NOISE, mean="zero").to(args.device)
        kernel = model.kernel
        K = kernel(X, X).detach()
        noisy = K + NOISE * torch.eye(n, dtype=K.dtype, device=K.device)
        factor = torch.linalg.cholesky(noisy)
        graph = kernel(X, X)
        parameters = list(kernel.parameters())
        runs = {
            "value and gradient": lambda m=model, X=X, y=y: m.profile_loss(X, y).backward(),
            "value": lambda m=model, X=X, y=y: m.profile_loss(X, y),
            "kernel": lambda k=kernel, X=X: k(X, X),
            "Cholesky": lambda A=noisy: torch.linalg.cholesky_ex(A),
            "inverse": lambda L=factor: torch.cholesky_inverse(L),
            "reverse pass of kernel": lambda g=graph, p=parameters, K=K: torch.autograd.grad(
                g, p, K, retain_graph=True
            ),
        }
        timings = interleave(runs, device=args.device)
        milliseconds = {k: 1e3 * timings.median(k) for k in runs}
        known = ("kernel", "Cholesky", "inverse", "reverse pass of kernel")
        rest = milliseconds["value and gradient"] - sum(milliseconds[k] for k in known)
        rows.append({"n": n, **milliseconds, "the rest": rest})
    return rows


def search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Log marginal likelihood that a search reaches with the scale in sight at first, or profiled out throughout."""
    rows = []
    sets: list[tuple[str, int]] = [("synthetic", k) for k in range(2)] + [("diabetes", 0)]
    if UCI.exists():
        sets += [(name, k) for name, count in (("yacht", 4), ("energy", 2)) for k in range(count)]
    for name, k in sets:
        data = synthetic(k, 400) if name == "synthetic" else real(name, k)
        if len(data.y) > 500:
            data = data._replace(X=data.X[::2], y=data.y[::2])
        row: dict[str, Any] = {"data": f"{name} {k}", "n": len(data.y)}
        for how, iterations in (("in sight first", None), ("profiled out", 0)):
            with mock.patch("stochproc.gp._approach._ITERATIONS", 30 if iterations is None else iterations):
                seconds, model = cpu_time(lambda d=data: fit_ours(d, "delta", args.device))
            row[how] = model.log_marginal_likelihood_
            row[f"seconds, {how}"] = seconds
        seconds, peer = cpu_time(lambda d=data: fit_sklearn(d))
        rows.append({**row, "scikit-learn": peer.log_marginal_likelihood_value_, "seconds, scikit-learn": seconds})
    return rows


def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out rows of the first split: RMSE and mean log predictive density in the units of y, 90 % coverage."""
    rows = []
    for name in real_names():
        data = real(name)
        models: dict[str, Any] = {f"ours, {p}": fit_ours(data, p, args.device, "constant") for p in PRIORS}
        models["scikit-learn"] = sklearn_of(name)[1]
        models["linear (BayesianRidge)"] = BayesianRidge().fit(data.X, data.y)
        for label, model in models.items():
            mean, std = model.predict(data.X_test, return_std=True)
            if isinstance(model, ScaleMixtureGPRegressor):
                density = model.log_predictive_density(data.X_test, data.y_test)
                low, high = model.predict_interval(data.X_test, 0.9).T
            else:
                density = norm.logpdf(data.y_test, mean, std)
                low, high = norm.interval(0.9, mean, std)
            rows.append(
                {
                    "data": name,
                    "model": label,
                    "rmse": float(np.sqrt(np.mean((mean - data.y_test) ** 2))) * data.scale,
                    "log_density": float(density.mean()) - math.log(data.scale),
                    "coverage": float(np.mean((low <= data.y_test) & (data.y_test <= high))),
                    "width": float(np.mean(high - low)) * data.scale,
                    "test_rows": len(data.y_test),
                }
            )
    return rows


TABLES = {
    "fit": fit,
    "priors": priors,
    "predict": predict,
    "profile": profile,
    "search": search,
    "accuracy": accuracy,
}

if __name__ == "__main__":
    args = arguments(__doc__)
    # Searches that end early say so in the tables; sklearn warns of every parameter at its bound.
    warnings.simplefilter("ignore")
    # What is imported at the first use is no part of a fit.
    small = standardised(np.random.default_rng(0).standard_normal((30, 2)), np.arange(30.0), np.arange(3))
    fit_ours(small, "burr_xii", args.device), fit_sklearn(small), fit_gpytorch(small, -1e9, args.device)
    run_tables("bench_gp", TABLES, args)
