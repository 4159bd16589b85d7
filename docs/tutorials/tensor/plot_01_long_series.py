r"""
Long series
===========

A Gaussian process in time need not cost the cube of the number of data: written as a stochastic differential
equation it is smoothed in one pass, exactly so for Matern kernels. We forecast a real record, fit a series that has
everything wrong with it, go to a million points, and build a model of our own in torch.
"""

# %%
# Fit, look, forecast
# -------------------
# The air over Mauna Loa has been analysed since 1958; some weeks are missing. We take every other week, and hide what
# came after 1990. NaN marks a value that was not observed, which is the same to the model whether it lies between
# the data or ahead of them. The kernel is a slow trend plus a rhythm of a year whose shape may drift. The period is
# known, so we keep it; the other hyperparameters are learned.
import matplotlib.pyplot as plt
import numpy as np

from stochproc.datasets import load_co2
from stochproc.gp import GPDisplay
from stochproc.kernels import Matern, Periodic, Scale
from stochproc.tensor import StateSpaceGP

record = load_co2()
years, ppm = record.times[::2, None], record.target[::2]
late = years[:, 0] > 1990
known = np.where(late, np.nan, ppm)

trend = Scale(Matern(lengthscale=50.0, nu=2.5), 10.0)
rhythm = Scale(Periodic(lengthscale=1.5, period=1.0) * Matern(lengthscale=100.0, nu=0.5), 0.05)
for name, parameter in rhythm.named_parameters():
    parameter.requires_grad_(not name.endswith("log_period"))

model = StateSpaceGP(trend + rhythm, noise=1e-3).fit(years, known)
print(f"{model.n_observed_} weeks, {model.n_iter_} iterations, converged: {model.converged_}")
print(f"standard deviation of the noise {model.noise_variance_**0.5:.2f} ppm")

test = late & ~np.isnan(ppm)
error = model.predict(years[test]) - ppm[test]
lower, upper = model.predict_interval(years[test], coverage=0.9).T
inside = np.mean((lower <= ppm[test]) & (ppm[test] <= upper))
print(f"after 1990: error {np.sqrt(np.mean(error**2)):.2f} ppm (root mean square), {inside:.0%} inside the interval")

fig, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
GPDisplay.from_estimator(model, years, known, n_grid=2_000, ax=ax, s=2)
ax.plot(years[test], ppm[test], "C3.", markersize=2, label="hidden")
ax.set(xlabel="year", ylabel="carbon dioxide, ppm", title="Mauna Loa, twelve years ahead", xlim=(1975, 2003))
ax.set_ylim(325, 385)
ax.legend(frameon=False, loc="upper left", markerscale=2)

# %%
# Trend and season apart
# ----------------------
# The kernel is a sum, and so is the function: the smoother knows the parts as well as the whole. What the data cannot
# tell is which part has the level: a periodic kernel contains a constant, which the trend can take over. So each part
# for itself is uncertain by tens of ppm, in its level alone, and what one has more the other has less.
at = np.arange(1959, 1990, 1 / 48)
parts, spread = model.predict_components(at, return_std=True)
_, of_sum = model.predict(at, return_std=True, latent=True)
print(f"standard deviations: trend {spread[:, 0].mean():.0f} ppm, season {spread[:, 1].mean():.0f} ppm", end=", ")
print(f"their sum {of_sum.mean():.2f} ppm")
swing = [np.ptp(parts[(at >= year) & (at < year + 1), 1]) for year in (1960, 1988)]
print(f"from the lowest to the highest week of a year: {swing[0]:.1f} ppm in 1960, {swing[1]:.1f} ppm in 1988")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(years, known, ".", color="0.75", markersize=2, label="data")
left.plot(at, parts[:, 0] + model.mean_, label="trend")
left.set(xlabel="year", ylabel="carbon dioxide, ppm", title="Trend", xlim=(1958, 1990.5))
left.legend(frameon=False)
for first, colour in [(1960, "C1"), (1974, "C2"), (1988, "C3")]:
    year = (at >= first) & (at < first + 1)
    right.plot(12 * (at[year] - first), parts[year, 1] - parts[year, 1].mean(), color=colour, label=f"{first}")
right.set(xlabel="month", ylabel="ppm", title="Season, less its mean")
right.legend(frameon=False)

# %%
# Everything wrong with it
# ------------------------
# A flood passes a gauge: a simulated one, so that the truth is known. The gauge reports at odd times, to 2 cm, and
# fails when it matters most. Then people read the level by eye, to 15 cm, two of them at the same minute. Rows may
# come in any order, times may repeat, and ``fit`` takes the variance of each reading. The noise of the estimator would
# come on top; zero says that there is no other.
#
# The process knows its slope: how many metres the level rises in an hour. And joint draws answer questions that
# bands cannot, such as when the water stood highest, and how high: each dot is the peak of one draw.
rng = np.random.default_rng(1)


def level(hours):
    """True level of the river in metres."""
    return 1.5 + 2.5 * np.exp(-0.5 * ((hours - 22) / 4.5) ** 2) + 0.6 * np.exp(-0.5 * ((hours - 37) / 3) ** 2)


by_gauge = rng.uniform(0, 48, 90)
failed = (by_gauge > 17) & (by_gauge < 29)
by_eye = np.repeat(np.arange(18.0, 29.0, 2.5), 2)
hours = np.concatenate([by_gauge, by_eye])
sigma = np.concatenate([np.full(90, 0.02), np.full(len(by_eye), 0.15)])
readings = level(hours) + sigma * rng.standard_normal(len(hours))
readings[:90][failed] = np.nan

flood = StateSpaceGP("matern52", noise=0.0).fit(hours, readings, noise=sigma**2)
at = np.linspace(0, 50, 501)
mean, std = flood.predict(at, return_std=True)
slope, slope_std = flood.predict_derivative(at, return_std=True)
draws = flood.sample(at, n_samples=300, random_state=0)
when, highest = at[draws.argmax(axis=0)], draws.max(axis=0)
print(f"{np.isnan(readings).sum()} values missing, {len(hours) - len(np.unique(hours))} times repeated")
for what, found, truth in [
    ("peak, hours", when, at[level(at).argmax()]),
    ("peak, metres", highest, level(at).max()),
]:
    print(
        "{}: {:.2f} to {:.2f} with probability 0.9, truth {:.2f}".format(what, *np.quantile(found, [0.05, 0.95]), truth)
    )

fig, (top, bottom) = plt.subplots(2, 1, figsize=(7.5, 5.5), layout="constrained", sharex=True)
for ax, middle, spread in [(top, mean, std), (bottom, slope, slope_std)]:
    ends = middle - 2 * spread, middle + 2 * spread
    ax.fill_between(at, *ends, color="C0", alpha=0.25, linewidth=0, label="two standard deviations")
    ax.plot(at, middle, label="mean")
top.plot(when, highest, "C2.", markersize=2, alpha=0.5, label="peaks of 300 draws")
for eye, style, label in [(False, "k.", "gauge"), (True, "C3s", "by eye")]:
    rows = (sigma > 0.1) == eye
    errors = 2 * sigma[rows]
    top.errorbar(hours[rows], readings[rows], errors, fmt=style, markersize=3, linewidth=0.8, label=label)
bottom.plot(at, np.gradient(level(at), at), "k--", linewidth=1, label="truth")
top.set(ylabel="level, m", title="A flood, its peak and its slope")
bottom.set(xlabel="time, hours", ylabel="slope, m an hour", ylim=(-0.6, 0.8))
top.legend(frameon=False, loc="upper right")
bottom.legend(frameon=False, loc="upper right")

# %%
# Several series at once
# ----------------------
# Three gauges along the river, each in a unit of its own and each failing now and then: columns of one ``y``, with NaN
# for the single values that are missing. They are independent processes, but they share times and, unless we say
# otherwise, kernel and noise, relative to the variance of each. Whether they should, the likelihood can tell: the third
# gauge is in a reservoir, where levels change slowly, so that sharing costs some twenty nats.
hours = np.sort(rng.uniform(0, 48, 150))
levels = np.stack([level(hours), 100 * level(hours - 3), 7 + 0.1 * np.cos(hours / 15)], axis=1)
gauges = levels + [0.05, 4.0, 0.004] * rng.standard_normal(levels.shape)
gauges[rng.uniform(size=gauges.shape) < 0.3] = np.nan

shared = StateSpaceGP("matern52").fit(hours, gauges)
own = StateSpaceGP("matern52", share_hyperparameters=False).fit(hours, gauges)
for what, found in [("shared", shared), ("own", own)]:
    print(f"{what} hyperparameters: log p(y) {found.log_marginal_likelihood_:.1f}")
print("lengthscales of their own, hours:", *(f"{l:.1f}" for l in own.kernel_.kernel.lengthscale[:, 0].tolist()))

at = np.linspace(0, 48, 400)
mean, std = own.predict(at, return_std=True, latent=True)
fig, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained", sharex=True)
for k, (ax, unit) in enumerate(zip(axes, ["m", "cm", "m"], strict=True)):
    ax.fill_between(at, mean[:, k] - 2 * std[:, k], mean[:, k] + 2 * std[:, k], color="C0", alpha=0.3, linewidth=0)
    ax.plot(at, mean[:, k], linewidth=1)
    ax.plot(hours, gauges[:, k], "k.", markersize=2)
    ax.set(xlabel="time, hours", ylabel=f"level, {unit}", title=f"gauge {k + 1}")

# %%
# A million points
# ----------------
# A matrix of a million by a million numbers takes 8 TB. :func:`~stochproc.solvers.sample_paths` draws a path of the
# prior at as many irregular times, and we add noise. We condition on the first n points, for n up to all of them: as
# long as n is small, time hardly depends on it, and later it is proportional. A search for the hyperparameters
# does the same some twenty times, with gradients; here on a tenth of the points. Where that takes too long, for kernels
# with many states, ``hyper_subset=`` learns from a part and conditions on all.
import time

import torch

from stochproc.solvers import sample_paths

n = 1_000_000
generator = torch.Generator().manual_seed(0)
days = (10_000 * torch.rand(n, generator=generator, dtype=torch.float64)).sort().values
truth = Matern(lengthscale=1.0, nu=1.5)
path = sample_paths(truth.state_space(), days, generator=generator)[0, :, 0]
values = path + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)

sizes, seconds = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000], []
for size in sizes:
    start = time.perf_counter()
    StateSpaceGP(truth, noise=0.25, normalize_y=False, optimizer=None).fit(days[:size], values[:size])
    seconds.append(time.perf_counter() - start)

start = time.perf_counter()
series = StateSpaceGP("matern32", normalize_y=False).fit(days[:100_000], values[:100_000])
print(f"learned from 100,000 points in {time.perf_counter() - start:.1f} s, {series.n_iter_} iterations")
lengthscale, noise = series.kernel_.kernel.lengthscale.item(), series.noise_
print(f"lengthscale {lengthscale:.3f} days (truth 1), variance of the noise {noise:.4f} (truth 0.25)")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained", width_ratios=(1, 1.6))
left.loglog(sizes, seconds, "o-", label="measured")
left.loglog(sizes, seconds[-1] / n * np.array(sizes), "k--", linewidth=1, label="proportional to n")
left.set(xlabel="points", ylabel="seconds", title="Conditioning")
left.legend(frameon=False)
zoom = (days > 500) & (days < 506)
mean, std = series.predict(days[zoom], return_std=True, latent=True)
right.plot(days[zoom], values[zoom], ".", color="0.75", markersize=2, label="data")
right.fill_between(days[zoom], mean - 2 * std, mean + 2 * std, color="C0", alpha=0.4, linewidth=0)
right.plot(days[zoom], mean, label="mean, two standard deviations")
right.plot(days[zoom], path[zoom], "k--", linewidth=1, label="truth")
right.set(xlabel="time, days", ylabel="value", title="Six days of ten thousand")
right.legend(frameon=False, markerscale=3)

# %%
# A sensor that drifts
# --------------------
# Beneath the estimator lies :func:`~stochproc.solvers.kalman_smoother`, for models of your own in torch. It takes a
# state space and messages about its outputs, which :func:`~stochproc.solvers.messages` makes of data and noise. Here a
# thermometer reports every hour or so, and drifts; now and then someone looks at a better one. So there are two
# processes, the temperature and the drift, stacked. A report is about their sum, a check about the temperature alone:
# with b the row of weights, a message about :math:`b^\top f` has precision :math:`b b^\top` over the variance.
#
# The logarithm of p(y) has gradients in all hyperparameters, so :class:`~stochproc.solvers.LBFGS` can learn them, and
# the smoother then takes temperature and drift apart.
from stochproc.kernels import StateSpace
from stochproc.solvers import LBFGS, kalman_smoother, messages

temperature, drift = Scale(Matern(lengthscale=3.0, nu=2.5), 4.0), Scale(Matern(lengthscale=200.0, nu=0.5), 4.0)
stacked = StateSpace.stack([temperature.state_space(), drift.state_space()])
times = (60 * torch.rand(1_450, generator=generator, dtype=torch.float64)).sort().values
both = sample_paths(stacked, times, generator=generator)[0]

is_check = torch.arange(len(times)) % 120 == 60
weights = torch.stack([torch.ones(len(times)), (~is_check).float()], dim=-1).double()
variances = torch.where(is_check, 0.01, 0.25).double()
y = (weights * both).sum(dim=-1) + variances.sqrt() * torch.randn(len(times), generator=generator, dtype=torch.float64)
precision, shift, constant = messages(y, variances)
precision, shift = precision * weights[:, :, None] * weights[:, None, :], shift * weights


def smooth(query=None):
    """Condition temperature and drift on all readings."""
    stacked = StateSpace.stack([temperature.state_space(), drift.state_space()])
    return kalman_smoother(stacked, times, precision, shift, query=query).unwrap()


temperature.kernel.lengthscale, drift.outputscale = 1.0, 1.0
parameters = [*temperature.parameters(), drift.log_outputscale]
learned = LBFGS()(lambda: -(smooth().log_z + constant), parameters)
print(f"{learned.status.value} after {learned.convergence.iterations} iterations, log p(y) {-learned.value:.2f}")
print(f"temperature: lengthscale {temperature.kernel.lengthscale.item():.2f} days (truth 3)")
print(f"drift: standard deviation {drift.outputscale.item() ** 0.5:.2f} degrees (truth 2)")

query = torch.linspace(0, 62, 1_000, dtype=torch.float64)
smoothed = smooth(query)
fig, axes = plt.subplots(2, 1, figsize=(8, 5.2), layout="constrained", sharex=True)
axes[0].plot(times[~is_check], y[~is_check], ".", color="0.75", markersize=2, label="reports")
for output, ax in enumerate(axes):
    mean, std = smoothed.mean[:, output], smoothed.cov[:, output, output].sqrt()
    ax.fill_between(query, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.3, linewidth=0)
    ax.plot(query, mean, label="mean, two standard deviations")
    ax.plot(times, both[:, output], "k--", linewidth=1, label="truth")
axes[0].plot(times[is_check], y[is_check], "C3s", markersize=4, label="checks")
axes[0].set(ylabel="temperature, degrees", title="A thermometer that drifts")
axes[1].set(xlabel="time, days", ylabel="drift, degrees")
axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)

# %%
# Many models at once
# -------------------
# A batch of hyperparameters, of series or of both goes through in one call. Here are fifteen lengthscales for the
# first 20,000 values of the long series: fifteen likelihoods, and one ``backward`` for their slopes.
scales = torch.logspace(-0.15, 0.15, 15, dtype=torch.float64)
many = Matern(lengthscale=scales[:, None], nu=1.5, batch_shape=(15,))
precision, shift, constant = messages(values[:20_000], 0.25)

start = time.perf_counter()
evidence = kalman_smoother(many.state_space(), days[:20_000], precision, shift).unwrap().log_z + constant
evidence.sum().backward()
slopes = many.log_lengthscale.grad[:, 0]
print(f"{len(scales)} likelihoods with slopes in {time.perf_counter() - start:.1f} s")

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
heights = (evidence - evidence.max()).detach()
ends = torch.tensor([-0.02, 0.02], dtype=torch.float64)
for i in range(len(scales)):
    label = "slope" if i == 0 else None
    ax.plot(scales[i] * ends.exp(), heights[i] + slopes[i] * ends, color="C1", label=label)
ax.plot(scales, heights, "o", markersize=4, label="log likelihood")
ax.axvline(1, color="0.7", linewidth=1, zorder=0, label="truth")
ax.set(xlabel="lengthscale, days", ylabel="log likelihood less the best, nats", title="Fifteen models of 20,000 points")
ax.legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`/guide/solvers` has the smoother among the other solvers, and what a status other than ``converged`` means.
# :doc:`/guide/estimator_contract` lists what every estimator does, saving included. The kernels with a state space
# and their sizes are in :class:`~stochproc.tensor.StateSpaceGP`; for points that do not lie on a line see
# :doc:`/auto_tutorials/solvers/plot_01_preconditioned_cg`.
