import math

import gpytorch
import pytest
import torch

from stochproc.gp import arch
from stochproc.kernels import RBF, as_kernel, kernel_from_config, matvec, register_kernel


def kernels():
    return {
        "nngp": arch.NetworkKernel(arch.mlp(2), lengthscale=[1.5, 0.7, 2.0]),
        "ntk": arch.NetworkKernel(arch.resmlp(1, "erf"), "ntk"),
        "dropout": arch.NetworkKernel(arch.serial(arch.Dense(), arch.Relu(), arch.Dropout(0.7), arch.Dense())),
    }


every = pytest.mark.parametrize("name", kernels())


@pytest.mark.parametrize("backend", ["dense", "chunked", "auto"])
@every
def test_an_operator_is_the_matrix(gen, name, backend):
    kernel, X, v = kernels()[name], torch.randn(9, 3, generator=gen), torch.randn(9, 2, generator=gen)
    op = kernel.operator(X, backend=backend)
    torch.testing.assert_close(op @ v, kernel(X) @ v)
    torch.testing.assert_close(op.to_dense(), kernel(X))
    torch.testing.assert_close(op.diagonal(), kernel.diag(X))
    torch.testing.assert_close(op[2:5, 1:7].to_dense(), kernel(X[2:5], X[1:7]))


@every
def test_products_by_blocks_have_the_gradients_of_the_matrix(gen, name):
    kernel, v = kernels()[name], torch.randn(9, 2, generator=gen)
    X = torch.randn(9, 3, generator=gen).requires_grad_()
    inputs = [X, *kernel.parameters()]
    blocks = torch.autograd.grad(matvec(kernel, X, None, v, backend="chunked", block_bytes=1).square().sum(), inputs)
    whole = torch.autograd.grad((kernel(X) @ v).square().sum(), inputs)
    torch.testing.assert_close(blocks, whole, rtol=1e-10, atol=1e-10)


@every
def test_the_diagonal_is_that_of_points_bit_for_bit(gen, name):
    kernel, X = kernels()[name], torch.randn(9, 3, generator=gen)
    assert torch.equal(kernel(X).diagonal(), kernel.diag(X))
    assert torch.equal(kernel.operator(X).to_dense().diagonal(), kernel.diag(X))


def test_lengthscales_divide_the_columns(gen):
    X, scale = torch.randn(5, 3, generator=gen), torch.tensor([1.5, 0.7, 2.0])
    torch.testing.assert_close(kernels()["nngp"](X), arch.mlp(2).nngp(X / scale))


def test_gradients_in_points_and_all_parameters(gen):
    class Forward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = arch.NetworkKernel(arch.mlp(2), lengthscale=[1.5, 0.7])

        def forward(self, x):
            return self.kernel(x, x)

    module = Forward()
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    X = torch.randn(4, 2, generator=gen).requires_grad_()
    call = lambda x, *v: torch.func.functional_call(module, dict(zip(names, v, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, [X, *values])


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_a_network_has_a_lazy_matrix(gen, backend):
    X, Y = torch.randn(5, 3, generator=gen), torch.randn(4, 3, generator=gen)
    net = arch.mlp(2, "erf")
    op = net.lazy(X, Y, kind="ntk", backend=backend)
    torch.testing.assert_close(op @ torch.eye(4), net.ntk(X, Y))
    torch.testing.assert_close(op.T @ torch.eye(5), net.ntk(X, Y).mT)


@every
def test_a_kernel_survives_its_config(gen, name):
    kernel, X = kernels()[name], torch.randn(5, 3, generator=gen)
    mixed = 0.5 * kernel + RBF(0.3)
    again = kernel_from_config(mixed.config())
    # Hyperparameters go through logarithms once more.
    torch.testing.assert_close(again(X), mixed(X), rtol=1e-14, atol=1e-14)
    assert again.config()["class"] == "Sum"


def test_another_kernel_class_of_a_known_name_is_refused():
    class NetworkKernel(RBF):
        pass

    with pytest.raises(ValueError, match="named 'NetworkKernel' is known already"):
        register_kernel(NetworkKernel)


@pytest.mark.bad_input
def test_only_kernel_classes_can_be_registered():
    with pytest.raises(TypeError, match="subclass of Kernel"):
        register_kernel(torch.nn.Linear)


def test_lengthscale_can_be_set_where_there_is_one():
    kernel = kernels()["nngp"]
    kernel.lengthscale = 2.0
    assert kernel.lengthscale.tolist() == pytest.approx([2.0] * 3)
    with pytest.raises(ValueError, match="lengthscale must be positive"):
        kernel.lengthscale = -1.0
    with pytest.raises(ValueError, match="lengthscale must be positive and finite; got inf"):
        kernel.lengthscale = math.inf
    with pytest.raises(ValueError, match=r"lengthscale must be one number or have shape \(3,\); got shape \(2,\)"):
        kernel.lengthscale = [1.0, 2.0]
    with pytest.raises(ValueError, match="None at construction"):
        kernels()["ntk"].lengthscale = 1.0


def test_gpytorch_sees_the_same_matrices(gen):
    X, Y = torch.randn(6, 3, generator=gen), torch.randn(4, 3, generator=gen)
    net = arch.mlp(2, "gelu")
    torch.testing.assert_close(arch.NNGPKernel(net)(X, Y).to_dense(), net.nngp(X, Y))
    torch.testing.assert_close(arch.NTKKernel(net)(X).to_dense(), net.ntk(X))
    assert torch.equal(arch.NTKKernel(net)(X, diag=True), net.ntk_diag(X))
    torch.testing.assert_close(arch.NNGPKernel(net, active_dims=(0, 2))(X).to_dense(), net.nngp(X[:, [0, 2]]))
    torch.testing.assert_close(
        arch.NNGPKernel(net).forward(X, Y, diag=False, last_dim_is_batch=True)[1], net.nngp(X[:, 1:2], Y[:, 1:2])
    )


def test_gpytorch_batches_and_scaled_columns(gen):
    X = torch.randn(2, 5, 3, generator=gen)
    net = arch.mlp(2)
    kernel = arch.NNGPKernel(net, ard_num_dims=3, batch_shape=torch.Size([2]))
    kernel.kernel.lengthscale = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 0.7]])
    K = kernel(X).to_dense()
    assert K.shape == (2, 5, 5)
    for i in range(2):
        torch.testing.assert_close(K[i], net.nngp(X[i] / kernel.input_lengthscale[i]))
    torch.testing.assert_close(kernel(X)[1].to_dense(), K[1])


def test_gpytorch_sums_products_and_scales(gen):
    X = torch.randn(5, 3, generator=gen)
    net = arch.mlp(1)
    scaled = gpytorch.kernels.ScaleKernel(arch.NNGPKernel(net))
    scaled.outputscale = 2.0
    total = scaled + gpytorch.kernels.RBFKernel() * arch.NTKKernel(net)
    rbf = gpytorch.kernels.RBFKernel()(X).to_dense()
    torch.testing.assert_close(total(X).to_dense(), 2 * net.nngp(X) + rbf * net.ntk(X))


class Exact(gpytorch.models.ExactGP):
    def __init__(self, X, y, kernel, likelihood):
        super().__init__(X, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_an_exact_model_of_gpytorch_predicts_and_trains_its_network(gen):
    X, X_test = torch.randn(20, 3, generator=gen), torch.randn(4, 3, generator=gen)
    y = X[:, 0].relu()
    net = arch.mlp(2)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Exact(X, y, arch.NNGPKernel(net, ard_num_dims=3), likelihood).double()
    loss = -gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(X), y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # By hand: log N(y; 0, K + noise) / n.
    cov = net.nngp(X) + likelihood.noise * torch.eye(20)
    exact = torch.distributions.MultivariateNormal(torch.zeros(20), cov).log_prob(y) / 20
    torch.testing.assert_close(-loss, exact)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X_test).mean, net.nngp(X_test, X) @ torch.linalg.solve(cov, y))


def test_a_variational_model_of_gpytorch_runs_on_it(gen):
    class Variational(gpytorch.models.ApproximateGP):
        def __init__(self, Z):
            law = gpytorch.variational.CholeskyVariationalDistribution(len(Z))
            super().__init__(gpytorch.variational.VariationalStrategy(self, Z, law))
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), arch.NNGPKernel(arch.mlp(2))

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    Z = torch.randn(5, 3, generator=gen)
    model = Variational(Z)
    prior = model.covar_module(Z).to_dense().diagonal()
    # Before training the variational law is the prior at the inducing points, up to its first initialisation.
    model.variational_strategy.variational_params_initialized.fill_(1)
    with torch.no_grad():
        torch.testing.assert_close(model(Z).variance, prior, rtol=1e-2, atol=1e-3)


def test_as_kernel_takes_the_gpytorch_form_too(gen):
    X = torch.randn(4, 3, generator=gen)
    net = arch.mlp(1)
    torch.testing.assert_close(as_kernel(arch.NNGPKernel(net))(X), net.nngp(X))
