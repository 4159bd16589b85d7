r"""
Colour transfer
===============

A photograph, taken apart, is a cloud of colours. We fit a transport between the colours of two photographs on some
hundred pixels, apply it to all of them, and see what the parameters of the estimator do to a picture.
"""

# %%
# Two clouds of colours
# ---------------------
# Every pixel is a point in a cube: red, green and blue from 0 to 1. A thousand pixels of either photograph are
# enough to know the clouds. :class:`~stochproc.ot.SinkhornTransport` is a scikit-learn transformer with POT's
# arguments: ``Xs`` are the sources, ``Xt`` the targets, ``reg_e`` the regularisation in squared distances of colours.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

from stochproc.ot import SinkhornTransport, TransportDisplay

china, flower = (image / 255.0 for image in load_sample_images().images)
rng = np.random.default_rng(0)
Xs, Xt = (rng.choice(image.reshape(-1, 3), 1_000, replace=False) for image in (china, flower))

model = SinkhornTransport(reg_e=5e-3).fit(Xs, Xt=Xt)
print(f"{model.n_iter_} passes, converged: {model.converged_}")

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
for ax, colours, title in zip(axes, (Xs, Xt, model.transform(Xs)), ("China", "Flower", "China, moved"), strict=True):
    ax.scatter(colours[:, 0], colours[:, 2], c=np.clip(colours, 0, 1), s=14, edgecolors="0.6", linewidths=0.3)
    ax.set(xlabel="red", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", title=title)
axes[0].set_ylabel("blue")

# %%
# The plan, drawn
# ---------------
# :class:`~stochproc.ot.TransportDisplay` draws points and the links between them that carry at least a share of
# their mass, here a fifth. A thousand points would be a tangle, so here are eighty.
few = SinkhornTransport(reg_e=5e-3).fit(Xs[:80], Xt=Xt[:80])
fig, ax = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
TransportDisplay.from_estimator(few, features=(0, 2), threshold=0.2, ax=ax)
ax.set(xlabel="red", ylabel="blue", title="Eighty pixels of either photograph")
ax.legend(["links", "China", "flower"], frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# Whole photographs, both ways
# ----------------------------
# ``transform`` moves any points, also those that ``fit`` has not seen, and ``inverse_transform`` moves targets to the
# side of the sources, with the same plan. Many pixels share a colour: each colour has to be moved once.
import time


def recolour(move, image):
    """Move every colour of an image once."""
    colours, places = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    return np.clip(move(colours), 0, 1)[places].reshape(image.shape)


start = time.perf_counter()
moved = recolour(model.transform, china), recolour(model.inverse_transform, flower)
print(f"{china[..., 0].size + flower[..., 0].size:,} pixels in {time.perf_counter() - start:.1f} s")

fig, axes = plt.subplots(2, 2, figsize=(8, 5.9), layout="constrained")
titles = ("China", "Flower", "China in the colours of the flower", "Flower in the colours of China")
for ax, image, title in zip(axes.flat, (china, flower, *moved), titles, strict=True):
    ax.imshow(image)
    ax.set_title(title)
    ax.set_axis_off()

# %%
# What reg does to a picture
# --------------------------
# The image of a colour is a mean over targets within a distance of about the root of ``reg_e``. Strong regularisation
# averages over much of the flower, and colours fade to brown. Weak regularisation tells neighbouring shades apart that
# the camera hardly did: compression and noise show in the sky.
small = china[::2, ::2]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), layout="constrained")
for ax, reg_e in zip(axes, (3e-1, 3e-2, 3e-4), strict=True):
    softer = SinkhornTransport(reg_e=reg_e).fit(Xs, Xt=Xt)
    ax.imshow(recolour(softer.transform, small))
    ax.set_title(f"reg_e = {reg_e:g}, {softer.n_iter_} passes")
    ax.set_axis_off()

# %%
# Not every colour has to be used
# -------------------------------
# A balanced plan uses all of the flower: so much of the picture must be dark green, for so much of the flower is. With
# ``reg_m`` marginals are met at a price instead, in the unit of ``reg_e``: a colour that is too far off may be used
# less. As the price falls, the picture keeps more of its own light.
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), layout="constrained")
for ax, reg_m in zip(axes, (10.0, 0.3, 0.03), strict=True):
    partial = SinkhornTransport(reg_e=5e-3, reg_m=reg_m).fit(Xs, Xt=Xt)
    ax.imshow(recolour(partial.transform, small))
    ax.set_title(f"reg_m = {reg_m:g}, mass {partial.coupling_.sum():.2f}")
    ax.set_axis_off()

# %%
# What to read next
# -----------------
# :class:`~stochproc.ot.SinkhornTransport` also takes labels and weights, and stands in pipelines: that is domain
# adaptation. :doc:`/guide/estimator_contract` lists what every estimator does, saving included.
# :doc:`plot_03_loss_in_a_training_loop` trains with transport as the loss, and :doc:`plot_04_100000_points` goes to
# clouds whose plan does not fit into memory.
