r"""
Heavy tails, and what one scale can and cannot do
=================================================

A scale mixture multiplies a whole Gaussian process by one random scale. Its paths look Gaussian, its predictions have
heavy tails: they admit that the size of the function is not known. We look at the priors, at what data make of them,
at where the noise belongs, and at a case in which one scale for everything is the wrong tool.
"""

# %%
# Priors of the scale
# -------------------
# The scale s multiplies the covariance. Left: densities of s for some of the priors in the library, each set to a
# median of one. Right: the law of a single value of the process, on a logarithmic axis, where a Gaussian is a parabola
# and a power law of tail index a falls like a line of slope -2a - 1 does on two.
import matplotlib.pyplot as plt
import numpy as np
import torch

from stochproc.gp import (
    BurrXII,
    Delta,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    Predictive,
    scale_posterior,
)

priors = {
    "Delta (Gaussian)": Delta(),
    "InverseGamma (Student-t)": InverseGamma(2.0, 1.68),
    "LogNormal": LogNormal(0.0, 1.0),
    "BurrXII": BurrXII(2.0, 1.0),
    "HalfCauchy": HalfCauchy(1.0),
}
s = torch.logspace(-2, 2, 300, dtype=torch.float64)
z = torch.linspace(-12, 12, 401, dtype=torch.float64)
nothing = torch.tensor(0.0, dtype=torch.float64)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
with torch.no_grad():
    for i, (name, prior) in enumerate(priors.items()):
        if name.startswith("Delta"):
            left.axvline(1.0, color=f"C{i}")
        else:
            left.plot(s, (prior.log_prob(s) + s.log()).exp(), color=f"C{i}")
        law = Predictive(torch.zeros_like(z), torch.ones_like(z), scale_posterior(prior, 0, nothing))
        right.semilogy(z, law.log_prob(z).exp(), color=f"C{i}", label=name)
left.set(xscale="log", xlabel="scale s", ylabel="density of log s", title="Priors of the scale")
right.set(ylim=(1e-9, 1), xlabel="value of the process", ylabel="density", title="Law of one value")
fig.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5)

# %%
# What data make of them
# ----------------------
# A prior matters as long as the data have not told the scale. From n values of a process of scale 4, the posterior of
# the scale narrows like :math:`\sqrt{2/n}`, whatever the prior. Bars hold nine tenths of it.
true_scale = 4.0
sizes = [1, 3, 10, 30, 100, 300]
draws = np.random.default_rng(0).normal(size=max(sizes)) * np.sqrt(true_scale)
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
shown = [name for name in priors if not name.startswith("Delta")]
for i, name in enumerate(shown):
    ends = []
    for n in sizes:
        quad = torch.tensor(float((draws[:n] ** 2).sum()), dtype=torch.float64)
        sample = scale_posterior(priors[name], n, quad).sample(4000, generator=torch.Generator().manual_seed(0))
        ends.append(np.quantile(sample.numpy(), [0.05, 0.5, 0.95]))
    low, middle, high = np.array(ends).T
    place = np.array(sizes) * 1.12 ** (i - 1.5)
    ax.errorbar(place, middle, [middle - low, high - middle], fmt="o", color=f"C{i + 1}", capsize=3, label=name)
ax.axhline(true_scale, color="0.6", zorder=0, label="truth")
ax.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
ax.set(xlabel="values observed", ylabel="scale", title="Posterior of the scale")
ax.minorticks_off()
ax.legend(frameon=False, fontsize=8)

# %%
# Where the noise belongs
# -----------------------
# ``noise_model="scaled"`` multiplies the noise by the scale as well: then everything is in closed form for the inverse
# gamma prior. ``"independent"`` keeps the noise apart, as for an instrument whose error is the same whatever it
# measures; the posterior of the scale is then integrated over numerically. With some dozen values the two hardly
# differ; the outputs differ where the prior of the scale decides, far from the data.
from stochproc.gp import ScaleMixtureGPRegressor

rng = np.random.default_rng(2)
x = np.sort(rng.uniform(0, 6, 14))[:, None]
y = np.sin(1.5 * x[:, 0]) + 0.2 * rng.normal(size=14)
grid = np.linspace(-1, 9, 200)[:, None]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, noise_model in zip(axes, ("scaled", "independent"), strict=True):
    model = ScaleMixtureGPRegressor("matern52", noise_model=noise_model).fit(x, y)
    lower, middle, upper = model.predict_quantiles(grid, [0.05, 0.5, 0.95]).T
    ax.fill_between(grid[:, 0], lower, upper, alpha=0.25, linewidth=0)
    ax.plot(grid, middle)
    ax.plot(x, y, "k.")
    ax.set(title=f"{noise_model}: log p(y) {model.log_marginal_likelihood_:.2f}", xlabel="x")
axes[0].set_ylabel("y")

# %%
# What one scale cannot do
# ------------------------
# All values share the scale. A few outliers make it larger for all of them: intervals widen everywhere, and the mean
# still follows the outliers, exactly as a Gaussian process would. To give less weight to single values, each needs a
# scale of its own, which is another model. Here a twentieth of the values are far off; the table has the densities of
# 200 clean values.
n = 80
x = np.sort(rng.uniform(0, 10, n))[:, None]
clean = np.sin(x[:, 0]) + 0.1 * rng.normal(size=n)
spoilt = clean.copy()
spoilt[rng.choice(n, n // 20, replace=False)] += rng.choice([-4.0, 4.0], n // 20)
x_new = np.sort(rng.uniform(0, 10, 200))[:, None]
y_new = np.sin(x_new[:, 0]) + 0.1 * rng.normal(size=200)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
print("held-out density, nats a value      clean   with outliers")
for ax, prior in zip(axes, ("delta", "half_cauchy"), strict=True):
    density = []
    for values in (clean, spoilt):
        model = ScaleMixtureGPRegressor("rbf", scale_prior=prior).fit(x, values)
        density.append(model.log_predictive_density(x_new, y_new).mean())
    print(f"{prior:34s} {density[0]:6.2f} {density[1]:12.2f}")
    lower, upper = model.predict_interval(x_new).T
    ax.fill_between(x_new[:, 0], lower, upper, alpha=0.25, linewidth=0, label="90 % interval")
    ax.plot(x_new, model.predict(x_new), label="mean")
    ax.plot(x, spoilt, "k.", label="data")
    ax.set(title=f"scale_prior={prior!r}", xlabel="x")
axes[0].set(ylabel="y", ylim=(-5, 6))
axes[1].legend(frameon=False, fontsize=8, loc="upper right", ncols=3)

# %%
# What to read next
# -----------------
# :doc:`plot_01_first_regression` shows how much an unknown scale is worth with few data. :doc:`/guide/what_for` says
# what a scale mixture is for, :class:`~stochproc.gp.ScalePrior` how to write a prior of your own.
