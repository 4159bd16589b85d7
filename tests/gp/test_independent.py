"""The model with the noise outside the scale: its evidence, gradient and limits."""

import copy
import pickle

import pytest
import torch
from scipy import stats

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import BurrXII, Delta, HalfCauchy, IndependentNoiseGP, InverseGamma, Mixture, ScaleMixtureGP
from stochproc.kernels import RBF, Linear
from tests.gp.independent_reference import Brute, data, log_evidence_mp, model, rotated_mp
from tests.gp.scale_reference import PRIORS, LogNormal, TwoPeaks

# With mass at s = 0, without, and with two peaks.
SOME_PRIORS = [InverseGamma(2.0, 2.0), HalfCauchy(1.3), BurrXII(0.3, 2.0), TwoPeaks()]


class Loss(torch.nn.Module):
    """log p(y) as a forward pass, so that functional_call can replace the hyperparameters."""

    def __init__(self, gp, X, y):
        super().__init__()
        self.gp, self.X, self.y = gp, X, y

    def forward(self):
        return self.gp.log_marginal_likelihood(self.X, self.y)


def check_gradient(gp, X, y):
    loss = Loss(gp, X, y)
    names = [n for n, p in loss.named_parameters() if p.requires_grad]
    values = [dict(loss.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    function = lambda *v: torch.func.functional_call(loss, dict(zip(names, v, strict=True)), ())  # noqa: E731
    return torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("size", [1.0, 0.0], ids=["signal", "noise only"])
@pytest.mark.parametrize("name", PRIORS)
def test_log_p_of_y_holds_to_ten_digits_for_every_prior(name, size):
    X, y = data(6, size=size)
    make, density = PRIORS[name]
    gp = model(make(), mean="zero")
    exact = float(log_evidence_mp(density, *rotated_mp(gp, X, y), gp.noise.item()))
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-10)
    assert gp.condition(X, y).log_marginal_likelihood == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("prior", [HalfCauchy(1.3), BurrXII(0.3, 2.0)], ids=repr)
def test_much_noise_alone_keeps_ten_digits_too(prior):
    # 60 rows of noise: s is bounded above sharply and not at all below, down to the mass of the prior itself.
    X, y = data(60, size=0.0)
    gp = model(copy.deepcopy(prior), mean="zero")
    # The reference has 9000 nodes on 230 units of log s, 8 times as dense as the rule needs.
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(Brute(gp, X, y).log_evidence, abs=1e-10)


@pytest.mark.parametrize("prior", SOME_PRIORS, ids=repr)
def test_several_outputs_share_the_scale(prior):
    X, y = data(7, n_outputs=3)
    gp = model(copy.deepcopy(prior), n_outputs=3)
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(Brute(gp, X, y).log_evidence, abs=1e-10)


def test_one_row_will_do():
    X, y = data(1)
    gp = model("half_cauchy")
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(Brute(gp, X, y).log_evidence, abs=1e-10)


def test_a_known_scale_is_the_gaussian_process_with_that_scale():
    X, y = data(12, n_outputs=2)
    gp = model(Delta(1.7), n_outputs=2, noise=0.2)
    total = (1.7 * gp.kernel(X, X) + 0.2 * torch.eye(12)).detach().numpy()
    exact = sum(
        stats.multivariate_normal(gp.constant_mean[c].item() * torch.ones(12).numpy(), total).logpdf(y[:, c].numpy())
        for c in range(2)
    )
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact, abs=1e-11)
    assert gp.condition(X, y).log_marginal_likelihood == pytest.approx(exact, abs=1e-11)


class WithNugget(RBF):
    """K + 1e-6 I on the training points, so that noise of zero leaves a matrix that can be decomposed."""

    def forward(self, x, y=None):
        y = x if y is None else y
        return super().forward(x, y) + 1e-6 * (x[..., :, None, :] == y[..., None, :, :]).all(-1)

    def diag(self, x):
        return super().diag(x) + 1e-6


@pytest.mark.parametrize("prior", [Delta(1.7), *SOME_PRIORS], ids=repr)
def test_both_noise_models_agree_when_the_noise_is_zero(prior):
    X, y = data(10)
    X_new, y_new = data(5, seed=1)
    models = [
        kind(WithNugget([0.8, 1.7]), copy.deepcopy(prior), noise=0.0, mean="zero")
        for kind in (IndependentNoiseGP, ScaleMixtureGP)
    ]
    ours, theirs = (gp.log_marginal_likelihood(X, y).item() for gp in models)
    # A matrix of condition 1e6 in two decompositions.
    assert ours == pytest.approx(theirs, rel=1e-9)
    ours, theirs = (gp.condition(X, y) for gp in models)
    assert ours.scale.mean == pytest.approx(theirs.scale.mean, rel=1e-8)
    assert ours.scale.inverse_mean == pytest.approx(theirs.scale.inverse_mean, rel=1e-8)
    a, b = (posterior.predictive(X_new) for posterior in (ours, theirs))
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.std, b.std, rtol=1e-7, atol=0)
    torch.testing.assert_close(a.quantile([1e-8, 0.05, 0.5]), b.quantile([1e-8, 0.05, 0.5]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(a.log_prob(y_new), b.log_prob(y_new), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.loo(), theirs.loo(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prior", [Delta(1.7), *SOME_PRIORS], ids=repr)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_the_gradient_of_log_p_of_y_is_that_of_differences(prior, n_outputs):
    X, y = data(6, n_outputs=n_outputs)
    gp = model(copy.deepcopy(prior), n_outputs=n_outputs)
    assert {n for n, p in gp.named_parameters() if p.requires_grad} >= {"log_noise", "constant_mean"}
    assert check_gradient(gp, X, y)


def test_shape_parameters_of_the_prior_have_gradients_too():
    X, y = data(6)
    gp = model(InverseGamma(2.0, 2.0))
    gp.scale_prior.log_a.requires_grad_(True)
    assert check_gradient(gp, X, y)


def test_the_gradient_survives_repeated_eigenvalues():
    # A square has a double eigenvalue, points far apart have one n times; autograd through eigh divides by zero.
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    for X in (square, 1e3 * square):
        _, y = data(4)
        gp = model(HalfCauchy(1.3), lengthscale=(0.8, 0.8))
        assert check_gradient(gp, X, y)


def test_the_gradient_of_noise_alone_is_that_of_differences():
    X, y = data(12, size=0.0)
    assert check_gradient(model(BurrXII(0.3, 2.0)), X, y)


def test_the_gradient_in_the_inputs_and_targets_is_that_of_differences():
    X, y = data(5)
    gp = model(HalfCauchy(1.3))
    assert torch.autograd.gradcheck(gp.log_marginal_likelihood, (X.requires_grad_(), y.requires_grad_()))


def test_noise_alone_takes_more_nodes_than_a_signal():
    X, y = data(30, size=0.0)
    assert len(model(BurrXII(0.3, 2.0)).condition(X, y).nodes[0]) > 129
    X, y = data(30)
    assert len(model(InverseGamma(2.0, 2.0)).condition(X, y).nodes[0]) <= 129


def test_a_kernel_of_low_rank_leaves_the_other_directions_to_the_noise():
    X, y = data(9)
    gp = IndependentNoiseGP(Linear(0.7, 1.0), "half_cauchy", noise=0.1, mean="zero")
    posterior = gp.condition(X, y)
    assert posterior.likelihood.rank == 3
    # E[s | y] needs half the rank, not half the rows, beside the prior's tail.
    assert posterior.scale.prior.tail_index == 2.0
    # The dense reference loses the small eigenvalues to rounding of s K beyond s = 1e13.
    assert posterior.log_marginal_likelihood == pytest.approx(Brute(gp, X, y, high=30.0).log_evidence, abs=1e-10)


def test_duplicated_rows_are_legal():
    X, y = data(8)
    X, y = torch.cat([X, X]), torch.cat([y, y + 0.1])
    gp = model("half_cauchy")
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(Brute(gp, X, y, high=30.0).log_evidence, abs=1e-10)
    gp.condition(X, y)


def test_a_kernel_of_zero_leaves_noise_alone():
    class Zero(torch.nn.Module):
        def forward(self, x, y):
            return x.new_zeros(len(x), len(y))

        def diag(self, x):
            return x.new_zeros(len(x))

    X, y = data(6)
    gp = IndependentNoiseGP(Zero(), "inverse_gamma", noise=0.2, mean="zero")
    exact = torch.distributions.Normal(0.0, 0.2**0.5).log_prob(y)
    posterior = gp.condition(X, y)
    assert posterior.log_marginal_likelihood == pytest.approx(exact.sum().item(), abs=1e-11)
    # Nothing is learned about s.
    assert posterior.scale.mean == pytest.approx(2.0, rel=1e-10)
    torch.testing.assert_close(posterior.loo(), exact, rtol=0, atol=1e-11)


def test_without_noise_a_singular_matrix_is_rescued_with_a_warning():
    X, y = data(8)
    X, y = torch.cat([X, X[:1]]), torch.cat([y, y[:1]])
    gp = model(noise=0.0)
    gp.log_marginal_likelihood(X, y).backward()
    assert bool(gp.kernel.log_lengthscale.grad.isfinite().all())
    with pytest.warns(NumericalWarning, match="positive definite only with jitter 1e-10 times its mean diagonal"):
        gp.condition(X, y)


def test_warnings_name_the_line_that_asked():
    X, y = data(8)
    with pytest.warns(NumericalWarning) as caught:
        model(noise=0.0).condition(torch.cat([X, X[:1]]), torch.cat([y, y[:1]]))
    assert [w.filename for w in caught] == [__file__]


def test_an_indefinite_kernel_is_refused_even_where_the_noise_would_hide_it():
    # At a large enough scale the covariance would be indefinite whatever the noise.
    class Indefinite(RBF):
        def forward(self, x, y=None):
            return -super().forward(x, y)

    X, y = data(8)
    gp = IndependentNoiseGP(Indefinite(1.0), noise=100.0)
    for function in (gp.log_marginal_likelihood, gp.condition):
        with pytest.raises(
            NotPositiveDefiniteError, match=r"the kernel matrix: not positive semi-definite .*eigenvalues"
        ):
            function(X, y)


def test_targets_equal_to_their_mean_say_that_the_function_is_small():
    X, _ = data(8)
    y = torch.full((8,), 0.3)
    for prior in ("inverse_gamma", "half_cauchy"):
        gp = model(prior)
        posterior = gp.condition(X, y)
        assert posterior.log_marginal_likelihood == pytest.approx(Brute(gp, X, y).log_evidence, abs=1e-10)
        assert posterior.typical_scale < 1
    # Without noise only a prior without mass at s = 0 can explain them.
    assert IndependentNoiseGP(RBF(0.1), noise=0.0, mean="zero").condition(X, 0 * y).scale.mean < 1


def test_float32_data_give_float32_predictions_and_float64_losses():
    X, y = (t.float() for t in data(8))
    gp = model("half_cauchy")
    loss = gp.log_marginal_likelihood(X, y)
    assert loss.dtype == torch.float64
    # A condition of 1e2 in float32.
    assert loss.item() == pytest.approx(gp.log_marginal_likelihood(X.double(), y.double()).item(), abs=1e-4)
    loss.backward()
    posterior = gp.condition(X, y)
    law = posterior.predictive(X)
    found = [law.mean, law.std, law.quantile(0.1), law.log_prob(y), law.cdf(y), posterior.covariance(X)]
    found += [posterior.sample(X), posterior.loo()]
    assert {t.dtype for t in found} == {torch.float32}


def test_state_and_copies_survive():
    X, y = data(8)
    gp = model(HalfCauchy(0.3))
    fresh = model(HalfCauchy(), noise=1.0)
    fresh.load_state_dict(gp.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(gp)))
    for other in (fresh, twin):
        assert other.log_marginal_likelihood(X, y).item() == gp.log_marginal_likelihood(X, y).item()


def test_a_mixture_of_densities_is_a_prior_like_any_other():
    X, y = data(8)
    parts = [InverseGamma(2.0, 2.0), LogNormal()]
    gp = model(Mixture(parts, [3, 1]))
    each = [model(copy.deepcopy(part)).log_marginal_likelihood(X, y) for part in parts]
    exact = torch.logaddexp(each[0] + torch.tensor(0.75).log(), each[1] + torch.tensor(0.25).log())
    assert gp.log_marginal_likelihood(X, y).item() == pytest.approx(exact.item(), abs=1e-11)


def test_values_out_of_range_are_refused():
    X, y = data(8)
    with pytest.raises(ValueError, match=r"noise must be non-negative and finite; got -0\.1"):
        model(noise=-0.1)
    with pytest.raises(ValueError, match="mean must be one of 'constant', 'zero'; got 'linear'"):
        model(mean="linear")
    with pytest.raises(ValueError, match="scale_prior must have a density or be a Delta where the noise is outside"):
        model(Mixture([Delta(1.0), InverseGamma()]))
    with pytest.raises(ValueError, match="X must be finite"):
        model().condition(X * float("nan"), y)
    with pytest.raises(ValueError, match="does not converge towards s = 0"):
        model(HalfCauchy(), noise=0.0, mean="zero", lengthscale=(0.1, 0.1)).log_marginal_likelihood(X, 0 * y)


@pytest.mark.bad_input
def test_shapes_that_do_not_fit_are_refused():
    X, y = data(8)
    gp = model()
    with pytest.raises(ValueError, match=r"y must have shape \(8, 1\) or \(8,\); got \(7,\)"):
        gp.condition(X, y[:-1])
    with pytest.raises(ValueError, match=r"y must have shape \(8, 2\); got \(8,\)"):
        model(n_outputs=2).log_marginal_likelihood(X, y)
    posterior = gp.condition(X, y)
    with pytest.raises(ValueError, match=r"X must have shape \(m, 2\); got \(8, 1\)"):
        posterior.predictive(X[:, :1])
    with pytest.raises(TypeError, match="mixed dtypes"):
        posterior.mean(X.float())
    with pytest.raises(ValueError, match=r"y must have shape \(8,\); got \(7,\)"):
        posterior.predictive(X).log_prob(y[:-1])
