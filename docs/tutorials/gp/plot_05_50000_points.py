r"""
50,000 points
=============

A kernel matrix of 50,000 points has 2.5 billion entries, 20 GB in double precision. It is never needed: products with
it are. We multiply by such a matrix in some megabytes, fit a Student-t process to more rows than a Cholesky factor
likes, check it against the exact one where that is possible, and say what the whole of 50,000 costs.
"""

# %%
# A matrix that is not there
# --------------------------
# ``lazy`` gives the kernel of a network as an operator. Blocks of rows are computed, used and forgotten. A product with
# 5,000 points takes moments, and its time grows with the square of their number, its memory in proportion to it.
import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from stochproc.gp import ScaleMixtureGPRegressor, arch

net = arch.mlp(2, "relu")
generator = torch.Generator().manual_seed(0)
sizes, seconds = [750, 1_500, 3_000, 6_000], []
with torch.no_grad():
    for n in sizes:
        X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        v = torch.ones(n, 1, dtype=torch.float64)
        operator = net.lazy(X, backend="chunked")
        start = time.process_time()
        product = operator @ v
        seconds.append(time.process_time() - start)
print(f"{1e9 * seconds[-1] / sizes[-1] ** 2:.0f} ns an entry")
print(f"so 50,000 points: {seconds[-1] * (50_000 / sizes[-1]) ** 2:.0f} s a product")

fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
ax.loglog(sizes, seconds, "o-", label="measured")
ax.loglog(sizes, seconds[-1] * (np.array(sizes) / sizes[-1]) ** 2, "k--", label="square of the points")
ax.set(xlabel="points", ylabel="seconds a product", xticks=sizes, xticklabels=sizes)
ax.minorticks_off()
ax.legend(frameon=False)

# %%
# Fit without a factor
# --------------------
# From 5,000 rows on (or with ``solver="cg"``) the estimator solves its systems by preconditioned conjugate gradients.
# Hyperparameters are learned by Cholesky on ``hyper_subset`` of the rows: they need fewer data than predictions do.
# The scale of the prior and the predictions use all of them. Here both ways are affordable, so that we can compare.
rng = np.random.default_rng(0)
X = rng.uniform(-3, 3, size=(2_500, 2))


def surface(X):
    """Two ridges and a bump."""
    return np.sin(2 * X[:, 0]) * np.cos(X[:, 1]) + np.exp(-((X - 1) ** 2).sum(1))


y = surface(X) + 0.2 * rng.normal(size=len(X))
X_new = rng.uniform(-3, 3, size=(400, 2))

start = time.process_time()
model = ScaleMixtureGPRegressor("rbf", solver="cg", hyper_subset=500, mean="zero", random_state=0).fit(X, y)
print(f"fit {time.process_time() - start:.1f} s of CPU time")

# The same hyperparameters with a factor: what differs is the solver.
given = {"noise": model.noise_, "scale_prior": model.scale_prior_, "mean": "zero", "optimizer": None}
exact = ScaleMixtureGPRegressor(model.kernel_, solver="cholesky", **given).fit(X, y)
(mean_cg, std_cg), (mean, std) = (m.predict(X_new, return_std=True) for m in (model, exact))
print(f"largest differences: means {abs(mean - mean_cg).max():.1e}, deviations {abs(std - std_cg).max():.1e}")

fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained", sharey=True)
grid = np.stack(np.meshgrid(*[np.linspace(-3, 3, 40)] * 2), axis=-1)
truth = surface(grid.reshape(-1, 2)).reshape(40, 40)
found = model.predict(grid.reshape(-1, 2)).reshape(40, 40)
for ax, values, title in zip(axes, (truth, found), ("Truth", "Found from 2,500 noisy values"), strict=True):
    image = ax.pcolormesh(grid[..., 0], grid[..., 1], values, vmin=-1.2, vmax=1.8, cmap="viridis", shading="auto")
    ax.set(title=title, aspect="equal")
fig.colorbar(image, ax=axes)

# %%
# How many rows the hyperparameters need
# --------------------------------------
# A few hundred rows settle lengthscales and noise to some per cent, which costs the predictions little: the held-out
# density soon stops changing.
y_new = surface(X_new) + 0.2 * rng.normal(size=len(X_new))
subsets, density = [50, 100, 200, 400], []
for subset in subsets:
    model = ScaleMixtureGPRegressor("rbf", solver="cg", hyper_subset=subset, n_restarts=1, random_state=0).fit(X, y)
    density.append(model.log_predictive_density(X_new, y_new).mean())

fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
ax.semilogx(subsets, density, "o-")
ax.set(xlabel="rows for the hyperparameters, hyper_subset", ylabel="held-out density, nats a value")
ax.set(xticks=subsets, xticklabels=subsets)
ax.minorticks_off()

# %%
# What to read next
# -----------------
# :doc:`/auto_tutorials/solvers/plot_01_preconditioned_cg` opens the solver. :doc:`/guide/distributed` divides a product
# over processes; on a GPU the ``"keops"`` backend takes it. The numbers of 20,000 and 50,000 points are in
# ``benchmarks/bench_gp_large.py`` and its results.
