r"""
Classification when the data change
===================================

A classifier is trained on clean images and meets damaged ones. Its accuracy has to fall; what matters is whether its
probabilities say so. We classify handwritten digits with latent processes that share a random scale, damage the test
images step by step, and compare with a known scale and with logistic regression.
"""

# %%
# Train on clean digits
# ---------------------
# :class:`~stochproc.gp.ScaleMixtureGPClassifier` has one latent function for each class. Their posterior is found by
# stochastic variational inference: eighty inducing points stand for the data, and a lower bound of the
# likelihood rises epoch by epoch. ``normalize_X="global"`` keeps the pixels in one unit.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.datasets import load_digits
from stochproc.gp import ScaleMixtureGPClassifier

X, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(y))
train, test = order[:500], order[500:1100]
options = {"normalize_X": "global", "n_inducing": 80, "batch_size": 250, "tol": 0.02, "random_state": 0}
models = {
    "random scale": ScaleMixtureGPClassifier("mlp-relu-2", **options),
    "known scale": ScaleMixtureGPClassifier("mlp-relu-2", scale_prior="delta", **options),
    "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
}
for name, model in models.items():
    model.fit(X[train], y[train])
    print(f"{name:20s} accuracy on clean digits {model.score(X[test], y[test]):.3f}")

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for name in ("random scale", "known scale"):
    ax.plot(1 + np.arange(models[name].n_iter_), models[name].elbo_history_, label=name)
ax.set(xlabel="epoch", ylabel="lower bound, nats a digit", title="Training", ylim=(-1.3, 0))
ax.legend(frameon=False)

# %%
# Damage the test images
# ----------------------
# Noise of growing strength is added to the pixels, the same for all models.
levels = np.arange(6)


def damaged(level):
    """Add noise to the test images, the same for all models."""
    noise = np.random.default_rng(level).normal(size=X[test].shape)
    return np.clip(X[test] + 2.0 * level * noise, 0, 16)


fig, axes = plt.subplots(1, len(levels), figsize=(9, 1.8), layout="constrained")
for ax, level in zip(axes, levels, strict=True):
    ax.imshow(damaged(level)[1].reshape(8, 8), cmap="Greys", vmin=0, vmax=16)
    ax.set(title=f"level {level}", xticks=[], yticks=[])


# %%
# Accuracy, and honesty about it
# ------------------------------
# A calibrated classifier that is sure of nine in ten is right nine times in ten; the calibration error is the mean
# distance from that, over ten bins of confidence. The log loss scores accuracy and honesty together; guessing costs 2.3
# nats. Both processes stay honest as logistic regression does not. Whether their scale is random makes no difference
# here: hundreds of labels have told it.
def scores(probabilities):
    """Accuracy, log loss in nats, and calibration error."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y[test]
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    log_loss = -np.log(np.maximum(probabilities[np.arange(len(test)), y[test]], 1e-12)).mean()
    return right.mean(), log_loss, sum(gaps)


probabilities = {name: [model.predict_proba(damaged(level)) for level in levels] for name, model in models.items()}
fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for name, marker in zip(models, "osD", strict=True):
    found = np.array([scores(p) for p in probabilities[name]])
    for ax, values, label in zip(axes, found.T, ("accuracy", "log loss, nats", "calibration error"), strict=True):
        ax.plot(levels, values, marker=marker, label=name)
        ax.set(xlabel="level of noise", ylabel=label)
axes[0].legend(frameon=False)

# %%
# How sure it is
# --------------
# The entropy of the probabilities tells whether the model notices: it should grow with the damage. Images that are no
# digits at all, here with their pixels shuffled, should be the least certain. What they get depends on the kernel: far
# from the data a process returns to its prior, whose scale the data have set.
shuffled = np.random.default_rng(1).permuted(X[test], axis=1)
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for i, name in enumerate(models):
    sets = [
        probabilities[name][0],
        probabilities[name][2],
        probabilities[name][4],
        models[name].predict_proba(shuffled),
    ]
    entropy = [-(p * np.log(np.maximum(p, 1e-12))).sum(1) for p in sets]
    boxes = ax.boxplot(entropy, positions=np.arange(4) + 0.25 * (i - 1), widths=0.2, sym="", patch_artist=True)
    for box in boxes["boxes"]:
        box.set(facecolor=f"C{i}", alpha=0.6)
    ax.plot([], [], color=f"C{i}", linewidth=8, alpha=0.6, label=name)
ax.axhline(np.log(10), color="0.7", linewidth=1)
ax.set(xticks=range(4), xticklabels=["clean", "level 2", "level 4", "shuffled pixels"], ylabel="entropy, nats")
ax.set_title("Uncertainty of the predicted class; the line is that of guessing")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# What to read next
# -----------------
# :class:`~stochproc.gp.ScaleMixtureSVGP` is the same model as a torch module, for other likelihoods and training
# loops. :doc:`plot_03_heavy_tails` says what one scale for everything can and cannot do.
