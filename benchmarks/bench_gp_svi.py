"""One step of stochastic variational inference for classes: ours against GPyTorch's multitask SVGP, and its parts.

Run ``python benchmarks/bench_gp_svi.py [--device cuda] [--only TABLE ...]``. Both get the same points, the same
inducing points and one ARD RBF kernel for all classes, a full covariance a class, 100 Monte-Carlo samples of the
softmax, and Adam over everything; ours has the random scale on top. A step is bound, gradient and update. GPyTorch is
timed with one kernel and one set of inducing points for all classes, as ours, and also with one of each a class, as in
its examples. Accuracy is on three small real sets, with what would shame the model beside it.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel as SklearnConstant
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timing import arguments, interleave, run_tables, target_row

from stochproc.gp import ScaleMixtureGPClassifier, ScaleMixtureSVGP
from stochproc.kernels import RBF

M, B, C, SAMPLES = 200, 100, 10, 100


def problem(seed: int, d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(B, d, generator=gen), torch.randn(M, d, generator=gen)
    y = torch.randint(0, C, (B,), generator=gen)
    return X.to(device, dtype), Z.to(device, dtype), y.to(device)


def our_step(X: torch.Tensor, Z: torch.Tensor, y: torch.Tensor, **options: Any) -> Callable[[], Any]:
    d = X.shape[1]
    model = ScaleMixtureSVGP(RBF([math.sqrt(d)] * d), Z, C, **options).to(X.device)
    gen = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-2, fused=True)

    def step() -> None:
        adam.zero_grad()
        loss = -model.elbo(X, y, n_total=10_000, n_samples=SAMPLES, generator=gen) / 10_000
        loss.backward()
        adam.step()

    return step


def gpytorch_step(
    X: torch.Tensor, Z: torch.Tensor, y: torch.Tensor, *, shared: bool, fused: bool = True
) -> Callable[[], Any]:
    import gpytorch

    d = X.shape[1]
    batch = torch.Size() if shared else torch.Size([C])

    class Model(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            q = gpytorch.variational.CholeskyVariationalDistribution(M, batch_shape=torch.Size([C]))
            points = Z.clone() if shared else Z.expand(C, M, d).clone()
            inner = gpytorch.variational.VariationalStrategy(self, points, q, learn_inducing_locations=True)
            super().__init__(gpytorch.variational.IndependentMultitaskVariationalStrategy(inner, num_tasks=C))
            self.mean_module = gpytorch.means.ZeroMean(batch_shape=batch)
            base = gpytorch.kernels.RBFKernel(ard_num_dims=d, batch_shape=batch)
            base.lengthscale = math.sqrt(d)
            self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=batch)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model().to(X)
    likelihood = gpytorch.likelihoods.SoftmaxLikelihood(num_classes=C, mixing_weights=False).to(X)
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=10_000)
    model.train()
    likelihood.train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)

    def step() -> None:
        adam.zero_grad()
        with gpytorch.settings.num_likelihood_samples(SAMPLES):
            loss = -objective(model(X), y)
        loss.backward()
        adam.step()

    return step


def step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of one step, ours over theirs."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        for seed, d in ((0, 8), (1, 64)):
            X, Z, y = problem(seed, d, dtype, args.device)
            runs = {
                "ours": our_step(X, Z, y),
                "GPyTorch, one kernel": gpytorch_step(X, Z, y, shared=True),
                "GPyTorch, a kernel a class": gpytorch_step(X, Z, y, shared=False),
            }
            timings = interleave(runs, device=args.device, at_least=0.3, warmups=3)
            rows += [
                target_row(
                    f"ours / {peer}, d = {d}, {str(dtype).removeprefix('torch.')}",
                    timings.ratio("ours", peer),
                    0.7,
                    spread=timings.spread("ours", peer),
                    milliseconds=1e3 * timings.median("ours"),
                    base_milliseconds=1e3 * timings.median(peer),
                )
                for peer in list(runs)[1:]
            ]
    return rows


def forms(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of one step by form of the covariance, coupling and family of q(s), over the default."""
    X, Z, y = problem(0, 8, torch.float64, args.device)
    runs = {
        "default (full, scaled, inverse gamma)": our_step(X, Z, y),
        "fixed": our_step(X, Z, y, coupling="fixed"),
        "log-normal": our_step(X, Z, y, scale_family="lognormal"),
        "known scale (Delta)": our_step(X, Z, y, scale_prior="delta"),
        "lowrank": our_step(X, Z, y, covariance="lowrank"),
        "diag": our_step(X, Z, y, covariance="diag"),
        "robustmax": our_step(X, Z, y, link="robustmax"),
    }
    timings = interleave(runs, device=args.device, at_least=0.2, warmups=3)
    base = next(iter(runs))
    return [{"form": k, "milliseconds": 1e3 * timings.median(k), "over default": timings.ratio(k, base)} for k in runs]


def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of right classes and log loss on held-out rows (30 %, stratified), with CPU time of the fit."""
    rows = []
    for name, load in (("iris", load_iris), ("wine", load_wine), ("digits", load_digits)):
        X, y = load(return_X_y=True)
        X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
        digits = name == "digits"
        # Digits: one scale for all pixels, one lengthscale, thirty epochs.
        options: dict[str, Any] = {"kernel": RBF(8.0), "normalize_X": "global"} if digits else {}
        options |= {"random_state": 0, "device": args.device}
        short = {"max_epochs": 30} if digits else {}
        models: dict[str, Any] = {
            "ours": ScaleMixtureGPClassifier(**options, **short),
            "ours, fixed": ScaleMixtureGPClassifier(coupling="fixed", **options, **short),
            "ours, Gaussian process (Delta)": ScaleMixtureGPClassifier(scale_prior="delta", **options, **short),
            "ours, one-hot regression": ScaleMixtureGPClassifier(link="gaussian", **options),
            "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
            "gradient boosting": HistGradientBoostingClassifier(random_state=0),
        }
        if not digits:
            kernel = SklearnConstant(1.0) * SklearnRBF([math.sqrt(X.shape[1])] * X.shape[1])
            models["scikit-learn Laplace, one against the rest"] = make_pipeline(
                StandardScaler(), GaussianProcessClassifier(kernel)
            )
        for label, model in models.items():
            start = time.process_time()
            proba = model.fit(X, y).predict_proba(X_test)
            row = {"data": name, "model": label, "accuracy": float((proba.argmax(1) == y_test).mean())}
            elbo = float(model.elbo_history_[-1]) if hasattr(model, "model_") else None
            seconds = time.process_time() - start
            rows.append({**row, "log_loss": float(log_loss(y_test, proba)), "bound a row": elbo, "seconds": seconds})
    return rows


TABLES = {"step": step, "forms": forms, "accuracy": accuracy}

if __name__ == "__main__":
    args = arguments(__doc__)
    warnings.simplefilter("ignore")
    run_tables("bench_gp_svi", TABLES, args)
