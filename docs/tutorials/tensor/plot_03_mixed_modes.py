r"""
Modes of different kinds
========================

A coordinate may be a number on a line, a number that comes round again, or a name. Functional decompositions take all
three at once: one :class:`~stochproc.tensor.Mode` a column says which. This tutorial mixes them, reads the functions
that were found, meets a category that nobody has seen, and asks how many components there are.
"""

# %%
# Bicycles
# --------
# Twelve places hire out bicycles. The number taken an hour depends on the hour of the day, on the temperature and on
# the place, in a made-up town where we know how: people go to work whatever the weather, and for pleasure in the
# afternoon when it is warm; each place has its share of both. So the truth is a sum of two products.
#
# The hour has a period of 24, so its functions join up at midnight. Places share nothing but the components: their
# order means nothing. Integers are taken for numbers unless ``modes`` says "discrete"; nothing is guessed. And
# ``center=False``, since a rank-2 function less a constant has rank 3.
import matplotlib.pyplot as plt
import numpy as np

from stochproc.tensor import FunctionalCP, FunctionalTucker, Mode

rng = np.random.default_rng(0)
names = np.array(
    ["station", "market", "park", "lake", "school", "zoo", "port", "mall", "mill", "museum", "pool", "hill"]
)
to_work, for_pleasure = rng.gamma(3, 1, 12), rng.gamma(2, 1.5, 12)


def peak(hour, centre, width):
    """A bump on the clock, highest at its centre."""
    return np.exp((np.cos(2 * np.pi * (hour - centre) / 24) - 1) / (2 * np.pi * width / 24) ** 2)


def hours_to_work(hour):
    """Bicycles taken to work and back, relative to the rush hour."""
    return peak(hour, 8, 1.5) + 0.8 * peak(hour, 17.5, 2) + 0.1 * peak(hour, 0, 2)


def hours_of_pleasure(hour):
    """Bicycles taken for pleasure, relative to the afternoon."""
    return peak(hour, 15, 4) + 0.2 * peak(hour, 22, 2)


def warmth(degrees):
    """How many of those who would like to go do."""
    return 1 / (1 + np.exp((18 - degrees) / 3))


def bicycles(hour, degrees, place):
    """True number an hour; ``place`` counts from 0."""
    return 10 * (to_work[place] * hours_to_work(hour) + for_pleasure[place] * hours_of_pleasure(hour) * warmth(degrees))


n = 1_500
hour, degrees, place = rng.integers(0, 96, n) / 4, rng.uniform(-5, 35, n).round(1), rng.integers(0, 12, n)
taken = bicycles(hour, degrees, place) + 3 * rng.standard_normal(n)
X = np.empty((n, 3), dtype=object)
X[:, 0], X[:, 1], X[:, 2] = hour, degrees, names[place]

modes = [Mode("periodic", period=24), Mode("continuous", kernel="matern52"), "discrete"]
options = {"modes": modes, "center": False, "early_stopping": False, "tol": 2e-3}
model = FunctionalCP(rank=2, **options).fit(X, taken)
error = model.predict(X) - bicycles(hour, degrees, place)
print(f"{model.n_iter_} sweeps, spread of the data {taken.std():.0f} bicycles an hour, noise 3", end=", ")
print(f"error of the mean {np.sqrt(np.mean(error**2)):.2f}")

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
for k, ax in enumerate(axes):
    model.plot_latent(k, ax=ax)
    ax.get_legend().remove()
axes[0].legend(loc="upper right", fontsize="x-small")
axes[0].set(ylim=(None, 2.2), xlabel="hour", title="Time of day (periodic)", xticks=range(0, 25, 6))
axes[1].set(xlabel="degrees", title="Temperature (continuous)", ylabel="")
axes[2].set(xlabel="", title="Place (discrete)", ylabel="")
axes[2].tick_params(axis="x", rotation=90)

# %%
# Reading them
# ------------
# A product does not change when one factor is doubled and another halved, or when two change sign. So a function has
# no height of its own, and may stand on its head. What can be read are shapes, zeros, ratios of one function at two
# points, and products over all modes. To compare with a truth, let one number a component do its best.
#
# Two products are told apart by how differently they vary in every mode; here hours, temperatures and places all do.
at = np.linspace(0, 24, 200), np.linspace(-5, 35, 200), names
truths = (
    np.column_stack([hours_to_work(at[0]), hours_of_pleasure(at[0])]),
    np.column_stack([np.ones(200), warmth(at[1])]),
    np.column_stack([to_work, for_pleasure]),
)
# The component that depends less on temperature comes first.
cold, warm = model.latent(1, [-5.0, 35.0])
order = np.argsort(-np.abs(cold / warm))

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained", width_ratios=(1, 1, 0.8))
for k, (ax, x) in enumerate(zip(axes, at, strict=True)):
    mean, std = (table[:, order] for table in model.latent(k, x, return_std=True))
    for r, name in enumerate(["to work", "for pleasure"]):
        scale = (mean[:, r] @ truths[k][:, r]) / (mean[:, r] @ mean[:, r])
        middle, spread = scale * mean[:, r], 2 * abs(scale) * std[:, r]
        if k == 2:
            ax.errorbar(truths[k][:, r], middle, spread, fmt="o", markersize=3, label=name)
            continue
        ax.fill_between(x, middle - spread, middle + spread, color=f"C{r}", alpha=0.3, linewidth=0)
        ax.plot(x, middle, color=f"C{r}")
        ax.plot(x, truths[k][:, r], "k--", linewidth=0.8, label="truth" if r == 0 else None)
axes[0].set(xlabel="hour", title="Time of day, scaled", xticks=range(0, 25, 6))
axes[1].set(xlabel="degrees", title="Temperature, scaled")
axes[2].axline((0, 0), slope=1, color="k", linestyle="--", linewidth=0.8)
axes[2].set(xlabel="truth", ylabel="found", title="Places, scaled")
axes[1].legend(frameon=False, loc="center right")
axes[2].legend(frameon=False)

# %%
# What a period is good for
# -------------------------
# Suppose that nobody counts between nine in the evening and three in the morning. A periodic function knows that what
# is before three goes on from what is after nine; a function on a line sees two ends, and goes back to its prior at
# either. The model is told of the period, not of the shape.
day = (hour >= 3) & (hour <= 21)
on_a_line = dict(options, modes=["continuous", *modes[1:]])
fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
at = np.linspace(-6, 30, 300)
inside = (at >= 0) & (at <= 24)
for what, some, colour in [("periodic", options, "C0"), ("continuous", on_a_line, "C1")]:
    found = FunctionalCP(rank=2, kernel="matern52", **some).fit(X[day], taken[day])
    rows = np.column_stack([at.astype(object), np.full(300, 25.0, object), np.full(300, "museum", object)])
    mean, std = found.predict(rows, return_std=True, latent=True)
    ax.fill_between(at, mean - 2 * std, mean + 2 * std, color=colour, alpha=0.25, linewidth=0)
    ax.plot(at, mean, color=colour, label=what)
    night = at % 24
    missed = (night > 21) | (night < 3)
    error = mean - bicycles(night, 25.0, 9)
    print(f"{what}: error at night {np.sqrt(np.mean(error[missed] ** 2)):.1f} bicycles an hour")
ax.plot(at, bicycles(at % 24, 25.0, 9), "k--", linewidth=0.8, label="truth")
for start in (-3, 21):
    ax.axvspan(start, start + 6, color="0.93", zorder=-1)
ax.set(
    xlabel="hour", ylabel="bicycles an hour", title="The museum at 25 degrees; no data in the shade", ylim=(-45, 105)
)
ax.legend(frameon=False, loc="upper left")

# %%
# A place that nobody has seen
# ----------------------------
# A category that ``fit`` did not meet has the law of the prior: with ``center=False`` mean zero, and a wide interval.
# (``handle_unknown="error"`` refuses it instead.) A few rows change that: the functions of hour and temperature are
# known, so there are only two numbers to be learned of a new place, and
# :meth:`~stochproc.tensor.FunctionalCP.partial_fit` learns them from what comes in. Here is a harbour with much
# pleasure and some work, on a day of 22 degrees, after no row, two and twelve.
new_hour, new_degrees = rng.integers(0, 96, 12) / 4, np.full(12, 22.0)
expected = 10 * (2 * hours_to_work(new_hour) + 5 * hours_of_pleasure(new_hour) * warmth(new_degrees))
counted = expected + 3 * rng.standard_normal(12)
new_rows = np.column_stack([new_hour.astype(object), new_degrees.astype(object), np.full(12, "harbour", object)])
at = np.arange(0, 24, 0.1)
rows = np.column_stack([at.astype(object), np.full(240, 22.0, object), np.full(240, "harbour", object)])
truth = 10 * (2 * hours_to_work(at) + 5 * hours_of_pleasure(at) * warmth(22.0))

learner = FunctionalCP(rank=2, **options).fit(X, taken)
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained", sharey=True)
seen = 0
for ax, count in zip(axes, (0, 2, 12), strict=True):
    if count:
        learner.partial_fit(new_rows[seen:count], counted[seen:count])
        seen = count
    mean, std = learner.predict(rows, return_std=True, latent=True)
    ax.fill_between(at, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.3, linewidth=0)
    ax.plot(at, mean)
    ax.plot(at, truth, "k--", linewidth=0.8)
    ax.plot(new_hour[:count], counted[:count], "C3.")
    ax.set(xlabel="hour", title=f"{count} rows")
axes[0].set_ylabel("bicycles an hour at 22 degrees")

# %%
# How many components
# -------------------
# Too few miss something; too many cost time, and with few rows accuracy. Held-out rows tell, or the fit can:
# ``ard=True`` starts with more than enough, learns a variance for each, and drops what explains next to nothing.
# ``rank_`` says what is left, which may be one more than the truth. For a number to be read, use ``center=False``.
test = rng.uniform(size=n) < 0.2
ranks, errors = [1, 2, 3, 4], []
for rank in ranks:
    some = FunctionalCP(rank=rank, **options).fit(X[~test], taken[~test])
    errors.append(np.sqrt(np.mean((some.predict(X[test]) - taken[test]) ** 2)))
pruned = FunctionalCP(rank=4, ard=True, **options).fit(X[~test], taken[~test])
error = np.sqrt(np.mean((pruned.predict(X[test]) - taken[test]) ** 2))
print(f"ard: {pruned.rank_} components left of 4, error {error:.2f}; by rank {np.round(errors, 2)}")

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.plot(ranks, errors, "o-", label="of given rank")
ax.plot(pruned.rank_, error, "C3s", label="4, pruned")
ax.axhline(3, color="k", linestyle="--", linewidth=0.8, label="noise alone")
ax.set(xlabel="rank", ylabel="error of held-out rows", xticks=ranks, ylim=(0, None))
ax.legend(frameon=False)

# %%
# A core
# ------
# CP pairs the first function of each mode with the first of the others, the second with the second.
# :class:`~stochproc.tensor.FunctionalTucker` lets all meet all: a core has one weight for each combination, and each
# mode a rank of its own, which helps where one mode is richer than the others. Its functions are found up to a rotation
# that the core undoes, so those of single components mean little; their span does, and predictions do. The singular
# values of the core, unfolded along a mode, in units in which functions have mean square one, say how many functions
# that mode needs. Here two of each do, though three were allowed.
tucker = FunctionalTucker(rank=(3, 3, 3), **options).fit(X[~test], taken[~test])
error = np.sqrt(np.mean((tucker.predict(X[test]) - taken[test]) ** 2))
print(f"Tucker: error {error:.2f}; core of {tucker.core_.shape}")

core = tucker.core_
for k in range(3):
    values = tucker.latent(k)
    # With u = Q R, Q orthonormal, the core of Q has R in the place of the identity.
    triangle = np.linalg.qr(values / np.sqrt(len(values)))[1]
    core = np.moveaxis(np.tensordot(triangle, core, axes=(1, k)), 0, k)
fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
for k, name in enumerate(["hour", "temperature", "place"]):
    strengths = np.linalg.svd(np.moveaxis(core, k, 0).reshape(3, -1), compute_uv=False)
    ax.semilogy(range(1, 4), strengths / strengths[0], "o-", label=name)
ax.set(xlabel="function", ylabel="strength relative to the first", xticks=[1, 2, 3], title="Of each mode, by the core")
ax.legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`/auto_tutorials/tensor/plot_04_streaming` goes on learning as rows come in.
# :doc:`/guide/functional_tensors` says how starts, stopping and hyperparameters are chosen, what a fit costs and what
# its uncertainty leaves out. :doc:`/auto_tutorials/tensor/plot_02_spatio_temporal` has fields in space and time.
