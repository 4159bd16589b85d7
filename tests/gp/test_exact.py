import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.exceptions import DataWarning, NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import Delta, HalfCauchy, InverseGamma, ScaleMixtureGP
from stochproc.kernels import RBF
from tests.gp.scale_reference import PRIORS, LogNormal, UserInverseGamma, log_evidence_mp

EPS = torch.finfo(torch.float64).eps


def data(n=12, d=2, n_outputs=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    X = torch.rand(n, d, generator=gen) * 3
    shape = (n,) if n_outputs is None else (n, n_outputs)
    y = 0.5 + torch.sin(2 * X.sum(1)).reshape(-1, *[1] * (len(shape) - 1)) + 0.3 * torch.randn(shape, generator=gen)
    return X, y


def model(prior="inverse_gamma", *, n_outputs=1, noise=0.2, mean="constant", lengthscale=(0.8, 1.7)):
    gp = ScaleMixtureGP(RBF(list(lengthscale)), prior, noise=noise, mean=mean, n_outputs=n_outputs)
    if mean == "constant":
        with torch.no_grad():
            gp.constant_mean += torch.linspace(0.3, 0.6, n_outputs)
    return gp


def dense(gp, X):
    return (gp.kernel(X, X) + gp.noise * torch.eye(len(X))).detach()


class Loss(torch.nn.Module):
    """log p(y) as a forward pass, so that functional_call can replace the hyperparameters."""

    def __init__(self, gp, X, y, name):
        super().__init__()
        self.gp, self.X, self.y, self.name = gp, X, y, name

    def forward(self):
        return getattr(self.gp, self.name)(self.X, self.y)


def check_gradient(gp, X, y, name):
    loss = Loss(gp, X, y, name)
    names = [n for n, p in loss.named_parameters() if p.requires_grad]
    values = [dict(loss.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    function = lambda *v: torch.func.functional_call(loss, dict(zip(names, v, strict=True)), ())  # noqa: E731
    return torch.autograd.gradcheck(function, values)


def test_log_p_of_y_is_the_multivariate_t_of_scipy():
    X, y = data()
    gp = model(InverseGamma(2.5, 3.0))
    exact = stats.multivariate_t(np.full(12, 0.3), (3.0 / 2.5 * dense(gp, X)).numpy(), df=5).logpdf(y.numpy())
    # Both factor a matrix of condition 1e2.
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-11)


def test_several_outputs_share_the_scale():
    X, y = data(n_outputs=3)
    gp = model(InverseGamma(2.5, 3.0), n_outputs=3)
    shape = 3.0 / 2.5 * torch.kron(dense(gp, X), torch.eye(3)).numpy()
    loc = gp.constant_mean.detach().repeat(12).numpy()
    exact = stats.multivariate_t(loc, shape, df=5).logpdf(y.reshape(-1).numpy())
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-11)


@pytest.mark.parametrize("name", PRIORS)
def test_log_p_of_y_holds_to_ten_digits_for_every_prior(name):
    X, y = data()
    make, density = PRIORS[name]
    gp = model(make())
    Kn = dense(gp, X)
    residual = y - 0.3
    quad = (residual @ torch.linalg.solve(Kn, residual)).item()
    exact = float(log_evidence_mp(density, 12, quad)) - torch.logdet(Kn).item() / 2
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-10)


def test_a_point_mass_is_the_gaussian_process_of_scikit_learn():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    k = gaussian_process.kernels
    X, y = data(n=40)
    gp = model(Delta(1.7), mean="zero")
    kernel = k.ConstantKernel(1.7) * (k.RBF([0.8, 1.7]) + k.WhiteKernel(0.2))
    other = gaussian_process.GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0).fit(X.numpy(), y.numpy())
    exact = other.log_marginal_likelihood(other.kernel_.theta)
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-10)

    X_new, _ = data(n=7, seed=1)
    mean, std = other.predict(X_new.numpy(), return_std=True)
    law = gp.condition(X, y).predictive(X_new)
    torch.testing.assert_close(law.mean, torch.as_tensor(mean), rtol=0, atol=1e-11)
    torch.testing.assert_close(law.std, torch.as_tensor(std), rtol=0, atol=1e-11)


@pytest.mark.parametrize("prior", [Delta(1.7), InverseGamma(2.0, 0.5), HalfCauchy(0.7)], ids=repr)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_the_gradient_of_log_p_of_y_is_that_of_differences(prior, n_outputs):
    X, y = data(n_outputs=n_outputs)
    gp = model(copy.deepcopy(prior), n_outputs=n_outputs)
    assert {n for n, p in gp.named_parameters() if p.requires_grad} >= {"log_noise", "constant_mean"}
    assert check_gradient(gp, X, y, "log_marginal_likelihood")


@pytest.mark.parametrize("trainable", [True, False])
def test_the_gradient_of_the_profile_loss_is_that_of_differences(trainable):
    X, y = data(n_outputs=2)
    gp = model("delta", n_outputs=2)
    gp.constant_mean.requires_grad_(trainable)
    assert check_gradient(gp, X, y, "profile_loss")


def test_a_module_that_is_no_kernel_of_the_library_will_do():
    class Laplace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_rate = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, y):
            return (-self.log_rate.exp() * (x[:, None] - y).abs().sum(-1)).exp()

        def diag(self, x):
            return x.new_ones(len(x))

    X, y = data()
    gp = ScaleMixtureGP(Laplace(), "half_cauchy", noise=0.1)
    assert check_gradient(gp, X, y, "log_marginal_likelihood")
    assert gp.condition(X, y).variance(X).shape == (12,)


@pytest.mark.parametrize("prior", ["delta", "inverse_gamma", "half_cauchy", "burr_xii", UserInverseGamma()], ids=repr)
def test_at_its_best_scale_every_prior_has_the_profile_likelihood_of_the_gaussian(prior):
    X, y = data(n_outputs=2)
    gaps = []
    for lengthscale, noise in [((0.8, 1.7), 0.2), ((3.0, 0.2), 1e-3), ((0.1, 9.0), 4.0)]:
        gp = model(copy.deepcopy(prior), n_outputs=2, noise=noise, lengthscale=lengthscale)
        profile = gp.profile_loss(X, y).item()
        gp.fit_mean_and_scale(X, y)
        gaps.append(profile + gp.log_marginal_likelihood(X, y).item())
    # The same constant whatever the kernel, hence the same optimum; 0 for the Gaussian itself.
    assert gaps == pytest.approx([gaps[0]] * 3, abs=1e-9)
    if prior == "delta":
        assert gaps[0] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("prior", ["delta", "inverse_gamma", "half_cauchy"])
def test_mean_and_scale_are_stationary_once_fitted(prior):
    X, y = data(n_outputs=2)
    gp = model(prior, n_outputs=2)
    gp.fit_mean_and_scale(X, y)
    gp.log_marginal_likelihood(X, y).backward()
    assert gp.constant_mean.grad.abs().max().item() < 1e-10
    (scale,) = [p for p in gp.scale_prior.parameters() if p.requires_grad]
    assert abs(scale.grad.item()) < 1e-9


def test_what_is_frozen_is_not_fitted():
    X, y = data()
    gp = model(InverseGamma(2.0, 3.0))
    gp.constant_mean.requires_grad_(False)
    gp.scale_prior.requires_grad_(False)
    gp.fit_mean_and_scale(X, y)
    assert gp.constant_mean.item() == pytest.approx(0.3)
    assert gp.scale_prior.b.item() == pytest.approx(3.0)
    model(LogNormal()).fit_mean_and_scale(X, y)


def test_predictions_are_the_dense_formulas():
    X, y = data(n_outputs=2)
    X_new, _ = data(n=9, seed=1)
    gp = model(HalfCauchy(), n_outputs=2)
    posterior = gp.condition(X, y)
    cross, inverse = gp.kernel(X_new, X).detach(), torch.linalg.inv(dense(gp, X))
    covariance = gp.kernel(X_new, X_new).detach() - cross @ inverse @ cross.mT
    mean, variance = posterior.predict(X_new)
    torch.testing.assert_close(mean, gp.constant_mean + cross @ inverse @ (y - gp.constant_mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, covariance.diagonal(), rtol=0, atol=1e-13)
    torch.testing.assert_close(posterior.covariance(X_new), covariance, rtol=0, atol=1e-13)
    assert torch.equal(posterior.mean(X_new), mean)
    assert torch.equal(posterior.variance(X_new), variance)
    assert torch.equal(posterior.covariance(X_new), posterior.covariance(X_new).mT)


def test_blocks_of_rows_change_nothing(monkeypatch):
    X, y = data()
    X_new, _ = data(n=100, seed=1)
    posterior = model().condition(X, y)
    whole = posterior.predict(X_new)
    monkeypatch.setattr("stochproc.gp._exact_posterior.BLOCK_ELEMENTS", 16 * 12)
    for a, b in zip(posterior.predict(X_new), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(posterior.variance(X_new), whole[1], rtol=0, atol=1e-14)


def test_the_mean_asks_for_no_variance_and_the_variance_for_no_covariance():
    class Watched(RBF):
        def forward(self, x, y=None):
            blocks.append((len(x), len(x if y is None else y)))
            return super().forward(x, y)

        def diag(self, x):
            diagonals.append(len(x))
            return super().diag(x)

    blocks, diagonals = [], []
    X, y = data()
    X_new, _ = data(n=30, seed=1)
    posterior = ScaleMixtureGP(Watched(1.0)).condition(X, y)
    blocks.clear()
    posterior.mean(X_new)
    assert blocks == [(30, 12)]
    assert diagonals == []
    posterior.variance(X_new)
    assert blocks == [(30, 12)] * 2


def test_the_predictive_law_of_one_more_point_is_the_ratio_of_evidences():
    # p(y*|y) = p(y*, y)/p(y): conditioning and marginal likelihood tell the same story.
    X, y = data(n_outputs=2)
    for prior in (Delta(), InverseGamma(), HalfCauchy(), LogNormal()):
        gp = model(prior, n_outputs=2)
        joint, rest = gp.log_marginal_likelihood(X, y), gp.log_marginal_likelihood(X[:-1], y[:-1])
        law = gp.condition(X[:-1], y[:-1]).predictive(X[-1:])
        assert law.log_prob(y[-1:]).item() == pytest.approx((joint - rest).item(), abs=1e-11)


@pytest.mark.parametrize("prior", [Delta(), InverseGamma(), HalfCauchy(), LogNormal()], ids=repr)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_leave_one_out_is_conditioning_without_the_row(prior, n_outputs):
    X, y = data(n=8, n_outputs=n_outputs)
    gp = model(prior, n_outputs=n_outputs)
    mine = gp.condition(X, y).loo()
    for i in range(8):
        rest = torch.arange(8) != i
        law = gp.condition(X[rest], y[rest]).predictive(X[i : i + 1])
        assert mine[i].item() == pytest.approx(law.log_prob(y[i : i + 1]).item(), abs=1e-11)


def test_leaving_out_the_only_row_gives_the_prior():
    X, y = data(n=1)
    gp = model()
    exact = gp.log_marginal_likelihood(X, y).item()
    assert gp.condition(X, y).loo().item() == pytest.approx(exact, abs=1e-12)


def test_draws_have_the_marginals_of_the_predictive_law():
    X, y = data()
    X_new, _ = data(n=5, seed=1)
    posterior = model(HalfCauchy()).condition(X, y)
    f = posterior.sample(X_new, 20_000, generator=torch.Generator().manual_seed(1))
    law = posterior.predictive(X_new, noise=False)
    uniform = law.scale.cdf((f - law.loc) / law.variance_before_scale.sqrt())
    for column in uniform.T:
        # Five tests at a fixed seed; by chance one seed in twenty would fail.
        assert stats.kstest(column.numpy(), "uniform").pvalue > 0.01
    assert posterior.sample(X_new, 2, noise=True).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [InverseGamma(2.0, 2.0), HalfCauchy(1.0)], ids=repr)
def test_ninety_percent_intervals_cover_ninety_percent_of_the_models_own_data(prior):
    gen = torch.Generator().manual_seed(0)
    X = torch.rand(18, 1, generator=gen) * 4
    gp = ScaleMixtureGP(RBF(0.7), prior, noise=0.1, mean="zero")
    root = torch.linalg.cholesky(dense(gp, X))
    inside = []
    # 2000 data sets of 10 test points each: at worst one data set counts once, and the standard error is 0.0067.
    for s in prior.sample(2000, generator=gen):
        y = s.sqrt() * root @ torch.randn(18, generator=gen)
        law = gp.condition(X[:8], y[:8]).predictive(X[8:])
        low, high = law.quantile([0.05, 0.95]).T
        inside.append(((low < y[8:]) & (y[8:] < high)).double().mean())
    assert torch.stack(inside).mean().item() == pytest.approx(0.9, abs=0.01)


def test_a_noise_of_zero_is_a_fixed_zero():
    X, y = data()
    gp = model(noise=0.0)
    assert gp.noise.item() == 0
    assert not gp.log_noise.requires_grad
    gp.log_marginal_likelihood(X, y).backward()
    assert bool(gp.kernel.log_lengthscale.grad.isfinite().all())
    posterior = gp.condition(X, y)
    # Interpolation, to the rounding of a matrix of condition 1e5.
    torch.testing.assert_close(posterior.mean(X), y, rtol=0, atol=1e-9)
    assert bool((posterior.variance(X) < 1e-9).all())


def test_duplicated_rows_without_noise_are_rescued_silently_in_searches_and_with_a_warning_at_the_end():
    X, y = data()
    X, y = torch.cat([X, X[:1]]), torch.cat([y, y[:1]])
    gp = model(noise=0.0)
    gp.log_marginal_likelihood(X, y).backward()
    with pytest.warns(NumericalWarning, match="the kernel matrix plus noise is positive definite only with jitter"):
        gp.condition(X, y)


def test_an_indefinite_matrix_raises_everywhere():
    class Indefinite(RBF):
        def forward(self, x, y=None):
            return -super().forward(x, y)

    X, y = data()
    gp = ScaleMixtureGP(Indefinite(1.0))
    for function in (gp.log_marginal_likelihood, gp.profile_loss, gp.condition):
        with pytest.raises(NotPositiveDefiniteError, match="the kernel matrix plus noise"):
            function(X, y)


def test_a_variance_below_rounding_is_reported_and_set_to_zero():
    X, y = data()
    posterior = model().condition(X, y)
    broken = dataclasses.replace(posterior, factor=0.3 * posterior.factor)
    with pytest.warns(NumericalWarning, match=r"12 of 12 predictive variances came out negative"):
        assert broken.variance(X).tolist() == [0.0] * 12


def test_constant_targets_are_explained_by_their_mean():
    X, _ = data()
    y = torch.full((12,), 0.3)
    gp = model("inverse_gamma")
    gp.constant_mean.requires_grad_(False)
    with pytest.raises(ValueError, match="y must not equal its mean exactly"):
        gp.profile_loss(X, y)
    with pytest.warns(DataWarning, match="all residuals are exactly zero"):
        gp.fit_mean_and_scale(X, y)
    assert gp.condition(X, y).scale.mean == pytest.approx(2 / (2 + 6 - 1), rel=1e-14)


def test_the_posterior_is_frozen_and_picklable():
    X, y = data()
    gp = model(HalfCauchy())
    posterior = gp.condition(X, y)
    before = posterior.mean(X)
    with torch.no_grad():
        for parameter in gp.parameters():
            parameter += 1
    assert torch.equal(posterior.mean(X), before)
    assert torch.equal(pickle.loads(pickle.dumps(posterior)).mean(X), before)


def test_predictions_are_differentiable_in_the_inputs():
    X, y = data()
    posterior = model().condition(X, y)
    X_new = data(n=3, seed=1)[0].requires_grad_()
    assert torch.autograd.gradcheck(posterior.mean, X_new)
    assert torch.autograd.gradcheck(posterior.variance, X_new)


def test_float32_data_give_float32_predictions_and_float64_losses():
    X, y = (t.float() for t in data())
    gp = model()
    loss = gp.log_marginal_likelihood(X, y)
    assert loss.dtype == torch.float64
    # A condition of 1e2 in float32.
    assert loss.item() == pytest.approx(gp.log_marginal_likelihood(X.double(), y.double()).item(), abs=1e-4)
    loss.backward()
    mean, variance = gp.condition(X, y).predict(X)
    assert mean.dtype == variance.dtype == torch.float32


def test_state_and_copies_survive():
    X, y = data()
    gp = model(HalfCauchy(0.3))
    fresh = model(HalfCauchy(), noise=1.0)
    fresh.load_state_dict(gp.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(gp)))
    for other in (fresh, twin):
        assert other.log_marginal_likelihood(X, y).item() == gp.log_marginal_likelihood(X, y).item()


@pytest.mark.bad_input
def test_shapes_that_do_not_fit_are_refused():
    X, y = data()
    gp = model()
    with pytest.raises(ValueError, match=r"y must have shape \(12, 1\) or \(12,\); got \(11,\)"):
        gp.condition(X, y[:-1])
    with pytest.raises(ValueError, match=r"X must have shape \(n, d\)"):
        gp.condition(X[:, 0], y)
    with pytest.raises(ValueError, match=r"y must have shape \(12, 2\); got \(12,\)"):
        model(n_outputs=2).condition(X, y)
    with pytest.raises(ValueError, match=r"X must have shape \(m, 2\); got \(12, 1\)"):
        gp.condition(X, y).mean(X[:, :1])
    with pytest.raises(TypeError, match="mixed dtypes"):
        gp.condition(X, y.float())


def test_values_out_of_range_are_refused():
    X, y = data()
    with pytest.raises(ValueError, match=r"noise must be non-negative and finite; got -0\.1"):
        model(noise=-0.1)
    with pytest.raises(ValueError, match="mean must be one of 'constant', 'zero'; got 'linear'"):
        model(mean="linear")
    with pytest.raises(ValueError, match="scale_prior must be a ScalePrior or one of"):
        model("cauchy")
    with pytest.raises(ValueError, match="X must be finite"):
        model().condition(X * float("nan"), y)
    with pytest.raises(ValueError, match="y must be finite"):
        model().log_marginal_likelihood(X, y / 0)
