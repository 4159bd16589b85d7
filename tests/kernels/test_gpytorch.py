"""Kernels of this library inside GPyTorch, and GPyTorch's inside this library."""

import gpytorch
import pytest
import torch

from stochproc.kernels import RBF, KernelOperator, Linear, Matern, Scale, as_gpytorch, as_kernel, matvec


def test_the_kernel_in_gpytorch_equals_gpytorchs_own(gen):
    x, y = torch.randn(7, 3, generator=gen), torch.randn(5, 3, generator=gen)
    theirs = gpytorch.kernels.MaternKernel(nu=1.5).double()
    theirs.lengthscale = 0.8
    ours = as_gpytorch(Matern(0.8, nu=1.5))
    torch.testing.assert_close(ours(x, y).to_dense(), theirs(x, y).to_dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(x, diag=True), theirs(x, diag=True))
    torch.testing.assert_close((ours + theirs)(x).to_dense(), 2 * theirs(x).to_dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((ours * theirs)(x).to_dense(), theirs(x).to_dense() ** 2, rtol=1e-10, atol=1e-10)
    scaled = gpytorch.kernels.ScaleKernel(as_gpytorch(Matern(0.8, nu=1.5))).double()
    scaled.outputscale = 2.0
    torch.testing.assert_close(scaled(x).to_dense(), 2 * theirs(x).to_dense(), rtol=1e-10, atol=1e-10)


def test_one_column_a_batch_gives_one_matrix_a_column(gen):
    x = torch.randn(6, 3, generator=gen)
    with pytest.warns(DeprecationWarning, match="last_dim_is_batch"):
        got = as_gpytorch(RBF(0.8))(x, last_dim_is_batch=True).to_dense()
    want = torch.stack([RBF(0.8)(x[:, [c]]) for c in range(3)])
    torch.testing.assert_close(got, want)


def test_active_dims_and_batches_are_gpytorchs(gen):
    x = torch.randn(2, 6, 3, generator=gen)
    kernel = RBF(torch.tensor([[0.5], [2.0]]), batch_shape=(2,))
    got = as_gpytorch(kernel)(x).to_dense()
    torch.testing.assert_close(got, kernel(x))


class Exact(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("n", [40, 1100])
def test_an_exact_gp_has_the_same_likelihood_gradient_and_prediction(n, gen):
    # 1100 points are past the dense limit, so the matrix stays an operator.
    x = torch.rand(n, 2, generator=gen)
    y = torch.sin(5 * x[:, 0]) + 0.1 * torch.randn(n, generator=gen)
    found = []
    for make in (lambda: as_gpytorch(Scale(RBF(0.4), 1.5)), lambda: theirs(0.4, 1.5)):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = 0.05
        model = Exact(x, y, likelihood, make()).double()
        model.train()
        likelihood.train()
        with (
            gpytorch.settings.fast_computations(False, False, False),
            gpytorch.settings.max_cholesky_size(10_000),
        ):
            loss = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y)
            loss.backward()
            model.eval()
            likelihood.eval()
            with torch.no_grad():
                out = likelihood(model(x[:7] + 0.01))
        found.append((loss.item(), out.mean, out.variance, likelihood.raw_noise.grad))
        if n > 1000 and make is not theirs:
            assert n * n > 1_000_000
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-8)


def theirs(lengthscale, outputscale):
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, outputscale
    return kernel


def test_large_matrices_stay_operators(gen):
    x = torch.rand(1100, 2, generator=gen)
    assert isinstance(as_gpytorch(RBF()).forward(x, x), KernelOperator)


class Sparse(gpytorch.models.ApproximateGP):
    def __init__(self, z, kernel):
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(z), mean_init_std=0.0)
        super().__init__(gpytorch.variational.VariationalStrategy(self, z, distribution))
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.slow
def test_a_sparse_variational_gp_trains_as_with_gpytorchs_own_kernel(gen):
    x = torch.rand(100, 1, generator=gen)
    y = torch.sin(6 * x[:, 0])
    losses = []
    for kernel in (as_gpytorch(Scale(RBF(0.3), 1.5)), theirs(0.3, 1.5)):
        model, likelihood = Sparse(x[::20].clone(), kernel).double(), gpytorch.likelihoods.GaussianLikelihood()
        likelihood.double()
        kernel.requires_grad_(False)
        bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=100)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        path = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = -bound(model(x), y)
            loss.backward()
            optimizer.step()
            path.append(loss.item())
        losses.append(path)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-8, atol=1e-8)


def test_a_gpytorch_kernel_gives_the_same_products_and_gradients_here(gen):
    base = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RQKernel()).double()
    kernel = as_kernel(base)
    assert as_gpytorch(kernel) is base
    x, v = torch.randn(20, 2, generator=gen), torch.randn(20, 1, generator=gen)
    dense = base(x).to_dense()
    torch.testing.assert_close(matvec(kernel, x, None, v, backend="chunked", block_bytes=500), dense @ v)
    torch.testing.assert_close(kernel.diag(x), dense.diagonal())
    torch.testing.assert_close(kernel.operator(x)[2:5, [0, 1]].to_dense(), dense[2:5, [0, 1]])
    (kernel.operator(x, backend="chunked") @ v).sum().backward()
    got = [p.grad.clone() for p in base.parameters()]
    base.zero_grad()
    (base(x).to_dense() @ v).sum().backward()
    for a, b in zip(got, base.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    mixed = kernel + Linear()
    torch.testing.assert_close(mixed(x), dense + Linear()(x))
