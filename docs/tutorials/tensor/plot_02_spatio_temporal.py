r"""
Scattered measurements in space and time
========================================

Stations lie where somebody put them, and report when they can. A :class:`~stochproc.tensor.FunctionalCP` makes of
such rows a field that is defined everywhere and at any time, with a standard deviation: a sum of products of
functions of each coordinate, :math:`f(x, y, t) = \sum_r u_r(x)\, v_r(y)\, w_r(t)`, where each function is a Gaussian
process. There is no grid, and time is linear in the number of rows.
"""

# %%
# Sixty stations, two hundred days
# --------------------------------
# The field is a made-up one, so that we know the truth: temperatures from January to July over a region of 300 by 200
# km. It has a season that is stronger inland, a warm town, cold spells that move from west to east, and weather that
# comes and goes from one day to the next for all. It is no sum of five products, nor of any other number. Each of 60
# stations reports on a fifth of the days, and no two of them need to report on the same one.
#
# The bound of the evidence creeps on for long after predictions have settled, and a larger ``tol`` saves those sweeps.
import matplotlib.pyplot as plt
import numpy as np

from stochproc.tensor import FunctionalCP

rng = np.random.default_rng(0)
weather = np.convolve(rng.standard_normal(240), np.exp(-np.arange(20) / 3), "valid")


def temperature(x, y, day):
    """True temperature in degrees, x and y in km from the south-western corner."""
    season = -(6 + 5 * x / 300) * np.cos(2 * np.pi * (day - 20) / 365)
    town = 3 * np.exp(-((x - 90) ** 2 + (y - 120) ** 2) / 40**2)
    spell = -4 * np.exp(-(((x - 6 * (day % 70 - 10)) / 120) ** 2))
    common = 1.5 * np.interp(day, np.arange(len(weather)), weather)
    return 12 - 0.02 * y + season + town + spell + common * (0.7 + 0.6 * y / 200)


stations = rng.uniform([0, 0], [300, 200], (60, 2))
everything = np.array([(x, y, day) for x, y in stations for day in np.arange(200.0)])
reported = everything[rng.uniform(size=len(everything)) < 1 / 5]
values = temperature(*reported.T) + 0.5 * rng.standard_normal(len(reported))

options = {"rank": 5, "early_stopping": False, "tol": 2e-3}
model = FunctionalCP(**options).fit(reported, values)
print(f"{len(values)} rows, {model.n_iter_} sweeps from start {model.start_!r}, converged: {model.converged_}")
print(f"standard deviation of the noise {model.noise_variance_**0.5:.2f} degrees (truth 0.5)")
units = ("km", "km", "days")
print("lengthscales:", ", ".join(f"{l[0]:.0f} {unit}" for l, unit in zip(model.lengthscale_, units, strict=True)))

fig, axes = plt.subplots(2, 2, figsize=(8, 4.6), layout="constrained", width_ratios=(1, 1.5))
days = np.arange(0, 200, 0.25)
for (left, right), number in zip(axes, (3, 5), strict=True):
    here = (reported[:, :2] == stations[number]).all(axis=1)
    left.plot(*stations.T, ".", color="0.7")
    left.plot(*stations[number], "C3o")
    left.set(xlabel="km east", ylabel="km north", aspect="equal", xlim=(0, 300), ylim=(0, 200))
    X = np.column_stack([np.tile(stations[number], (len(days), 1)), days])
    mean, std = model.predict(X, return_std=True, latent=True)
    right.fill_between(days, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.3, linewidth=0)
    right.plot(days, mean, linewidth=1, label="mean, two standard deviations")
    right.plot(days, temperature(*X.T), "k--", linewidth=0.7, label="truth")
    right.plot(reported[here, 2], values[here], "C3.", markersize=5, label="reports")
    right.set(ylabel="degrees", xlim=(0, 200))
axes[0, 0].set_title("Two of sixty stations")
axes[1, 1].set_xlabel("day")
axes[0, 1].legend(frameon=False, ncols=3, loc="lower right", fontsize="small", bbox_to_anchor=(1, 1))

# %%
# Maps
# ----
# :meth:`~stochproc.tensor.FunctionalCP.to_dense` predicts a whole grid without listing its rows: here a map for one
# day. The standard deviation is that of the field, without the noise of a reading; it grows towards the corners.
#
# The town is missed, and the standard deviation does not know. No station lies in it, and a sum of products is
# stiff: what the functions of east and of north are, all stations along a line say together, so the model is as sure in
# the middle of four stations as beside one. It takes for granted that few products are enough, and that the functions
# of one coordinate are independent of those of the others. Where such things matter, a Gaussian process of place
# (:class:`~stochproc.gp.ScaleMixtureGPRegressor`) on the residuals will show them.
nearest = np.hypot(*(stations - [90, 120]).T).min()
print(f"the station nearest to the town lies {nearest:.0f} km away")
east, north = np.linspace(0, 300, 61), np.linspace(0, 200, 41)
day = np.array([78.0])
mean, std = (table[:, :, 0].T for table in model.to_dense([east, north, day], return_std=True, latent=True))
truth = temperature(east, north[:, None], day)

fig, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained", sharey=True)
coldest, warmest = min(mean.min(), truth.min()), max(mean.max(), truth.max())
for ax, table, title in zip(axes, (truth, mean, std), ("truth", "mean", "standard deviation"), strict=True):
    kw = {"cmap": "viridis", "vmin": 0} if ax is axes[2] else {"cmap": "RdYlBu_r", "vmin": coldest, "vmax": warmest}
    image = ax.pcolormesh(east, north, table, shading="nearest", rasterized=True, **kw)
    fig.colorbar(image, ax=ax, label="degrees", orientation="horizontal", shrink=0.75)
    ax.plot(*stations.T, "k.", markersize=2)
    ax.set(title=title, xlabel="km east", aspect="equal")
axes[0].set_ylabel("km north")

# %%
# Which rows to hold out
# ----------------------
# How good is it? That depends on the question. If single rows are held out at random, other stations have reported
# on the same day, and the same station on days nearby: nearly all is known. A new station here is as easy, as the
# field is smooth in space. A day on which nobody reported is another matter: of the weather of that day nothing is
# known but that of the days around it. Hold out what you will be asked for, or the numbers flatter.
#
# The second number to look at is coverage: nine in ten of what was held out should lie in intervals of coverage 0.9.
# For days without a report it is less. The components share one lengthscale a coordinate, which is a compromise of the
# slow season and the quick weather here, and the posterior does not know that it may be wrong.
station, date = reported[:, :2], reported[:, 2]
holes = {
    "single rows": rng.uniform(size=len(values)) < 0.1,
    "whole stations": (station[:, None] == stations[rng.permutation(60)[:6]]).all(axis=2).any(axis=1),
    "whole days": np.isin(date, rng.permutation(200)[:20]),
}
errors, shares = {}, {}
for what, hidden in holes.items():
    some = FunctionalCP(**options).fit(reported[~hidden], values[~hidden])
    lower, upper = some.predict_interval(reported[hidden], coverage=0.9).T
    errors[what] = np.sqrt(np.mean((some.predict(reported[hidden]) - values[hidden]) ** 2))
    shares[what] = np.mean((lower <= values[hidden]) & (values[hidden] <= upper))
    print(f"{what}: error {errors[what]:.2f} degrees (root mean square), {shares[what]:.0%} inside")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
left.barh(list(errors), list(errors.values()), color=["C0", "C1", "C2"])
left.axvline(0.5, color="k", linestyle="--", linewidth=1, label="noise alone")
left.set(xlabel="error, degrees", title="Held out")
left.legend(frameon=False)
right.plot(list(shares.values()), list(shares), "o")
right.axvline(0.9, color="0.7", linewidth=1, label="nominal")
right.set(xlabel="share inside intervals of coverage 0.9", xlim=(0.5, 1), ylim=(2.5, -0.5))
right.legend(frameon=False, loc="lower left")

# %%
# Far from the data
# -----------------
# Beyond the last day the functions of time return to zero and their variances to those of the prior, within
# a lengthscale or two: the forecast is the mean of all data, and the interval what a field may be that nobody has
# measured. Nothing makes a season come back that was seen once; if you know the period, say so, with a mode of its
# own, as in the next tutorial. The same happens in space, beyond the edge.
ahead = np.linspace(150, 500, 401)
outside = np.linspace(0, 900, 301)
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
for ax, X, at, last in [
    (axes[0], np.column_stack([np.full(401, 150), np.full(401, 100), ahead]), ahead, 199),
    (axes[1], np.column_stack([outside, np.full(301, 100), np.full(301, 190)]), outside, 300),
]:
    lower, upper = model.predict_interval(X, coverage=0.9).T
    ax.fill_between(at, lower, upper, color="C0", alpha=0.3, linewidth=0, label="90 % interval")
    ax.plot(at, model.predict(X), label="mean")
    ax.axvline(last, color="0.6", linewidth=1)
    ax.axhline(values.mean(), color="k", linestyle="--", linewidth=0.8, label="mean of the data")
axes[0].set(xlabel="day", ylabel="degrees", title="After the last day")
axes[1].set(xlabel="km east, on day 190", title="East of the region")
axes[0].legend(frameon=False, loc="upper right", fontsize="small")

# %%
# Joint draws
# -----------
# Questions about several entries at once need draws: on how many days does it freeze at a place where there
# is no station? :meth:`~stochproc.tensor.FunctionalCP.sample_y` draws whole courses, each one possible.
days = np.arange(200.0)
X = np.column_stack([np.full(200, 250), np.full(200, 180), days])
draws = model.sample_y(X, n_samples=500, random_state=0, latent=True)
frost, true_frost = (draws < 0).sum(axis=0), (temperature(*X.T) < 0).sum()
low, high = np.quantile(frost, [0.05, 0.95])
print(f"days of frost: {low:.0f} to {high:.0f} with probability 0.9, truth {true_frost}")
print(f"of the mean alone: {(model.predict(X) < 0).sum()}")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained", width_ratios=(2, 1))
left.plot(days, draws[:, :5], linewidth=0.6, color="C0", alpha=0.6)
left.plot(days, temperature(*X.T), "k--", linewidth=0.8)
left.axhline(0, color="C3", linewidth=0.8)
left.set(xlabel="day", ylabel="degrees", title="Five draws, and the truth (dashed)", xlim=(0, 80), ylim=(-10, 8))
right.hist(frost, bins=np.arange(frost.min(), frost.max() + 2) - 0.5, color="C0")
right.axvline(true_frost, color="k", linestyle="--")
right.xaxis.get_major_locator().set_params(integer=True)
right.set(xlabel="days of frost", yticks=[], title="500 draws")

# %%
# What to read next
# -----------------
# :doc:`/auto_tutorials/tensor/plot_03_mixed_modes` has modes that are periodic or categories, and how many components
# to take. :doc:`/auto_tutorials/tensor/plot_04_streaming` goes on learning as rows come in. The model, its cost and its
# limits are in :doc:`/guide/functional_tensors`.
