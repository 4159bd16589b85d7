r"""
Kernels of infinite networks
============================

A network with random weights is a random function. As its layers get wider it becomes a Gaussian process, whose
covariance can be computed layer by layer. We draw finite networks, watch them approach that limit, look at what depth
and activation do, fit such a kernel to data, and see what training a whole ensemble would give.
"""

# %%
# From finite to infinite
# -----------------------
# :mod:`~stochproc.gp.arch` composes layers. A network computes its own covariance with ``nngp`` and, with
# ``sample_network``, draws finite networks of the same prior. Here the inputs lie on a circle, so the covariance is a
# function of the angle. Some thousand outputs of each width give an estimate of it: those of width 2 are off, the wide
# ones agree but for chance.
import matplotlib.pyplot as plt
import numpy as np
import torch

from stochproc.gp import arch

net = arch.mlp(2, "relu")
angle = torch.linspace(0, torch.pi, 41, dtype=torch.float64)
circle = torch.stack([angle.cos(), angle.sin()], dim=1)
exact = net.nngp(circle[:1], circle)[0].detach()


def outputs(width, n_networks=400, n_outputs=10):
    """Draw networks, each with several outputs, and evaluate them on the circle."""
    options = {"n_features": 2, "n_outputs": n_outputs, "dtype": torch.float64}
    with torch.no_grad():
        networks = (net.sample_network(width, seed=i, **options) for i in range(n_networks))
        return torch.cat([network(circle).T for network in networks])


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
wide = outputs(256)
left.plot(angle, wide[::10][:8].T, linewidth=1)
left.set(xlabel="angle", ylabel="output", title="Eight networks of width 256")
for width, values in ((2, outputs(2)), (256, wide)):
    right.plot(angle, values.T @ values[:, 0] / len(values), label=f"width {width}")
right.plot(angle, exact, "k--", label="infinite")
right.set(xlabel="angle between two inputs", ylabel="covariance of the outputs", title="Over 4,000 outputs")
right.legend(frameon=False)

# %%
# Depth and activation
# --------------------
# A layer maps covariances to covariances. With ReLU units depth pulls all correlations towards one, so deep networks
# hardly tell inputs apart; erf units and sines keep more. :func:`~stochproc.gp.arch.serial` and
# :func:`~stochproc.gp.arch.residual` build anything that is missing from :func:`~stochproc.gp.arch.mlp`.
custom = arch.serial(
    arch.Dense(1.4, 0.1),
    arch.residual(arch.Gelu(), arch.Dense(1.0, 0.1)),
    arch.LayerNorm(),
    arch.Erf(),
    arch.Dense(1.0),
)
panels = {
    "ReLU": {f"depth {depth}": arch.mlp(depth, "relu") for depth in (1, 4, 16)},
    "Other networks, depth 4": {name: arch.mlp(4, name, w_std=1.5) for name in ("erf", "sin")}
    | {"a residual block": custom},
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
with torch.no_grad():
    for ax, (title, nets) in zip(axes, panels.items(), strict=True):
        for label, one in nets.items():
            covariance = one.nngp(circle[:1], circle)[0]
            ax.plot(angle, covariance / covariance[0], label=label)
        ax.set(xlabel="angle between two inputs", title=title)
        ax.legend(frameon=False)
axes[0].set_ylabel("correlation of the outputs")

# %%
# Nearby inputs
# -------------
# The textbook recursion takes the arc cosine of a correlation that rounds to one: two inputs closer than the square
# root of the rounding error become the same, and the tangent kernel, whose slope is steepest there, loses its digits.
# Layers here carry the defect of the correlation instead, which stays accurate at any distance. In float32:
distance = torch.logspace(-6, 0, 25, dtype=torch.float64)
near = torch.stack([distance.cos(), distance.sin()], dim=1)
origin = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def textbook(x, y, depth):
    """Tangent kernel of a ReLU network by the usual recursion, for inputs of norm one."""
    q, t = (x @ y.T)[0] / 2, torch.zeros(len(y), dtype=x.dtype)
    n = torch.full_like(q, 0.5)
    for layer in range(depth + 1):
        w, b = (2.0, 0.04) if layer < depth else (1.0, 0.0)
        q, n, t = w * q + b, w * n + b, w * t + w * q + b
        if layer < depth:
            theta = (q / n).clamp(-1, 1).acos()
            dot = (torch.pi - theta) / (2 * torch.pi)
            q, n, t = n * (theta.sin() + (torch.pi - theta) * theta.cos()) / (2 * torch.pi), n / 2, t * dot
    return t


deep = arch.mlp(10, "relu")
with torch.no_grad():
    # What is compared is rounding alone: the exact values are those of the rounded points.
    x, y = origin.float(), near.float()
    exact = deep.ntk(x.double(), y.double())[0]
    naive_error = (textbook(x, y, 10).double() / exact - 1).abs()
    error = (deep.ntk(x, y)[0].double() / exact - 1).abs()

fig, ax = plt.subplots(figsize=(6, 3.3), layout="constrained")
ax.loglog(distance, naive_error + 1e-9, label="arc cosine of the correlation")
ax.loglog(distance, error + 1e-9, label="here")
ax.set(xlabel="distance of two inputs", ylabel="relative error", title="Tangent kernel of depth 10 in float32")
ax.legend(frameon=False)

# %%
# A network as the kernel of a regression
# ---------------------------------------
# Estimators take a network, or its name, as ``kernel``. They learn its standard deviations and one scale for each
# column by maximal marginal likelihood. Two thirds of 442 patients are to predict the others.
from stochproc.datasets import load_diabetes
from stochproc.gp import ScaleMixtureGPRegressor

X, y = load_diabetes(return_X_y=True)
order = np.random.default_rng(0).permutation(len(y))
train, test = order[:295], order[295:]
for kernel in ("rbf", "mlp-relu-1", "mlp-erf-2"):
    model = ScaleMixtureGPRegressor(kernel, n_restarts=1).fit(X[train], y[train])
    density = model.log_predictive_density(X[test], y[test]).mean()
    print(
        f"{kernel:10s} log p(y) {model.log_marginal_likelihood_:8.1f}   held-out density {density:.3f} nats a patient"
    )

# %%
# What training would do
# ----------------------
# Gradient descent on a very wide network moves its outputs by the tangent kernel, so the outcome of training
# infinitely many of them is known too: :class:`~stochproc.gp.TrainedEnsemble`. Before training it is the prior. A
# little training bends it to the data; at the end all networks meet the data and differ where there are none, though
# by little, since one tangent kernel moves them all. With the last layer alone trained it is the Bayesian posterior
# without noise.
from stochproc.gp import TrainedEnsemble

x = np.sort(np.random.default_rng(1).uniform(-3, 3, 12))[:, None]
values = np.sin(2 * x[:, 0]) + 0.3 * x[:, 0]
grid = np.linspace(-4, 4, 200)[:, None]
ensembles = {
    "untrained": TrainedEnsemble("mlp-relu-2", time=0.0),
    "a little": TrainedEnsemble("mlp-relu-2", time=0.1),
    "to the end": TrainedEnsemble("mlp-relu-2"),
    "last layer alone": TrainedEnsemble("mlp-relu-2", train="readout"),
}
fig, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained", sharex=True, sharey=True)
for ax, (title, ensemble) in zip(axes, ensembles.items(), strict=True):
    lower, upper = ensemble.fit(x, values).predict_interval(grid).T
    ax.fill_between(grid[:, 0], lower, upper, alpha=0.25, linewidth=0)
    ax.plot(grid, ensemble.predict(grid))
    ax.plot(x, values, "k.")
    ax.set(title=title, xlabel="x", ylim=(-3, 3))
axes[0].set_ylabel("y")

# %%
# What to read next
# -----------------
# :doc:`/guide/infinite_networks` lists the layers and the mathematics. :doc:`plot_03_heavy_tails` leaves the scale of
# the weights open. :doc:`plot_05_50000_points` is about more data than a matrix can hold.
