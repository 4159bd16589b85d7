r"""
Kernels and products
====================

A kernel says how alike two points are. Here we build some, put them together, multiply a matrix of
220 million of their values without ever forming it, differentiate through the product, and put one of
our kernels into a GPyTorch model.
"""

# sphinx_gallery_thumbnail_number = 3

# %%
# Kernels are objects
# -------------------
# A kernel is called with two sets of points, one row a point, and returns a block of its matrix. It
# keeps positive hyperparameters as logarithms; the plain name reads and sets the value.
import matplotlib.pyplot as plt
import numpy as np
import torch

from stochproc.kernels import RBF, Linear, Matern, Periodic, RationalQuadratic

r = torch.linspace(0, 3, 200, dtype=torch.float64)[:, None]
origin = torch.zeros(1, 1, dtype=torch.float64)

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for kernel, label in [
    (RBF(), "RBF"),
    (Matern(nu=2.5), "Matern 5/2"),
    (Matern(nu=0.5), "Matern 1/2"),
    (RationalQuadratic(alpha=0.5), "rational quadratic"),
    (Periodic(period=2.0), "periodic"),
]:
    ax.plot(r, kernel(r, origin).detach(), label=label)
ax.set(xlabel="distance, in lengthscales", ylabel="k", title="Five kernels of the distance")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# Composing them
# --------------
# A sum says "this and that", a product "this as long as that". Below a straight trend plus a yearly
# rhythm whose shape drifts over some five years, and three functions drawn with that covariance.
from stochproc.solvers import safe_cholesky

kernel = 0.2 * Linear() + Periodic(lengthscale=1.0, period=1.0) * RBF(lengthscale=5.0)
t = torch.linspace(0, 8, 400, dtype=torch.float64)[:, None]
with torch.no_grad():
    factor = safe_cholesky(kernel(t), jitter=1e-8).unwrap()
generator = torch.Generator().manual_seed(0)
draws = factor @ torch.randn(400, 3, dtype=torch.float64, generator=generator)

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(t, draws)
ax.set(xlabel="years", title="Draws with a composed covariance")

# %%
# A product without the matrix
# ----------------------------
# Take 20,000 pixels of a photograph at random and ask for the picture. Averaging with kernel
# weights gives a pixel of the grid the colour :math:`\sum_j k(x_i, y_j) v_j / \sum_j k(x_i, y_j)`:
# two products with a matrix of 11,000 by 20,000, taken at once by a column of ones beside the three
# of colours. At 4 bytes each the entries would fill 0.9 GB; :func:`~stochproc.kernels.matvec` goes
# through them in blocks of rows that stay in the cache of the processor.
# :func:`~stochproc.kernels.select_backend` tells which way it takes.
import time

from stochproc.datasets import load_sample_images
from stochproc.kernels import matvec, select_backend

photo = torch.tensor(load_sample_images().data[0], dtype=torch.float32)
height, width, _ = photo.shape
places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
colours = photo.reshape(-1, 3)
order = torch.randperm(len(places), generator=generator)
train, test = order[:20_000], order[20_000:20_500]
on_grid = (places % 5 == 0).all(dim=1)


def smooth(kernel, x):
    """Average the colours of the known pixels around x."""
    known = torch.cat([colours[train], torch.ones(len(train), 1)], dim=1)
    sums = matvec(kernel, x, places[train], known)
    return sums[:, :3] / (sums[:, 3:] + 1e-6)


kernel = Matern(lengthscale=3.0, nu=1.5)
start = time.perf_counter()
with torch.no_grad():
    picture = smooth(kernel, places[on_grid])
pairs = int(on_grid.sum()) * len(train)
backend = select_backend(kernel, places[on_grid], places[train], columns=4)
print(f"{pairs / 1e6:.0f} million pairs in {time.perf_counter() - start:.1f} s, backend {backend}")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.scatter(*places[train].T.flip(0), s=0.3, c=colours[train])
left.set(title="20,000 pixels", xlim=(0, width), ylim=(height, 0), aspect="equal")
left.set(xticks=[], yticks=[])
right.imshow(picture.reshape(len(range(0, height, 5)), -1, 3).clip(0, 1))
right.set(title="Their kernel average", xticks=[], yticks=[])

# %%
# Gradients go through it
# -----------------------
# How far should the average reach? The error at 500 pixels that were left out is a function of the
# lengthscale, and autograd gives its slope: the backward pass recomputes each block, so memory
# stays small here too. :class:`~stochproc.solvers.LBFGS` follows the slope to the bottom, in the
# logarithm of the lengthscale, which is what the kernel stores.
from stochproc.solvers import LBFGS


def held_out_error():
    """Mean squared error of the colours left out."""
    return (smooth(kernel, places[test]) - colours[test]).square().mean()


lengthscales, errors, slopes = np.geomspace(0.6, 15, 6), [], []
for value in lengthscales:
    kernel.lengthscale = value
    error = held_out_error()
    (slope,) = torch.autograd.grad(error, kernel.log_lengthscale)
    errors.append(error.item())
    slopes.append(slope.item())

kernel.lengthscale = 3.0
result = LBFGS(tol=1e-4)(held_out_error, [kernel.log_lengthscale])
best = kernel.lengthscale.item()
print(f"{result.status.value}: lengthscale {best:.2f} pixels, error {result.value:.5f}")

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.semilogx(lengthscales, errors, "o", label="error")
for value, error, slope in zip(lengthscales, errors, slopes, strict=True):
    ends = np.array([-0.15, 0.15])
    ax.plot(
        value * np.exp(ends),
        error + slope * ends,
        color="C1",
        label="slope" if value == lengthscales[0] else None,
    )
ax.plot(best, result.value, "*", color="C2", markersize=12, label="found by LBFGS")
ax.set(xlabel="lengthscale, in pixels", ylabel="squared error", title="Error on pixels left out")
ax.legend(frameon=False)

# %%
# In a GPyTorch model
# -------------------
# :func:`~stochproc.kernels.as_gpytorch` makes any kernel of ours one of GPyTorch's. Here is the
# carbon dioxide in the air of Mauna Loa from 1965 to 1985, every fourth week, under a long trend
# plus a rhythm of a year whose shape may drift; we learn all hyperparameters on it and look ten
# years ahead.
import gpytorch

from stochproc.datasets import load_co2
from stochproc.kernels import as_gpytorch

years, ppm = (torch.tensor(part)[::4] for part in load_co2(return_X_y=True))
known = ((years > 1965) & (years < 1985)).squeeze()
centre, spread = ppm[known].mean(), ppm[known].std()
y = (ppm[known] - centre) / spread

trend = 10.0 * RBF(lengthscale=30.0)
rhythm = 0.1 * (Periodic(lengthscale=1.0, period=1.0) * RBF(lengthscale=30.0))
rest = 0.01 * RationalQuadratic(lengthscale=1.0, alpha=1.0)


class Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = as_gpytorch(trend + rhythm + rest)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
likelihood.noise = 0.001
model = Model(years[known], y, likelihood).double()
evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
model.train()
result = LBFGS(tol=1e-3)(lambda: -evidence(model(years[known]), y) * len(y), model.parameters())
print(f"{result.status.value} after {result.convergence.iterations} iterations")

model.eval()
with torch.no_grad():
    ahead = torch.linspace(1980, 1995, 360, dtype=torch.float64)[:, None]
    seen = likelihood(model(ahead))
mean, std = seen.mean * spread + centre, seen.stddev * spread

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ends = mean - 2 * std, mean + 2 * std
ax.fill_between(ahead.squeeze(), *ends, alpha=0.25, label="two standard deviations")
ax.plot(ahead, mean, label="prediction")
shown = ((years > 1980) & (years < 1995)).squeeze()
ax.plot(years[shown & known], ppm[shown & known], "k.", markersize=3, label="known")
ax.plot(years[shown & ~known], ppm[shown & ~known], "C3.", markersize=3, label="kept back")
ax.set(ylabel="carbon dioxide, ppm", title="Mauna Loa, ten years ahead")
ax.legend(frameon=False, loc="upper left")

# %%
# What to read next
# -----------------
# :doc:`/guide/kernel_layer` has the rule by which the backend is chosen, the other sums over pairs
# of points, and how to write a kernel of your own: one method.
# :doc:`/auto_tutorials/gp/plot_01_first_regression` fits a model without any of this machinery in
# sight. The signatures are in :doc:`/api/kernels`.
