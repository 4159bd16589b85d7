r"""
100,000 points without a matrix
===============================

Between two clouds of 100,000 points there are ten thousand million pairs: costs and plan would take 80 GB each. For
clouds of points neither has to be stored. We solve such a problem for 10,000 points while this page is built, use the
plan without writing it out, and quote measurements for ten times as many.
"""

# %%
# A problem that is not stored
# ----------------------------
# :func:`~stochproc.ot.solve_sample` takes points instead of costs. With ``lazy=True`` every pass computes costs block
# by block and forgets them; with ``lazy="auto"``, the default, it does so once stored arrays would fill a quarter of
# the free memory. In up to three dimensions the solver climbs from coarse versions of the clouds to the points, and
# where the plan is concentrated it looks at near pairs alone. The err it reports is that of one last pass over all
# pairs in float64, nothing left out. ``reg`` is a thousandth of the squared diameter of the square.
import time

import matplotlib.pyplot as plt
import torch

from stochproc import ot

generator = torch.Generator().manual_seed(0)


def clouds(n):
    """Draw points of a square, and of a ring."""
    X = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    angle = 2 * torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    radius = 0.35 + 0.06 * torch.randn(n, generator=generator, dtype=torch.float64)
    return X, 0.5 + radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


X, Y = clouds(10_000)
reg = 1e-3 * 2
start = time.perf_counter()
result = ot.solve_sample(X, Y, reg=reg, lazy=True, tol=1e-4)
print(f"{time.perf_counter() - start:.1f} s: {result}")
print(f"rule {result.stats['rule']}, {result.stats['density']:.0%} of the pairs in all passes but the last")

moved = result.a_to_b()
shown = torch.arange(0, len(X), 25)
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained", sharex=True, sharey=True)
for ax, points, title in ((axes[0], X, "Sources"), (axes[2], Y, "Targets")):
    ax.plot(*points.T, ",", color="C0" if points is X else "C1")
    ax.set(title=title, xlabel="x", aspect="equal")
steps = (moved - X)[shown]
axes[1].quiver(*X[shown].T, *steps.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="0.3")
axes[1].set(title="Every 25th source, moved", xlabel="x", aspect="equal")
axes[0].set_ylabel("y")

# %%
# The plan as an operator
# -----------------------
# ``lazy_plan`` multiplies, gives single rows, and lists the entries above a threshold; ``plan`` would write all of it
# out, which is refused beyond 100 million entries. A product moves any quantity along with the mass: here a label of
# the sources, the distance from the centre, to the targets, and a row shows where one source goes.
plan = result.lazy_plan
label = (X - 0.5).norm(dim=1)
arrived = (plan.T @ label) * len(Y)
corner = int((X - 0.98).norm(dim=1).argmin())
row = plan.row(corner) * len(X)

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained", sharex=True, sharey=True)
drawn = axes[0].scatter(*X.T, c=label, s=1, vmin=0, vmax=0.7)
axes[0].set_title("A label of the sources")
axes[1].scatter(*Y.T, c=arrived, s=1, vmin=0, vmax=0.7)
axes[1].set_title("Carried to the targets")
fig.colorbar(drawn, ax=axes[1], label="label")
axes[2].scatter(*Y.T, color="0.85", s=1)
spots = row > 1e-3 * row.max()
axes[2].scatter(*Y[spots].T, c=row[spots], s=4, cmap="Reds")
axes[2].plot(*X[corner], "k*", markersize=9)
axes[2].set_title("Where one source (star) goes")
for ax in axes:
    ax.set(xlabel="x", aspect="equal")
axes[0].set_ylabel("y")

# %%
# Checked by hand
# ---------------
# The certificate can be recomputed from the potentials by anybody: exponentials of
# :math:`(f_i + g_j - c_{ij}) / \varepsilon`, weighted, must sum to the weights. A thousand rows at a time take little
# memory. Both marginals together give ``err``.
f, g = result.potentials
n = len(X)
rows, columns = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
for block in torch.arange(n).split(1_000):
    entries = ((f[block, None] + g - torch.cdist(X[block], Y).square()) / reg).exp() / n**2
    rows[block] = entries.sum(dim=1)
    columns += entries.sum(dim=0)
err = (rows - 1 / n).abs().sum() + (columns - 1 / n).abs().sum()
print(f"err reported {result.err:.3e}, recomputed {err:.3e}")

fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
ax.hist((n * columns - 1).numpy(), bins=80, color="C0")
ax.set(xlabel="mass that arrives at a target, relative error", ylabel="targets", yscale="log")

# %%
# Growth
# ------
# Three small sizes, measured as this page is built, and two that take too long for a page: these are quoted from runs
# of the cases in ``benchmarks/bench_ot.py`` on one core of a server, and not run here. Both clouds are uniform on the
# square and in float32, ``reg`` is a thousandth of the squared diameter as before. Passes over all pairs grow with the
# square of the number of points; what comes before them does not, so that small clouds pay more for each pair.
# Memory beyond the points was 90 MB at 100,000 of them.
sizes, seconds = [1_000, 3_000, 10_000], []
for size in sizes:
    X, Y = torch.rand(2, size, 2, generator=generator, dtype=torch.float32)
    start = time.process_time()
    ot.solve_sample(X, Y, reg=2e-3, lazy=True, tol=1e-4)
    seconds.append(time.process_time() - start)

quoted = {30_000: 5.2, 100_000: 67}
fig, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
ax.loglog(sizes, seconds, "o-", label="measured here")
ax.loglog(list(quoted), list(quoted.values()), "s-", color="C1", label="quoted")
ax.loglog([1e4, 1e5], [0.67, 67], "k--", linewidth=1, label="square of the number of points")
ax.set(xlabel="points in each cloud", ylabel="seconds of CPU time", title="To a certified err of 1e-4")
ax.legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`/guide/kernel_layer` tells how sums over all pairs are computed without storing them, on a GPU too.
# :func:`~stochproc.ot.sinkhorn_divergence` and :class:`~stochproc.ot.SinkhornTransport` take large clouds in the same
# way. The Notes of :func:`~stochproc.ot.solve_sample` say when the ladder of coarse problems is used, and what is done
# elsewhere.
