import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.gp import GIG, Delta, HalfCauchy, InverseGamma, Predictive, scale_posterior
from tests.gp.scale_reference import PRIORS, UserInverseGamma, log_evidence_mp


def rows(prior, n_outputs=None, n_obs=5, quad=4.0):
    gen = torch.Generator().manual_seed(3)
    shape = (6,) if n_outputs is None else (6, n_outputs)
    loc, v = torch.randn(shape, generator=gen), torch.rand(6, generator=gen) + 0.1
    return Predictive(loc, v, scale_posterior(prior, n_obs, torch.tensor(quad))), torch.randn(shape, generator=gen)


def test_one_output_is_the_student_t_of_scipy():
    law, y = rows(InverseGamma(2.0, 3.0))
    exact = stats.t(9, law.loc.numpy(), (law.variance_before_scale * 5.0 / 4.5).sqrt().numpy())
    torch.testing.assert_close(law.log_prob(y), torch.as_tensor(exact.logpdf(y.numpy())), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(law.cdf(y), torch.as_tensor(exact.cdf(y.numpy())), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(law.std, torch.as_tensor(exact.std()), rtol=1e-13, atol=0)
    q = [1e-8, 0.25, 0.99]
    ppf = torch.stack([torch.as_tensor(exact.ppf(p)) for p in q], 1)
    torch.testing.assert_close(law.quantile(q), ppf, rtol=1e-12, atol=1e-12)


def test_outputs_of_a_row_are_a_multivariate_t():
    law, y = rows(InverseGamma(2.0, 3.0), n_outputs=3)
    for i in range(6):
        shape = (law.variance_before_scale[i] * 5.0 / 4.5).item() * np.eye(3)
        exact = stats.multivariate_t(law.loc[i].numpy(), shape, df=9).logpdf(y[i].numpy())
        assert law.log_prob(y)[i].item() == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("name", PRIORS)
def test_the_log_density_holds_to_ten_digits_for_every_prior(name):
    make, density = PRIORS[name]
    law, y = rows(make(), n_outputs=2)
    square = ((y - law.loc).square().sum(1) / law.variance_before_scale)[0].item()
    with mp.workdps(30):
        exact = log_evidence_mp(density, 7, 4.0 + mp.mpf(square)) - log_evidence_mp(density, 5, 4.0)
    exact = float(exact) - law.variance_before_scale[0].log().item()
    assert law.log_prob(y)[0].item() == pytest.approx(exact, abs=1e-10)


def test_a_known_scale_gives_the_gaussian():
    law, y = rows(Delta(0.5))
    exact = torch.distributions.Normal(law.loc, (0.5 * law.variance_before_scale).sqrt())
    torch.testing.assert_close(law.log_prob(y), exact.log_prob(y), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(law.cdf(y), exact.cdf(y), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(law.std, exact.stddev, rtol=1e-14, atol=0)


def test_mixture_and_student_t_agree_in_everything():
    closed, y = rows(InverseGamma(2.0, 2.0))
    mixture = Predictive(closed.loc, closed.variance_before_scale, rows(UserInverseGamma())[0].scale)
    for method in ("log_prob", "cdf"):
        torch.testing.assert_close(getattr(mixture, method)(y), getattr(closed, method)(y), rtol=1e-12, atol=1e-13)
    q = torch.tensor([[1e-8, 0.1], [0.5, 0.99]])
    assert mixture.quantile(q).shape == (6, 2, 2)
    torch.testing.assert_close(mixture.quantile(q), closed.quantile(q), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixture.std, closed.std, rtol=1e-11, atol=0)


def test_shapes_follow_the_outputs_and_the_probabilities():
    law, y = rows(HalfCauchy(), n_outputs=2)
    assert law.quantile(0.3).shape == (6, 2)
    assert law.quantile([0.1, 0.5, 0.9]).shape == (6, 2, 3)
    assert law.std.shape == law.mean.shape == law.cdf(y).shape == (6, 2)
    assert law.log_prob(y).shape == (6,)
    torch.testing.assert_close(law.quantile(0.5), law.loc, rtol=0, atol=0)
    torch.testing.assert_close(law.quantile([0.5])[..., 0], law.loc, rtol=0, atol=0)


def test_float32_stays_float32():
    scale = scale_posterior(HalfCauchy(), 5, torch.tensor(4.0))
    law = Predictive(torch.zeros(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32), scale)
    y = torch.ones(3, dtype=torch.float32)
    for value in (law.log_prob(y), law.cdf(y), law.quantile(0.9), law.std):
        assert value.dtype == torch.float32


@pytest.mark.parametrize(("prior", "n_obs"), [(InverseGamma(0.5), 1), (InverseGamma(1.0), 0), (HalfCauchy(), 1)])
def test_a_variance_that_does_not_exist_raises_and_quantiles_do_not(prior, n_obs):
    law, _ = rows(prior, n_obs=n_obs, quad=float(n_obs))
    with pytest.raises(ValueError, match=r"variance does not exist.*predict_quantiles"):
        _ = law.std
    assert bool(law.quantile([0.01, 0.99]).isfinite().all())


def test_a_mean_that_does_not_exist_raises():
    law, _ = rows(InverseGamma(0.5), n_obs=0, quad=0.0)
    with pytest.raises(ValueError, match="mean does not exist"):
        _ = law.mean


def test_a_variance_of_zero_is_a_point():
    law = Predictive(torch.tensor([1.0, 1.0]), torch.zeros(2), scale_posterior(InverseGamma(), 5, torch.tensor(4.0)))
    y = torch.tensor([1.0, 0.5])
    assert law.log_prob(y).tolist() == [math.inf, -math.inf]
    assert law.cdf(y).tolist() == [1.0, 0.0]
    assert law.quantile(0.01).tolist() == [1.0, 1.0]


def test_the_log_density_is_differentiable(gen):
    y = torch.randn(4, 2, generator=gen)
    loc = torch.randn(4, 2, generator=gen, requires_grad=True)
    v = (torch.rand(4, generator=gen) + 0.5).requires_grad_()
    for prior in (InverseGamma(), HalfCauchy()):
        scale = scale_posterior(prior, 5, torch.tensor(4.0))
        assert torch.autograd.gradcheck(lambda m, u, s=scale: Predictive(m, u, s).log_prob(y), (loc, v))


@pytest.mark.bad_input
def test_shapes_that_do_not_fit_are_refused():
    scale = scale_posterior(InverseGamma(), 5, torch.tensor(4.0))
    with pytest.raises(ValueError, match="loc must have shape"):
        Predictive(torch.zeros(3), torch.ones(2), scale)
    law = Predictive(torch.zeros(3), torch.ones(3), scale)
    with pytest.raises(ValueError, match=r"y must have shape \(3,\); got \(2,\)"):
        law.log_prob(torch.ones(2))


def test_values_out_of_range_are_refused():
    scale = scale_posterior(InverseGamma(), 5, torch.tensor(4.0))
    with pytest.raises(ValueError, match=r"variance_before_scale must be non-negative; got -1.0"):
        Predictive(torch.zeros(2), torch.tensor([1.0, -1.0]), scale)
    law = Predictive(torch.zeros(2), torch.ones(2), scale)
    with pytest.raises(ValueError, match="y must be finite"):
        law.log_prob(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="q must lie strictly between 0 and 1; got 1"):
        law.quantile(1.0)


def test_the_density_of_a_far_row_in_float32_is_that_in_float64():
    scale = scale_posterior(InverseGamma(2.0, 3.0), 5, torch.tensor(4.0))
    y = torch.tensor([1e25, -1e38])
    double, single = (
        Predictive(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), scale).log_prob(y.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(single, double.float())


@pytest.mark.parametrize("prior", [Delta(), InverseGamma(), GIG(), HalfCauchy()], ids=repr)
def test_a_row_whose_square_overflows_is_refused(prior):
    law = Predictive(torch.zeros(2), torch.ones(2), scale_posterior(prior, 5, torch.tensor(4.0)))
    with pytest.raises(ValueError, match="y must lie within some 1e150 standard deviations"):
        law.log_prob(torch.tensor([0.0, -1e160]))
