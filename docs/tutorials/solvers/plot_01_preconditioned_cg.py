r"""
Large systems without a factor
==============================

Four thousand sensors measure a field. A Gaussian process needs a linear system and a log-determinant of that
size, and we get both from products with a matrix that is never formed: by conjugate gradients, a preconditioner,
and random vectors. Each answer says how good it is.
"""

# %%
# One system of 4,000 equations
# -----------------------------
# The sensors lie at random in a square of 1 km, and read the field with errors of standard deviation 0.1. The
# covariance of the readings is a kernel matrix plus that variance on the diagonal. The operator holds the points
# and the kernel, 16 million entries it does not hold; :class:`~stochproc.solvers.CG` only multiplies with it. What
# it returns, a :class:`~stochproc.solvers.Result`, is the solution and an account of how it was found.
# sphinx_gallery_thumbnail_number = 2
import math

import matplotlib.pyplot as plt
import torch

from stochproc.kernels import RBF
from stochproc.solvers import CG

generator = torch.Generator().manual_seed(0)
n, noise = 4_000, 0.01
frequencies = torch.randn(2, 1_000, generator=generator, dtype=torch.float64) / 0.15
phases = 2 * math.pi * torch.rand(1_000, generator=generator, dtype=torch.float64)


def field(points):
    """A random function: a thousand waves whose covariance is that of an RBF of lengthscale 0.15."""
    return math.sqrt(2 / 1_000) * (points @ frequencies + phases).cos().sum(dim=1)


x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
y = field(x) + math.sqrt(noise) * torch.randn(n, generator=generator, dtype=torch.float64)

kernel = RBF(lengthscale=0.15)
K = kernel.operator(x)
A = K.add_jitter(noise)
with torch.no_grad():
    result = CG(rtol=1e-6)(A, y)
print(f"ok: {result.ok}, status: {result.status.value}")
print(f"{result.convergence.iterations} iterations, {result.stats['products']} products")
print(f"residual {result.convergence.residual:.1e}, asked for {result.convergence.tolerance:.1e}")
print(f"preconditioner {result.stats['preconditioner']} of rank {result.stats['preconditioner_rank']}")

ticks = torch.linspace(0, 1, 60, dtype=torch.float64)
grid = torch.cartesian_prod(ticks, ticks)


def predict(weights):
    """Posterior mean on the grid, from one solution or several as columns."""
    with torch.no_grad():
        return kernel.operator(grid, x) @ weights


def draw(ax, values, title):
    """Draw a function of the square."""
    image = values.reshape(60, 60).mT.numpy()
    shown = ax.imshow(image, origin="lower", extent=(0, 1, 0, 1), vmin=-3, vmax=3, cmap="RdBu_r")
    ax.set(xlabel="km", title=title)
    return shown


fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.3), layout="constrained", sharey=True)
left.scatter(*x.mT, c=y, s=2, vmin=-3, vmax=3, cmap="RdBu_r")
left.set(xlabel="km", ylabel="km", title="Readings of 4,000 sensors", aspect="equal", xlim=(0, 1), ylim=(0, 1))
fig.colorbar(draw(right, predict(result.unwrap()), "Posterior mean"), ax=[left, right], label="field")

# %%
# What a preconditioner buys
# --------------------------
# The number of iterations depends on the spread of the eigenvalues of A, here from the noise to some hundreds. A
# preconditioner is an approximation whose inverse is cheap; what is left to do is what it misses. ``"auto"``, the
# default, took :class:`~stochproc.solvers.PivotedCholesky`: columns of the matrix, greedily chosen.
# :class:`~stochproc.solvers.Nystrom` spends one product with random vectors instead, and needs no entry of the
# matrix. :class:`~stochproc.solvers.Jacobi`, the diagonal, is for rows of different size; the diagonal of a
# stationary kernel with one noise is constant, and its curve hides that of no preconditioner.
#
# Once the rank reaches down to the noise, a few iterations do. Without a preconditioner the residual does not
# even fall steadily: conjugate gradients promise that for the error in the norm of A alone. So ``value`` is the
# iterate of smallest residual. ``keep_history=True`` keeps the curve, and a callback sees each iterate. An option
# such as ``PivotedCholesky(100)`` would be built by the solve; we build by hand, to use them again below.
import time

from stochproc.solvers import Jacobi, Nystrom, PivotedCholesky

options = {
    "none": None,
    "Jacobi": Jacobi(),
    "pivoted Cholesky, 50": PivotedCholesky(50),
    "Nystrom, 100": Nystrom(100),
    "pivoted Cholesky, 100": PivotedCholesky(100),
    "pivoted Cholesky, 200": PivotedCholesky(200),
}
built, iterates = {}, {label: [] for label in options}

fig, ax = plt.subplots(figsize=(7.5, 3.3), layout="constrained")
for label, option in options.items():
    start = time.perf_counter()
    built[label] = option and option.build(K, noise)
    ready = time.perf_counter()
    solver = CG(rtol=1e-6, precond=built[label], max_iter=12, keep_history=True)
    with torch.no_grad():
        found = solver(A, y, callback=lambda state, kept=iterates[label]: kept.append(state.value.clone()))
    took = f"{ready - start:.1f} s to build, {time.perf_counter() - ready:.1f} s to solve"
    reached = f"{found.convergence.residual / y.norm():.0e} after {found.convergence.iterations:2} iterations"
    print(f"{label:22} {found.status.value:9} {reached}; {took}")
    style = {"none": "k-", "Jacobi": "C1--"}.get(label, "o-")
    ax.semilogy(found.convergence.history / y.norm(), style, markersize=3, label=label)
ax.axhline(1e-6, color="0.8", zorder=0, label="tolerance")
ax.set(xlabel="iteration", ylabel="residual, relative to y", title="Conjugate gradients on 4,000 equations")
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# What the tolerance means
# ------------------------
# The tolerance is one for the residual :math:`b - A x`, which can be measured. The relative error of x can be larger
# by the condition number of A, at most its trace over the noise, here 404,000. We compare the iterates of rank 100
# with a solution to twelve digits. The error of x runs a few times above the residual, far below that bound; the
# error of the field, which is what we are after, follows the residual.
precond = built["pivoted Cholesky, 200"]
solutions = torch.stack(iterates["pivoted Cholesky, 100"], dim=-1)
with torch.no_grad():
    exact = CG(rtol=1e-12, precond=precond)(A, y).unwrap()[:, None]
    residuals = (y[:, None] - A @ solutions).norm(dim=0) / y.norm()
errors = (solutions - exact).norm(dim=0) / exact.norm()
misses = (predict(solutions) - predict(exact)).norm(dim=0) / predict(exact).norm()

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
steps = range(1, len(errors) + 1)
ax.semilogy(steps, errors, "o-", markersize=3, label="error of the solution")
ax.semilogy(steps, misses, "o-", markersize=3, label="error of the field")
ax.semilogy(steps, residuals, "ko-", markersize=3, label="residual")
ax.set(xlabel="iteration", ylabel="relative size", title="Residual and error, rank 100")
ax.legend(frameon=False)

# %%
# The log-determinant, with its error
# -----------------------------------
# The likelihood of the readings also takes :math:`\log\det A`. :class:`~stochproc.solvers.LanczosLogdet` estimates it
# by random probes, each followed for a few Lanczos steps, and reports the standard error. With a preconditioner P
# the probes need to find :math:`\log\det P^{-1} A` only, a smaller number with a smaller error. Without one, eight
# steps do not suffice: the standard error knows nothing of that, but the status does. At 4,000 points the exact
# value is still within reach, by a Cholesky factor of 128 MB whose time grows with the cube of n.
from stochproc.solvers import LanczosLogdet

with torch.no_grad():
    factor = torch.linalg.cholesky(A.to_dense())
    whitened = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
exact_logdet = 2 * factor.diagonal().log().sum()
del factor

print(f"exact           {exact_logdet:.3f}")
ranks, distances, deviations = [0, 100, 200], [], []
for rank in ranks:
    with torch.no_grad():
        found = LanczosLogdet(steps=8)(A, built[f"pivoted Cholesky, {rank}" if rank else "none"])
    print(f"rank {rank:3} {found.value.value:13.3f} +- {found.value.stderr:.3f}, {found.status.value}")
    distances.append((found.value.value - exact_logdet).abs())
    deviations.append(found.value.stderr)

fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
ax.semilogy(ranks, deviations, "o-", label="standard error, as reported")
ax.semilogy(ranks, distances, "kx", label="distance from the exact value")
ax.set(xlabel="rank of the preconditioner", ylabel="nats", title="The log-determinant from 16 probes")
ax.legend(frameon=False)

# %%
# A likelihood and its gradient
# -----------------------------
# The two together are the log marginal likelihood. Autograd goes through both: the gradient of the solution is that
# of the exact one, by the implicit function theorem, for one more solve and without keeping an iteration; that of
# the log-determinant is estimated with the same probes. It has an error of its own, which the standard error of the
# value does not tell: over seeds, the slopes in the picture vary by some 20 nats. More probes narrow that down. A
# noise that is learned goes in by ``add_diagonal``; ``add_jitter`` would pass no gradient on.
log_noise = torch.tensor(math.log(noise), dtype=torch.float64, requires_grad=True)


def together(quadratic, logdet):
    """Log marginal likelihood of the readings."""
    return -0.5 * (quadratic + logdet + n * math.log(2 * math.pi))


def likelihood():
    """Log marginal likelihood, and the standard error of the estimate."""
    K = kernel.operator(x)
    A = K.add_diagonal(log_noise.exp())
    precond = PivotedCholesky(200).build(K, log_noise.exp().detach())
    solution = CG(rtol=1e-6, precond=precond)(A, y).unwrap()
    logdet = LanczosLogdet(probes=8, steps=5)(A, precond).unwrap()
    return together(y @ solution, logdet.value), 0.5 * logdet.stderr


print(f"lengthscale 0.15: {together(y @ exact[:, 0], found.value.value):.2f}, put together from what we have")
print(f"exact by the factor: {together(whitened.square().sum(), exact_logdet):.2f}")
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for lengthscale in [0.12, 0.18]:
    kernel.lengthscale = lengthscale
    value, stderr = likelihood()
    slope, slope_noise = torch.autograd.grad(value, [kernel.log_lengthscale, log_noise])
    print(f"lengthscale {lengthscale}: {value:.2f} +- {stderr:.2f}, slopes {slope.item():.0f} and {slope_noise:.0f}")
    ends = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    labels = ("estimate", "its slope") if lengthscale == 0.12 else (None, None)
    ax.plot(lengthscale, value.item(), "C0o", label=labels[0])
    ax.plot(lengthscale * ends.exp(), value.item() + slope.item() * ends, color="C1", label=labels[1])
ax.plot(0.15, together(y @ exact[:, 0], found.value.value), "C0o")
ax.plot(0.15, together(whitened.square().sum(), exact_logdet), "kx", label="exact")
ax.set(xlabel="lengthscale, km", ylabel="log marginal likelihood, nats", title="Likelihood without a factor")
ax.legend(frameon=False)

# %%
# When it goes wrong
# ------------------
# A solver that runs out of iterations does not raise and does not warn; it says ``max_iter`` and gives the best it
# has. Five iterations without a preconditioner leave a residual of a third of y. The field is recognisable, and wrong;
# ``unwrap``, which insists on the tolerance, refuses it.
from stochproc.exceptions import SolverError

kernel.lengthscale = 0.15
with torch.no_grad():
    early = CG(precond=None, max_iter=5)(A, y)
print(f"status {early.status.value}: {early.convergence.message}")
try:
    early.unwrap()
except SolverError as error:
    print(f"SolverError: {error}")

fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.3), layout="constrained", sharey=True)
draw(left, predict(early.value), "After 5 iterations")
left.set_ylabel("km")
fig.colorbar(draw(right, predict(exact[:, 0]), "Converged"), ax=[left, right], label="field")

# %%
# A noise with the wrong sign makes the matrix indefinite, and that is no matter of patience: the status is
# ``breakdown``, and the message says what is wrong with the input.
with torch.no_grad():
    broken = CG(precond=None)(K.add_jitter(-1.0), y)
print(f"status {broken.status.value}: {broken.convergence.message}")

# %%
# What to read next
# -----------------
# :doc:`/guide/solvers` lists the statuses with what to do about each, and the other solvers.
# :doc:`/guide/kernel_layer` says how the products are made. For points on a line, in time, none of this is needed:
# :doc:`/auto_tutorials/tensor/plot_01_long_series`. The signatures are in :doc:`/api/solvers`.
