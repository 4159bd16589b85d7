"""Every kernel, backend and dtype against dense float64 formulas; gradients; algebra; bad input."""

import math

import pytest
import torch

from stochproc.kernels import (
    RBF,
    ActiveDims,
    ArcCosine,
    Kernel,
    Linear,
    Matern,
    Periodic,
    Polynomial,
    Product,
    Radial,
    RationalQuadratic,
    Scale,
    Sum,
    as_kernel,
    kernel_from_config,
    matvec,
)
from tests import reference

KERNELS = {
    "rbf": (lambda: RBF(0.8), lambda x, y: reference.rbf(x, y, 0.8)),
    "matern12": (lambda: Matern(0.8, nu=0.5), lambda x, y: reference.matern(x, y, 0.8, 0.5)),
    "matern32": (lambda: Matern(0.8, nu=1.5), lambda x, y: reference.matern(x, y, 0.8, 1.5)),
    "matern52": (lambda: Matern(0.8, nu=2.5), lambda x, y: reference.matern(x, y, 0.8, 2.5)),
    "rational_quadratic": (
        lambda: RationalQuadratic(0.8, alpha=0.7),
        lambda x, y: reference.rational_quadratic(x, y, 0.8, 0.7),
    ),
    "periodic": (lambda: Periodic(1.3, period=0.9), lambda x, y: reference.periodic(x, y, 1.3, 0.9)),
    "linear": (lambda: Linear(0.3, 0.7), lambda x, y: reference.linear(x, y, 0.3, 0.7)),
    "polynomial": (lambda: Polynomial(3, 0.7), lambda x, y: reference.polynomial(x, y, 3, 0.7)),
    "arc_cosine0": (lambda: ArcCosine(0), lambda x, y: reference.arc_cosine(x, y, 0)),
    "arc_cosine1": (lambda: ArcCosine(1), lambda x, y: reference.arc_cosine(x, y, 1)),
    "scaled_sum": (
        lambda: 2.0 * RBF(0.8) + Linear(0.3, 0.7),
        lambda x, y: 2 * reference.rbf(x, y, 0.8) + reference.linear(x, y, 0.3, 0.7),
    ),
    "product": (
        lambda: Matern(0.8, nu=1.5) * RationalQuadratic(1.1, 2.0),
        lambda x, y: reference.matern(x, y, 0.8, 1.5) * reference.rational_quadratic(x, y, 1.1, 2.0),
    ),
    "active_dims": (lambda: ActiveDims(RBF(0.8), [0]), lambda x, y: reference.rbf(x[..., :1], y[..., :1], 0.8)),
}
TRANSLATION_INVARIANT = ["rbf", "matern12", "matern32", "matern52", "rational_quadratic", "periodic"]
SMOOTH = ["rbf", "matern32", "matern52"]

# float64: 1e-12 of the largest entry; float32: 2e-5 of it (spec/kernel_layer, section 7).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def make(name):
    kernel, formula = KERNELS[name]
    return kernel(), formula


def points(gen, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def assert_close_to(got, want, dtype):
    assert got.dtype == dtype
    scale = want.abs().max().clamp(min=1e-300)
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 13, 3), (17, 23, 3), (11, 5, 50)])
@pytest.mark.parametrize("name", KERNELS)
def test_products_equal_the_dense_float64_matrix(name, shape, dtype, backend, gen):
    n, m, d = shape
    kernel, formula = make(name)
    x, y, v = points(gen, n, d, dtype=dtype), points(gen, m, d, dtype=dtype), points(gen, m, 2, dtype=dtype)
    got = matvec(kernel, x, y, v, backend=backend, block_bytes=200)
    want = formula(x, y)
    assert_close_to(kernel(x, y), want, dtype)
    # A product sums m errors of the size of the largest entry times the vector.
    scale = want.abs().max() * v.double().abs().sum(0).max()
    torch.testing.assert_close(got.double() / scale, want @ v.double() / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
@pytest.mark.parametrize("name", KERNELS)
def test_batches_of_points_equal_a_loop(name, batch, gen):
    kernel, formula = make(name)
    x, y, v = points(gen, *batch, 5, 3), points(gen, *batch, 4, 3), points(gen, *batch, 4, 2)
    assert_close_to(kernel(x, y), formula(x, y), torch.float64)
    got = matvec(kernel, x, y, v, backend="chunked", block_bytes=1)
    torch.testing.assert_close(got, formula(x, y) @ v, rtol=1e-12, atol=1e-12)
    # One shared set of columns for a batch of rows.
    got = matvec(kernel, x, y[(0,) * len(batch)], v[(0,) * len(batch)], backend="chunked")
    want = formula(x, y[(0,) * len(batch)]) @ v[(0,) * len(batch)]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_the_diagonal_equals_that_of_the_matrix(name, gen):
    kernel, formula = make(name)
    x = points(gen, 2, 70, 3)
    torch.testing.assert_close(kernel.diag(x), formula(x, x).diagonal(dim1=-2, dim2=-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(kernel.dense(x).diagonal(dim1=-2, dim2=-1), kernel.diag(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TRANSLATION_INVARIANT)
def test_a_large_offset_and_coincident_points_lose_no_digits(name, dtype, gen):
    kernel, formula = make(name)
    x = points(gen, 9, 3, dtype=dtype)
    # 1e4 rounds the coordinates; the reference sees the rounded ones.
    x, y = x + 1e4, torch.cat([x[:4], x[4:] + 1e-3]) + 1e4
    assert_close_to(kernel(x, y), formula(x, y), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["rbf", "matern12", "matern52", "rational_quadratic"])
def test_points_hundreds_of_lengthscales_out_keep_their_digits(name, dtype, gen):
    kernel, formula = make(name)
    far = 300.0 * points(gen, 20, 3, dtype=dtype)
    x, y = far, far + 0.5 * points(gen, 20, 3, dtype=dtype)
    assert_close_to(kernel(x, y), formula(x, y), dtype)


def test_reduced_matrix_precision_does_not_spoil_distances(gen):
    x = points(gen, 30, 3, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_close_to(RBF(0.5)(x, x), reference.rbf(x, x, 0.5), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def test_non_contiguous_points_give_the_same_numbers(gen):
    x = points(gen, 3, 40).T[::2]
    y, v = points(gen, 8, 6)[:, ::2], points(gen, 2, 8).T
    got = matvec(RBF(), x, y, v, backend="chunked")
    torch.testing.assert_close(got, reference.rbf(x, y) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_in_points_vectors_and_hyperparameters(name, backend, gen):
    kernel, _ = make(name)
    x, y, v = (points(gen, *s).requires_grad_() for s in ((4, 2), (3, 2), (3, 2)))
    names, values = zip(*kernel.named_parameters(), strict=True) if list(kernel.parameters()) else ((), ())

    def product(x, y, v, *values):
        from stochproc.kernels._parameters import call_with_parameters

        return call_with_parameters(kernel, names, values, matvec, x, y, v, backend=backend, block_bytes=48)

    assert torch.autograd.gradcheck(product, (x, y, v, *values))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("name", [*SMOOTH, "rational_quadratic", "scaled_sum", "polynomial"])
def test_second_derivatives(name, backend, gen):
    kernel, _ = make(name)
    x, y, v = (points(gen, *s).requires_grad_() for s in ((3, 2), (3, 2), (3, 1)))
    names, values = zip(*kernel.named_parameters(), strict=True)

    def product(x, y, v, *values):
        from stochproc.kernels._parameters import call_with_parameters

        return call_with_parameters(kernel, names, values, matvec, x, y, v, backend=backend, block_bytes=48)

    assert torch.autograd.gradgradcheck(product, (x, y, v, *values))


@pytest.mark.parametrize("name", TRANSLATION_INVARIANT)
def test_the_input_gradient_at_coincident_points_is_zero(name, gen):
    kernel, _ = make(name)
    x = points(gen, 5, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.diagonal(kernel(a, b)).sum().backward()
    # The cancellation of two O(1) sums of up to three products leaves a few units of 2^-52.
    torch.testing.assert_close(a.grad, torch.zeros_like(a), rtol=0, atol=1e-13)
    torch.testing.assert_close(b.grad, torch.zeros_like(b), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_finite_and_right_at_coincident_points(name):
    # -d^2 k / dx^2 at 0 is 1, 3, 5/3 over lengthscale^2: the spectral second moment.
    kernel, _ = make(name)
    x = torch.tensor([[0.3, -0.2]], requires_grad=True)
    y = torch.tensor([[0.3, -0.2]])
    hessian = torch.autograd.functional.hessian(lambda t: kernel(t, y).sum(), x).reshape(2, 2)
    moment = {"rbf": 1.0, "matern32": 3.0, "matern52": 5 / 3}[name] / 0.8**2
    torch.testing.assert_close(hessian, -moment * torch.eye(2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*TRANSLATION_INVARIANT, "linear", "polynomial"])
def test_the_closed_form_input_gradient_equals_autograd_of_the_formula(name, gen):
    kernel, formula = make(name)
    x, y, g = points(gen, 6, 3), points(gen, 5, 3), points(gen, 6, 5)
    xr, yr = x.clone().requires_grad_(), y.clone().requires_grad_()
    want = torch.autograd.grad((formula(xr, yr) * g).sum(), (xr, yr))
    for got, expected in zip(kernel.block_vjp(x, y, g), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


class OwnGradient(Kernel):
    """exp(-|x - y|_1) with its own gradient, as a user would write it."""

    def __init__(self):
        super().__init__()
        self._add_positive("outputscale", 1.5)
        self.calls = []

    def forward(self, x, y):
        return self._hyper("outputscale", x) * (-(x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)).exp()

    def block_vjp(self, x, y, g):
        self.calls.append(1)
        weight = (-g * self.forward(x, y)).unsqueeze(-1) * (x.unsqueeze(-2) - y.unsqueeze(-3)).sign()
        return weight.sum(-2), -weight.sum(-3)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_users_own_block_gradient_replaces_autograd(backend, gen):
    kernel = OwnGradient()
    x, y, v = (points(gen, *s).requires_grad_() for s in ((4, 2), (3, 2), (3, 1)))
    names, values = zip(*kernel.named_parameters(), strict=True)

    def product(x, y, v, *values):
        from stochproc.kernels._parameters import call_with_parameters

        return call_with_parameters(kernel, names, values, matvec, x, y, v, backend=backend, block_bytes=48)

    assert torch.autograd.gradcheck(product, (x, y, v, *values))
    assert kernel.calls


class Wendland(Radial):
    def profile(self, sq):
        return (1 - sq).clamp(min=0) ** 4


class SlowerRBF(RBF):
    """A subclass with a new profile must not inherit the slope of the old one."""

    def profile(self, sq):
        return torch.exp(-sq / 4)


@pytest.mark.parametrize("kernel", [Wendland(2.0), SlowerRBF(0.9)])
def test_a_new_radial_kernel_needs_its_profile_alone(kernel, gen):
    x, y, v = (points(gen, *s).requires_grad_() for s in ((4, 2), (3, 2), (3, 1)))
    assert torch.autograd.gradcheck(lambda *a: matvec(kernel, *a, backend="chunked", block_bytes=48), (x, y, v))
    torch.testing.assert_close(kernel.diag(x), torch.ones(4))


def test_hyperparameters_in_batches_equal_a_loop(gen):
    lengthscale = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.7, 0.3]])
    kernel = Scale(Matern(lengthscale, nu=1.5, batch_shape=(2,)), torch.tensor([[2.0], [3.0]]), batch_shape=(2,))
    x = points(gen, 6, 3)
    want = torch.stack([s * reference.matern(x, x, l, 1.5) for s, l in zip((2.0, 3.0), lengthscale, strict=True)])
    torch.testing.assert_close(kernel(x), want)
    torch.testing.assert_close(kernel.diag(x), want.diagonal(dim1=-2, dim2=-1))
    v = points(gen, 6, 2)
    torch.testing.assert_close(matvec(kernel, x, None, v, backend="chunked", block_bytes=1), want @ v)


def test_lengthscales_by_column_divide_the_columns(gen):
    x, lengthscale = points(gen, 5, 3), torch.tensor([0.5, 1.0, 4.0])
    torch.testing.assert_close(RBF(lengthscale)(x), reference.rbf(x / lengthscale, x / lengthscale))


def test_hyperparameters_are_stored_as_float64_logarithms_and_keep_their_value(gen):
    kernel = RBF(0.1).to(torch.device("cpu"))
    assert kernel.log_lengthscale.dtype == torch.float64
    kernel.lengthscale = 0.25
    assert kernel.lengthscale.item() == pytest.approx(0.25, rel=1e-15)
    assert kernel(points(gen, 3, 2, dtype=torch.float32)).dtype == torch.float32
    clone = RBF()
    clone.load_state_dict(kernel.state_dict())
    assert torch.equal(clone.lengthscale, kernel.lengthscale)


def test_sums_and_products_are_flat_and_combine_as_written(gen):
    a, b, c = RBF(), Linear(), Matern()
    assert isinstance(a + b + c, Sum)
    assert len((a + b + c).kernels) == 3
    assert isinstance(a * b, Product)
    assert isinstance(a * 2.0, Scale)
    x = points(gen, 4, 2)
    torch.testing.assert_close(((a + b) * c)(x), (a(x) + b(x)) * c(x))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_survives_its_config(name, gen):
    kernel, _ = make(name)
    again = kernel_from_config(kernel.config())
    x = points(gen, 5, 3)
    assert torch.equal(again(x), kernel(x))


@pytest.mark.parametrize(
    "name", ["rbf", "matern12", "matern32", "matern52", "rational_quadratic", "periodic", "linear"]
)
def test_names_give_one_lengthscale_a_column(name):
    kernel = as_kernel(name, n_columns=3)
    if name != "linear":
        assert kernel.lengthscale.shape == (3,)


@pytest.mark.parametrize("name", ["rbf", "matern32", "linear", "polynomial"])
def test_a_gram_matrix_of_features_gives_the_kernel_of_the_features(name, gen):
    from stochproc.kernels._pair import Pair

    kernel, formula = make(name)
    x, y = points(gen, 5, 4), points(gen, 3, 4)
    pair = Pair.from_gram(x @ y.T, (x * x).sum(-1), (y * y).sum(-1))
    torch.testing.assert_close(kernel.gram(pair), formula(x, y), rtol=1e-10, atol=1e-10)


def test_the_matrix_is_positive_semidefinite(gen):
    x = points(gen, 40, 3)
    for name in KERNELS:
        kernel, _ = make(name)
        values = torch.linalg.eigvalsh(kernel.dense(x))
        # An n x n matrix with rounded entries has eigenvalues wrong by about n eps of the largest.
        assert values.min() >= -1e-13 * values.max(), name


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: RBF(0.0), ValueError, "lengthscale must be positive and finite; got 0.0"),
        (lambda: RBF(math.nan), ValueError, "lengthscale must be positive"),
        (lambda: RBF("long"), TypeError, "lengthscale must be a number"),
        (lambda: RBF([1.0, -2.0]), ValueError, "lengthscale must be positive.*-2"),
        (lambda: Matern(nu=2.0), ValueError, "nu must be 0.5, 1.5 or 2.5; got 2.0"),
        (lambda: RationalQuadratic(alpha=[1.0, 2.0]), ValueError, "alpha must be one number"),
        (lambda: RBF([[1.0], [2.0]]), ValueError, "batch shape"),
        (lambda: Polynomial(9), ValueError, "degree must be between 1 and 8; got 9"),
        (lambda: Polynomial(2.0), TypeError, "degree must be an integer"),
        (lambda: ArcCosine(2), ValueError, "order must be one of 0, 1; got 2"),
        (lambda: ActiveDims(RBF(), []), ValueError, "dims must name at least one column"),
        (lambda: Sum(RBF(), "rbf"), TypeError, "as_kernel"),
        (lambda: Sum(), ValueError, "at least one kernel"),
        (lambda: as_kernel("rfb"), ValueError, "unknown kernel 'rfb'; valid: rbf, matern12"),
        (lambda: as_kernel(RBF), TypeError, "make an object of it"),
        (lambda: as_kernel(3), TypeError, "got int"),
        (lambda: kernel_from_config({"class": "os.system"}), ValueError, "unknown kernel class"),
        (lambda: RBF()(torch.zeros(3)), ValueError, r"x must have shape \(\*batch, n, d\)"),
        (
            lambda: RBF()(torch.zeros(3, 2), torch.zeros(3, 1)),
            ValueError,
            "same number of columns; got 2 and 1",
        ),
        (lambda: RBF([1.0, 2.0])(torch.zeros(3, 3)), ValueError, "lengthscale has 2 entries"),
        (lambda: ActiveDims(RBF(), [3])(torch.zeros(3, 2)), ValueError, "column 3, but the points have 2"),
        (lambda: RBF()(torch.zeros(3, 2).half()), TypeError, "float32 or float64; got torch.float16"),
        (lambda: RBF()(torch.zeros(3, 2), torch.zeros(3, 2).float()), TypeError, "mixed dtypes"),
        (lambda: RBF()([[1.0]]), TypeError, "x must be a torch.Tensor"),
        (lambda: RBF()(torch.zeros(2, 3, 1), torch.zeros(3, 3, 1)), ValueError, "batch shapes"),
        (lambda: Kernel()(torch.zeros(2, 1)), NotImplementedError, "must define forward"),
        (lambda: RationalQuadratic().state_space(), NotImplementedError, "no state-space form"),
        (lambda: Periodic().gram(None), NotImplementedError, "needs points"),
    ],
)
def test_bad_input_names_the_argument_and_the_allowed_range(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
