r"""
First regression
================

A hundred yearly values, a curve through them, and how far to trust it. We fit a Gaussian process whose
overall scale is itself unknown, look at what it predicts, check it on data kept back, and see when the
unknown scale matters.
"""

# %%
# Fit and look
# ------------
# The flow of the Nile at Aswan was measured each year from 1871 to 1970. We keep every fourth year
# back and fit the rest. ``kernel="matern32"`` asks for a curve that is once differentiable; its
# lengthscale, the noise and the scale of the prior are learned by maximising the likelihood. The
# display draws mean and intervals.
import matplotlib.pyplot as plt
import numpy as np

from stochproc.datasets import load_nile
from stochproc.gp import GPDisplay, ScaleMixtureGPRegressor

X, y = load_nile(return_X_y=True)
held_out = np.arange(len(y)) % 4 == 3
X_train, X_test, y_train, y_test = X[~held_out], X[held_out], y[~held_out], y[held_out]

model = ScaleMixtureGPRegressor(kernel="matern32", random_state=0).fit(X_train, y_train)
print(f"log marginal likelihood {model.log_marginal_likelihood_:.2f} nats")
print(f"standard deviation of the noise {model.noise_variance_**0.5:.0f}, in the unit of y")

fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
GPDisplay.from_estimator(model, X_train, y_train, ax=ax)
ax.plot(X_test, y_test, "C3x", label="kept back")
ax.set(xlabel="year", ylabel="flow, 10^8 cubic metres", title="The Nile at Aswan")
ax.legend(frameon=False)

# %%
# Intervals, checked on what was kept back
# ----------------------------------------
# An interval of coverage 0.8 should hold four values in five. The log predictive density scores
# position and width at once: higher is better, in nats, per unit of y. It is the number to compare
# models by.
coverages = np.linspace(0.1, 0.95, 18)
hit = []
for coverage in coverages:
    lower, upper = model.predict_interval(X_test, coverage=coverage).T
    hit.append(np.mean((lower <= y_test) & (y_test <= upper)))
density = model.log_predictive_density(X_test, y_test)
error = density.std(ddof=1) / np.sqrt(len(y_test))
print(f"held-out log density {density.mean():.3f} +- {error:.3f} nats a year")
print(f"R^2 {model.score(X_test, y_test):.2f}")

fig, ax = plt.subplots(figsize=(4.2, 3.5), layout="constrained")
ax.plot([0, 1], [0, 1], color="0.7", label="ideal")
ax.plot(coverages, hit, "o-", markersize=4, label="25 years kept back")
ax.set(xlabel="coverage asked for", ylabel="share of values inside", aspect="equal")
ax.set(title="Calibration")
ax.legend(frameon=False)

# %%
# When the scale matters
# ----------------------
# The prior ``"delta"`` takes the likeliest scale for the true one: the plain Gaussian process. An
# inverse gamma prior makes a Student-t process, a half-Cauchy something heavier still. The fewer
# the data, the less is known of the scale. We learn the progression of diabetes from ten
# measurements on 10 to 80 patients, ask for the density of 200 others, and do so twelve times. The
# lines show what a prior gains over the Gaussian process, with standard errors: most with ten
# patients, nothing with eighty, when the data have told the scale. It does not hurt either.
from stochproc.datasets import load_diabetes
from stochproc.kernels import RBF

X, y = load_diabetes(return_X_y=True)
sizes = [10, 20, 40, 80]
priors = {"inverse_gamma": "Student-t", "half_cauchy": "half-Cauchy"}
gains = {prior: np.zeros((len(sizes), 12)) for prior in priors}


def held_out_density(prior, train, test):
    """Mean log density of the test rows under a model with one lengthscale for all columns."""
    model = ScaleMixtureGPRegressor(kernel=RBF(lengthscale=3.0), scale_prior=prior, random_state=0)
    return model.fit(X[train], y[train]).log_predictive_density(X[test], y[test]).mean()


for split in range(12):
    order = np.random.default_rng(split).permutation(len(y))
    for i, size in enumerate(sizes):
        plain = held_out_density("delta", order[:size], order[-200:])
        for prior in priors:
            gains[prior][i, split] = held_out_density(prior, order[:size], order[-200:]) - plain

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.axhline(0, color="0.7", label="Gaussian")
for prior, label in priors.items():
    mean, error = gains[prior].mean(1), gains[prior].std(1, ddof=1) / np.sqrt(12)
    ax.errorbar(sizes, mean, error, marker="o", capsize=3, label=label)
ax.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="patients to learn from")
ax.set(ylabel="gain, nats a patient", title="What an unknown scale is worth")
ax.minorticks_off()
ax.legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`/guide/estimator_contract` lists what every estimator of the library does, saving included.
# :doc:`/guide/what_for` says what a scale mixture does and what it does not.
# :doc:`/guide/troubleshooting` is the page for the day a fit warns.
# :doc:`/auto_tutorials/kernels/plot_01_kernels_and_products` opens the layer below.
