import numpy as np
import pytest
from sklearn.base import clone

from stochproc.gp import ScaleMixtureGPRegressor, arch
from stochproc.gp._regressor_parameters import make_kernel
from stochproc.kernels import RBF, Scale


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 3))
    y = np.abs(X[:, 0]) + np.maximum(X[:, 1], 0) + 0.1 * rng.standard_normal(60)
    return X, y


@pytest.fixture(scope="module")
def fitted(data):
    return ScaleMixtureGPRegressor("mlp-relu-3", n_restarts=1).fit(*data)


def test_a_fit_learns_weights_biases_and_the_scale_of_each_column(data, fitted):
    smooth = ScaleMixtureGPRegressor("rbf", n_restarts=1).fit(*data)
    # The function has kinks, which the network has too.
    assert fitted.log_marginal_likelihood_ > smooth.log_marginal_likelihood_ + 5
    lengthscale = fitted.kernel_.lengthscale
    # The third column means nothing.
    assert lengthscale[2] > 10 * lengthscale[:2].max()
    hidden, last = fitted.kernel_.net.parts[0], fitted.kernel_.net.parts[-1]
    assert hidden.w_std.item() != pytest.approx(2**0.5)
    assert hidden.b_std.item() != pytest.approx(0.2)
    assert last.w_std.item() == 1.0


def test_a_saved_estimator_predicts_the_same_bits(data, fitted, tmp_path):
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    again = ScaleMixtureGPRegressor.load(path)
    for a, b in zip(again.predict(data[0], return_std=True), fitted.predict(data[0], return_std=True), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.kernel == "mlp-relu-3"
    frozen = [n for n, p in again.kernel_.named_parameters() if p.requires_grad]
    assert frozen == [n for n, p in fitted.kernel_.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "kernel",
    [arch.resmlp(1, "erf"), arch.NetworkKernel(arch.mlp(2), "ntk"), 0.5 * arch.NetworkKernel(arch.mlp(1)) + RBF(1.0)],
    ids=["network", "tangent", "sum"],
)
def test_networks_are_parameters_that_can_be_cloned_and_saved(data, kernel, tmp_path):
    X, y = data
    model = clone(ScaleMixtureGPRegressor(kernel, optimizer=None)).fit(X, y)
    model.save(tmp_path / "model")
    again = ScaleMixtureGPRegressor.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    np.testing.assert_allclose(again.fit(X, y).predict(X), model.predict(X), rtol=1e-10)


def test_the_covariance_at_given_parameters_is_that_of_the_network(data):
    X, y = data
    net = arch.mlp(2, "gelu")
    by_object = ScaleMixtureGPRegressor(net, optimizer=None).fit(X, y)
    by_name = ScaleMixtureGPRegressor("mlp-gelu-2", optimizer=None).fit(X, y)
    np.testing.assert_allclose(by_object.predict(X), by_name.predict(X), rtol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_last_weights_stay_as_given_beside_a_free_scale(scaled):
    kernel = arch.NetworkKernel(arch.mlp(2, w_last=3.0))
    made = make_kernel(Scale(kernel) if scaled else kernel, 2, True)
    named = {n.rsplit(".", 1)[0]: p for n, p in made.named_parameters() if n.endswith("log_w_std")}
    first, last = named.values()
    assert first.requires_grad
    assert not last.requires_grad
    assert last.exp().item() == pytest.approx(3.0)
    # The object itself is left alone.
    assert kernel.net.parts[-1].log_w_std.requires_grad


def test_weights_that_are_used_elsewhere_too_are_learned():
    dense = arch.Dense(1.2)
    made = make_kernel(arch.serial(dense, arch.Relu(), dense), 2, True)
    assert all(p.requires_grad for p in made.parameters())


def test_two_kernels_that_share_a_network_cannot_be_saved(data, tmp_path):
    net = arch.mlp(1)
    kernel = arch.NetworkKernel(net) + arch.NetworkKernel(net, "ntk")
    model = ScaleMixtureGPRegressor(kernel, optimizer=None).fit(*data)
    with pytest.raises(TypeError, match="are one parameter"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp-tanh-2", "unknown activation 'tanh'"),
        ("mlp-relu-0", "depth must be at least 1"),
        ("mlp", "unknown kernel"),
    ],
)
def test_wrong_names_say_what_is_valid(data, name, message):
    with pytest.raises(ValueError, match=message):
        ScaleMixtureGPRegressor(name).fit(*data)


@pytest.mark.parametrize(
    "options", [{}, {"solver": "cg"}, {"noise_model": "independent"}], ids=["exact", "cg", "apart"]
)
def test_the_prediction_of_a_row_does_not_depend_on_the_rows_asked_for_with_it(options):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 2))
    # Its matrix of one set of points has a larger diagonal than its values at equal points.
    net = arch.serial(arch.Dense(1.4, 0.2), arch.Relu(), arch.Dropout(0.8), arch.Dense())
    model = ScaleMixtureGPRegressor(net, optimizer=None, **options).fit(X, np.sin(X[:, 0]))
    for all_rows, some in zip(model.predict(X, return_std=True), model.predict(X[:5], return_std=True), strict=True):
        np.testing.assert_allclose(all_rows[:5], some, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X)[:5], model.predict(X[:5]), rtol=1e-9)
    _, cov = model.predict(X, return_cov=True)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), model.predict(X, return_std=True)[1], rtol=1e-5)
