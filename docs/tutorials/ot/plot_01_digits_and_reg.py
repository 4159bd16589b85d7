r"""
Digits, and what reg does
=========================

A transport plan says how much mass goes from where to where so that one histogram becomes another at the least cost.
Entropic transport adds a little regularisation, which makes the plan unique, smooth and differentiable, and biases it.
We move one handwritten digit onto another, look at the bias, and learn how to tell that a result can be trusted.
"""

# %%
# One digit onto another
# ----------------------
# An image of 8 x 8 pixels is a histogram over 64 places once its brightness sums to 1. The cost of moving a unit of
# mass is the squared distance in pixels, here at most 98. ``reg`` is in the unit of the cost: a thousandth of the
# largest is a good first choice. ``a_to_b`` gives each pixel the mean place of its partners: where the arrows end. Blue
# pixels have ink to give, red ones lack some.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from stochproc import ot

images, labels = load_digits(return_X_y=True)
zero, seven = (images[np.flatnonzero(labels == digit)[0]] for digit in (0, 7))
a, b = zero / zero.sum(), seven / seven.sum()
pixels = np.indices((8, 8)).reshape(2, -1).T.astype(float)
M = ot.dist(pixels, pixels)

result = ot.solve(M, a, b, reg=1e-3 * M.max())
print(result)
print(f"cost of the plan {result.value_linear:.4f}, exact {ot.emd2(a, b, M):.4f} squared pixels")

places = result.a_to_b(values=pixels)
fig, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
for ax, weights, title in zip(axes[::2], (a, b), ("From", "To"), strict=True):
    ax.imshow(weights.reshape(8, 8), cmap="Greys")
    ax.set_title(title)
axes[1].imshow((a - b).reshape(8, 8), cmap="RdBu", alpha=0.35, vmin=-0.06, vmax=0.06)
ink = a > 0
(y, x), (dy, dx) = pixels[ink].T, (places - pixels)[ink].T
axes[1].quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, width=0.008, color="0.2")
axes[1].set_title("Where the ink goes, on average")
for ax in axes:
    ax.set(xticks=[], yticks=[], xlim=(-0.5, 7.5), ylim=(7.5, -0.5))

# %%
# Plans
# -----
# The plan has a row for each pixel of the first digit and a column for each of the second. Without regularisation at
# most 127 of its 4096 entries are in use. As ``reg`` grows mass spreads, until every pixel sends the same to each
# target, :math:`a b^\top`, whatever the cost. Pixels without ink have empty rows and columns and are left out here.
strengths = [1.0, 0.1, 0.01, 0.001]
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained", sharey=True)
for ax, strength in zip(axes, strengths, strict=True):
    plan = ot.solve(M, a, b, reg=strength * M.max()).plan[a > 0][:, b > 0]
    drawn = ax.imshow(np.log10(plan + 1e-300), cmap="viridis", vmin=-7, vmax=-1.5)
    ax.set(title=f"reg = {strength:g} max M", xlabel="pixel of the seven", xticks=[], yticks=[])
axes[0].set_ylabel("pixel of the zero")
fig.colorbar(drawn, ax=axes, label="mass (log10)")

# %%
# The bias, bounded
# -----------------
# Two numbers are called cost. ``value`` is what was minimised, regularisation included; ``value_linear`` is the cost
# of the plan alone, an upper bound of the exact cost. The potentials of the same solution give ``lower_bound``. So the
# exact cost is known to lie between the two without ever being computed. The upper bound closes in fast once the plan
# has settled on the right pairs, the lower one in proportion to ``reg``. (:func:`~stochproc.ot.emd2` computes the exact
# cost here, for comparison.)
exact = ot.emd2(a, b, M)
relative = np.logspace(0, -4, 13)
results = [ot.solve(M, a, b, reg=r * M.max()) for r in relative]

fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
for name, style in (("value", "s-"), ("value_linear", "o-"), ("lower_bound", "^-")):
    left.semilogx(relative, [getattr(r, name) for r in results], style, markersize=4, label=name)
left.axhline(exact, color="k", linestyle="--", linewidth=1, label="exact")
left.set(xlabel="reg / max M", ylabel="cost, squared pixels", title="Values")
left.legend(frameon=False)
for name, style, color in (("value_linear", "o-", "C1"), ("lower_bound", "^-", "C2")):
    away = [abs(getattr(r, name) - exact) for r in results]
    right.loglog(relative, np.maximum(away, 1e-12), style, color=color, markersize=4, label=f"{name} - exact")
right.set(xlabel="reg / max M", ylabel="size of the error, squared pixels", title="Errors")
right.legend(frameon=False, loc="lower right")

# %%
# Did it converge?
# ----------------
# ``err`` is how far the marginals of the plan are from a and b, and the only thing that ``tol`` refers to. ``gap`` is
# the regularised cost of a plan with exact marginals minus a lower bound of it: a certificate that needs no trust in
# the solver. A result whose err is above ``tol`` comes with a ``ConvergenceWarning``, never in silence. Sinkhorn's
# iterations need more and more passes as ``reg`` shrinks. Newton steps, the default unless ``reg`` is large, need few;
# their err jumps up each time that the solver lowers the regularisation on its way to the one asked for.
import warnings

fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained", sharey=True)
for ax, strength in zip(axes, (1e-2, 1e-3), strict=True):
    for method, style in (("newton", "C0.-"), ("sinkhorn", "C1-")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = ot.solve(M, a, b, reg=strength * M.max(), method=method, max_iter=1000)
        print(f"reg {strength:g}, {method}: {found.status.value}, err {found.err:.0e}, gap {found.gap:.0e}")
        print("".join(f"    {one.category.__name__}: {one.message}\n" for one in caught), end="")
        ax.loglog(np.arange(len(found.log)) + 1, [err for _, err in found.log], style, label=method)
    ax.axhline(1e-9, color="0.7", linewidth=1, zorder=0)
    ax.set(xlabel="passes", title=f"reg = {strength:g} max M")
axes[0].set_ylabel("err")
axes[0].legend(frameon=False)

# %%
# What to read next
# -----------------
# :doc:`plot_02_colour_transfer` moves the colours of one photograph to another with the estimator
# :class:`~stochproc.ot.SinkhornTransport`; :doc:`plot_03_loss_in_a_training_loop` uses the gradients. All options of
# the solver are in :func:`~stochproc.ot.solve`, all fields of a result in :class:`~stochproc.ot.OTResult`.
