r"""
A loss in a training loop
=========================

How far is one cloud of points from another? As a loss, transport answers with a gradient that says where each point
should go. We let points flow, train a small generator, and compute the loss of many pairs in one call. Gradients are
those of the solution itself: no solver iterations are kept in memory.
"""

# %%
# Points that flow
# ----------------
# :func:`~stochproc.ot.sinkhorn_divergence` is entropic transport less what either cloud costs against itself. It is 0
# only between equal clouds, which the regularised cost is not: that would draw the points together. Its gradient in
# the points, times their number and a half, is the way to their partners, so plain gradient descent is enough.
import matplotlib.pyplot as plt
import torch

from stochproc import ot

generator = torch.Generator().manual_seed(0)


def moons(n):
    """Draw points from two half circles."""
    angle = torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    x, y = angle.cos(), angle.sin()
    lower = torch.arange(n) % 2 == 1
    points = torch.stack([torch.where(lower, 1 - x, x), torch.where(lower, 0.5 - y, y)], dim=1)
    return points + 0.06 * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def flow(loss, steps=15):
    """Move points down the gradient of a loss; return where they were at each step."""
    x = 0.15 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    x = (x + torch.tensor([0.5, 0.25], dtype=torch.float64)).requires_grad_()
    frames = [x.detach().clone()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(x), x)
        with torch.no_grad():
            # Half of the way: 200 points of mass 1/200, and the derivative of a square.
            x -= 0.5 * 200 / 2 * gradient
        frames.append(x.detach().clone())
    return frames


target, reg = moons(300), 0.1
debiased = flow(lambda x: ot.sinkhorn_divergence(x, target, reg))
biased = flow(lambda x: ot.solve_sample(x, target, reg=reg).value)

fig, axes = plt.subplots(1, 4, figsize=(10, 2), layout="constrained", sharex=True, sharey=True)
panels = [
    (debiased[0], "Start"),
    (debiased[2], "2 steps"),
    (debiased[-1], "15 steps"),
    (biased[-1], "15, not debiased"),
]
for ax, (points, title) in zip(axes, panels, strict=True):
    ax.plot(*target.T, ".", color="0.8", markersize=4)
    ax.plot(*points.T, "C0.", markersize=4)
    ax.set(title=title, aspect="equal", xlabel="x")
axes[0].set_ylabel("y")

# %%
# A generator
# -----------
# A network moves noise to points, a shift for each; nothing says which noise belongs to which point of the data, and
# the loss does not ask. Each step draws new noise and new data, and anything in ``torch.optim`` takes the gradient. Two
# samples of the data are some way apart too: the loss comes down to that level. Two hundred steps give the shape; the
# strays above it need more.
network = torch.nn.Sequential(
    torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
).double()
with torch.no_grad():
    for parameter in network.parameters():
        spread = parameter.shape[-1] ** -0.5
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
optimiser = torch.optim.Adam(network.parameters())


def noise(n):
    """Draw what the generator starts from."""
    return 2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1


def generate(n):
    """Move noise by what the network says."""
    z = noise(n)
    return z + 0.3 * network(z)


def banana(n):
    """Draw the data, which scatter most in the middle."""
    x = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    scatter = 0.05 + 0.2 * (1 - x.abs())
    y = 2 * x.square() - 1 + scatter * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.stack([x, y], dim=1)


losses = []
for step in range(200):
    optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
    loss = ot.sinkhorn_divergence(generate(100), banana(100), reg=0.02)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())

floor = torch.stack([ot.sinkhorn_divergence(banana(100), banana(100), reg=0.02) for _ in range(10)]).mean()
print(f"loss at the end {sum(losses[-20:]) / 20:.4f}; between two samples of the data {floor:.4f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained", width_ratios=(1.2, 1))
left.semilogy(losses, linewidth=1, label="training")
left.axhline(floor, color="k", linestyle="--", linewidth=1, label="two samples of the data")
left.set(xlabel="step", ylabel="Sinkhorn divergence")
left.legend(frameon=False)
with torch.no_grad():
    made = generate(1_000)
right.plot(*banana(1_000).T, ".", color="0.8", markersize=4, label="data")
right.plot(*made.T, "C0.", markersize=3, label="generated")
right.set(xlabel="x", ylabel="y")
right.legend(frameon=False, markerscale=2, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# Many pairs in one call
# ----------------------
# :func:`~stochproc.ot.solve_batch` takes a stack of problems. Here forty handwritten threes share one matrix of costs,
# and we look for the histogram that is nearest to all of them on average: its logits are learned, the loss is the
# mean of forty values. A mean of pixels blurs the threes where their strokes differ; a mean by transport moves
# strokes. ``grad="envelope"`` promises to differentiate ``value`` alone, which is all that is needed, and
# ``potentials_init`` starts each step from the last solution.
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
threes = torch.from_numpy(images[labels == 3][:40])
threes = threes / threes.sum(dim=1, keepdim=True)
pixels = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
M = ot.dist(pixels)

logits = (threes.mean(dim=0) + 1e-4).log().requires_grad_()
optimiser = torch.optim.Adam([logits], lr=0.1)
start, curve = None, []
for _ in range(60):
    histogram = logits.softmax(dim=0)
    result = ot.solve_batch(
        M, histogram.expand(40, 64), threes, reg=0.3, tol=1e-6, grad="envelope", potentials_init=start
    )
    loss = result.value.mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    start = tuple(potential.detach() for potential in result.potentials)
    curve.append(loss.item())
print(f"mean cost {curve[0]:.3f} -> {curve[-1]:.3f} squared pixels, worst err {result.err.max():.0e}")

fig, axes = plt.subplots(1, 6, figsize=(10, 2), layout="constrained")
shown = [*threes[:4], threes.mean(dim=0), logits.detach().softmax(dim=0)]
for ax, image, title in zip(axes, shown, ["A three"] * 4 + ["Mean of pixels", "By transport"], strict=True):
    ax.imshow(image.reshape(8, 8).numpy(), cmap="Greys")
    ax.set(title=title, xticks=[], yticks=[])

# %%
# What to read next
# -----------------
# :func:`~stochproc.ot.solve` says which outputs have gradients, and to what order; :func:`~stochproc.ot.barycenter`
# computes means of histograms directly. :doc:`plot_04_100000_points` is about clouds too large for a matrix, which
# these losses take too.
