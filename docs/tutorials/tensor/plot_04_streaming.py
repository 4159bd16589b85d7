r"""
Rows that keep coming
=====================

Measurements of a running plant, readings of a network, ratings of a shop: the tensor is never complete.
:meth:`~stochproc.tensor.FunctionalCP.partial_fit` learns from each batch of rows and lets them go. What it keeps is one
small message a distinct coordinate, so that memory grows with the axes, not with the rows. This tutorial shows what one
pass costs, how to forget, and how sensors and times that were not there before come in by themselves.
"""

# %%
# One pass
# --------
# Eight sensors in a tank report at odd times; the true signal is a sum of two products of a function of depth, one of
# time, and one of the sensor. The first batch is an ordinary ``fit``, which chooses the start and the hyperparameters,
# and finds the components or misses one; so let it be a good one, and allow a component more than you need. Later
# batches compute their messages twice on top of the old ones, which stay as they are.
#
# Below are 4,000 rows in one to twenty random batches, judged by 1,000 others. Ten batches do as well as one. Of
# twenty the first has 200 rows, and at that a whole component was missed: later rows only ever refine what there is.
# The noise is then overestimated, so that intervals still hold their share. They are honest, and wide.
import matplotlib.pyplot as plt
import numpy as np

from stochproc.tensor import FunctionalCP

rng = np.random.default_rng(0)
gain = np.column_stack([rng.uniform(0.5, 1.5, 10), rng.uniform(-1, 1, 10)])


def signal(depth, hours, sensor):
    """True signal; depth in metres from 0 to 10, sensors count from 0."""
    slow = np.exp(-depth / 4) * (1.5 + np.sin(hours / 20))
    quick = np.sin(depth / 2) * np.sin(hours / 8)
    return gain[sensor, 0] * slow + gain[sensor, 1] * quick


def measure(n, hours, sensors):
    """Rows at random depths, at times between the two given, by the given sensors."""
    depth, at, sensor = (
        rng.uniform(0, 10, n).round(1),
        rng.integers(hours[0] * 4, hours[1] * 4, n) / 4,
        rng.choice(sensors, n),
    )
    return np.column_stack([depth, at, sensor]), signal(depth, at, sensor) + 0.2 * rng.standard_normal(n)


options = {
    "rank": 3,
    "modes": ["continuous", "continuous", "discrete"],
    "kernel": "matern32",
    "center": False,
    "early_stopping": False,
    "tol": 2e-3,
}
X, y = measure(4_000, (0, 60), range(8))
X_test, y_test = measure(1_000, (0, 60), range(8))


def judge(model):
    """Error of the mean, and share of the test rows inside intervals of coverage 0.9."""
    lower, upper = model.predict_interval(X_test, coverage=0.9).T
    inside = np.mean((lower <= y_test) & (y_test <= upper))
    return np.sqrt(np.mean((model.predict(X_test) - signal(*X_test[:, :2].T, X_test[:, 2].astype(int))) ** 2)), inside


counts, errors, shares = [1, 3, 10, 20], [], []
for count in counts:
    model = FunctionalCP(**options)
    for rows in np.array_split(np.arange(len(y)), count):
        model.partial_fit(X[rows], y[rows])
    error, share = judge(model)
    errors.append(error)
    shares.append(share)
    print(f"{count} batches: error {error:.3f}, {share:.0%} inside, noise {model.noise_variance_**0.5:.2f} (truth 0.2)")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.semilogx(counts, errors, "o-")
left.set(xlabel="batches", ylabel="error of the mean", ylim=(0, None), title="Error")
right.semilogx(counts, shares, "o-")
right.axhline(0.9, color="0.7", linewidth=1, label="nominal")
right.set(xlabel="batches", ylabel="share inside", ylim=(0.8, 1), title="Intervals of coverage 0.9")
right.legend(frameon=False)
for ax in (left, right):
    ax.set_xticks(counts, counts)
    ax.minorticks_off()

# %%
# Going over it again
# -------------------
# If the rows are still there, sweeps over all of them put right what one pass left: with ``warm_start=True`` ``fit``
# goes on from where the model is. It needs few sweeps, but stays in the optimum that the stream led to, so that a
# component which was missed stays missed. What helps is a larger first batch: wait for some hundred rows a component
# before the first call, or fit anew once they are there.
found = {"20 equal batches": judge(model)}
found["and a warm fit"] = judge(model.set_params(warm_start=True).fit(X, y))
patient = FunctionalCP(**options)
for rows in np.split(np.arange(len(y)), range(800, 4_000, 200)):
    patient.partial_fit(X[rows], y[rows])
found["first 800, then 200"] = judge(patient)
found["one fit"] = errors[0], shares[0]
for what, (error, share) in found.items():
    print(f"{what}: error {error:.3f}, {share:.0%} inside")

fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
ax.barh(list(found), [error for error, _ in found.values()], color=["C0", "C1", "C2", "C3"])
ax.invert_yaxis()
ax.set(xlabel="error of the mean")

# %%
# New times, a new sensor
# -----------------------
# In a stream each batch has times that were not there before. They are merged into the axis by themselves, and so are
# names of sensors. Here the hours come in order, five at a time, and sensor 8 is put in after 40 hours. Before, its
# prediction is the prior: zero, with a wide interval. Time beyond the last batch is a forecast, which returns to
# zero too: that is no failure, but what a function says that has not been measured.
stream = FunctionalCP(**options)
probe = np.arange(0, 75, 0.25)
new_sensor = np.column_stack([np.full(len(probe), 3.0), probe, np.full(len(probe), 8)])
pictures = {}
for start in range(0, 60, 5):
    batch = measure(400, (start, start + 5), range(8) if start < 40 else range(9))
    stream.partial_fit(*batch)
    if start + 5 in (40, 45, 60):
        pictures[start + 5] = stream.predict(new_sensor, return_std=True, latent=True)
print(f"{len(stream.index_[1])} distinct times, sensors {stream.index_[2].astype(int)}")

fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained", sharey=True)
for ax, (hours, (mean, std)) in zip(axes, pictures.items(), strict=True):
    ax.fill_between(probe, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.3, linewidth=0)
    ax.plot(probe, mean, label="mean")
    ax.plot(probe, signal(3.0, probe, 8), "k--", linewidth=0.8, label="truth")
    ax.axvline(hours, color="C3", linewidth=0.8, label="now")
    ax.set(xlabel="hours", title=f"Sensor 8, after {hours} hours")
axes[0].set_ylabel("signal at 3 m")
axes[0].legend(frameon=False, fontsize="small", loc="lower left")

# %%
# Forgetting
# ----------
# All rows count for ever, unless told otherwise. When the world changes, the old ones mislead: here a tank is topped up
# and all signals drop to 60 %. ``forget=0.5`` halves the weight of all that was said before with each batch, so that
# the last two or so count. The price is paid while nothing changes: there are fewer rows to average over. A change
# of sign is harder than one of size, since functions would have to pass through zero; then a new fit is better.
paths = {}
for forget in (1.0, 0.8, 0.5):
    model, path = FunctionalCP(**options), []
    rng = np.random.default_rng(1)
    for step in range(12):
        rows, values = measure(400 if step else 1_000, (0, 60), range(8))
        size = 1.0 if step < 5 else 0.6
        if step == 0:
            model.fit(rows, values)
        else:
            model.partial_fit(rows, size * values, forget=forget)
        truth = size * signal(*X_test[:, :2].T, X_test[:, 2].astype(int))
        path.append(np.sqrt(np.mean((model.predict(X_test) - truth) ** 2)))
    paths[forget] = path

fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for forget, path in paths.items():
    ax.semilogy(range(1, 13), path, "o-", markersize=4, label=f"forget={forget:g}")
ax.axvline(5.5, color="0.6", linewidth=0.8)
ax.set(xlabel="batch", ylabel="error of the mean", title="All signals drop after batch 5")
ax.legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`/guide/functional_tensors` has what is kept of a row, and what a stream cannot do: hyperparameters, centre and
# scale are those of the first batch, so let it be a good one. A model is saved with
# :meth:`~stochproc.tensor.FunctionalCP.save` and goes on learning after ``load``. A single series needs no
# decomposition: :doc:`/auto_tutorials/tensor/plot_01_long_series`.
