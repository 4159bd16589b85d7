import copy

import numpy as np
import pytest
import torch

from stochproc.exceptions import NumericalWarning
from stochproc.gp import (
    GIG,
    BurrXII,
    Delta,
    Gamma,
    HalfCauchy,
    HalfNormal,
    HalfStudentT,
    ImportanceScale,
    InverseGamma,
    LogNormal,
    Mixture,
    ScaleMixtureGPRegressor,
    ScalePrior,
    log_evidence,
)
from stochproc.kernels import RBF

LIGHTER = [
    "gamma",
    "gig",
    "half_normal",
    "half_student_t",
    "log_normal",
    Mixture([Delta(), HalfCauchy(), GIG()], [1, 2, 3]),
]
IMPORTANCE = {"inference": "importance", "random_state": 3, "optimizer": None}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(0, 6, 25))[:, None]
    return X, np.sin(X[:, 0]) + 0.1 * rng.standard_normal(25)


@pytest.fixture(scope="module")
def gaussian(data):
    return ScaleMixtureGPRegressor(scale_prior="delta", n_restarts=1).fit(*data)


@pytest.mark.parametrize("prior", LIGHTER, ids=repr)
def test_every_prior_has_the_kernel_and_noise_of_the_gaussian_process(prior, data, gaussian):
    X, y = data
    model = ScaleMixtureGPRegressor(scale_prior=prior, n_restarts=1).fit(X, y)
    assert model.converged_
    assert model.noise_ == gaussian.noise_
    np.testing.assert_array_equal(model.predict(X), gaussian.predict(X))
    # The scale is the one unknown that is left: no other value of its parameter is better.
    scale = model.scale_posterior_
    best = log_evidence(model.scale_prior_, scale.n_obs, scale.quad).item()
    for factor in (0.9, 1.1):
        other = copy.deepcopy(model.scale_prior_)
        other.rescale(factor)
        assert log_evidence(other, scale.n_obs, scale.quad).item() < best
    low, high = model.predict_interval(X, 0.9).T
    assert 0.7 <= np.mean((low < y) & (y < high)) <= 1


@pytest.mark.parametrize("prior", LIGHTER, ids=repr)
def test_a_loaded_model_predicts_the_same(prior, data, tmp_path):
    X, y = data
    model = ScaleMixtureGPRegressor(scale_prior=prior, optimizer=None).fit(X, y)
    model.save(tmp_path / "model.safetensors")
    loaded = ScaleMixtureGPRegressor.load(tmp_path / "model.safetensors")
    assert repr(loaded.scale_prior_) == repr(model.scale_prior_)
    # Numbers of the prior go through exp and log once; quantiles are solved to 1e-10 in probability.
    np.testing.assert_allclose(
        loaded.predict_quantiles(X, [0.05, 0.6]), model.predict_quantiles(X, [0.05, 0.6]), rtol=1e-9
    )
    np.testing.assert_allclose(
        loaded.log_predictive_density(X, y), model.log_predictive_density(X, y), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("prior", [LogNormal(), Gamma(), HalfNormal(), HalfStudentT(), GIG()], ids=repr)
def test_importance_sampling_agrees_with_the_exact_posterior(prior, data):
    X, y = data
    exact = ScaleMixtureGPRegressor(scale_prior=prior, optimizer=None, inference="exact").fit(X, y)
    drawn = ScaleMixtureGPRegressor(scale_prior=prior, **IMPORTANCE).fit(X, y)
    assert isinstance(drawn.scale_posterior_, ImportanceScale)
    assert drawn.scale_posterior_.k_hat < 0.7
    np.testing.assert_array_equal(drawn.predict(X), exact.predict(X))
    assert drawn.log_marginal_likelihood_ == exact.log_marginal_likelihood_
    # log s has a standard deviation of sqrt(2/25) given y; four standard errors of 10,000 draws.
    tolerance = 4 * (2 / 25) ** 0.5 / 100
    for latent in (False, True):
        mine, known = (m.predict(X, return_std=True, latent=latent)[1] for m in (drawn, exact))
        np.testing.assert_allclose(mine, known, rtol=tolerance)
    assert drawn.noise_variance_ == pytest.approx(exact.noise_variance_, rel=tolerance)


def test_auto_is_exact(data):
    X, y = data
    auto, exact = (ScaleMixtureGPRegressor(optimizer=None, inference=how).fit(X, y) for how in ("auto", "exact"))
    assert auto.scale_posterior_.df == exact.scale_posterior_.df == 29
    np.testing.assert_array_equal(auto.predict_interval(X), exact.predict_interval(X))


def test_draws_repeat_with_the_seed_and_after_loading(data, tmp_path):
    X, y = data
    first, second = (ScaleMixtureGPRegressor(scale_prior="half_cauchy", **IMPORTANCE).fit(X, y) for _ in range(2))
    other = ScaleMixtureGPRegressor(scale_prior="half_cauchy", **{**IMPORTANCE, "random_state": 4}).fit(X, y)
    assert torch.equal(first.scale_posterior_.log_s, second.scale_posterior_.log_s)
    assert not torch.equal(first.scale_posterior_.log_s, other.scale_posterior_.log_s)
    first.save(tmp_path / "model.safetensors")
    loaded = ScaleMixtureGPRegressor.load(tmp_path / "model.safetensors")
    assert loaded.inference == "importance"
    # The scale of the prior went through exp and log once.
    np.testing.assert_allclose(loaded.predict_interval(X), first.predict_interval(X), rtol=1e-9)


def test_the_number_of_draws_is_a_parameter(data):
    model = ScaleMixtureGPRegressor(scale_prior="gamma", importance_samples=500, **IMPORTANCE).fit(*data)
    assert len(model.scale_posterior_.log_s) == 500


def test_unreliable_draws_are_reported_by_fit():
    # One residual of 1e-5 under a prior of sigma near 1e4: every scale in between is as good.
    X, y = np.zeros((1, 1)), np.array([1e-5])
    model = ScaleMixtureGPRegressor(
        RBF(1.0), scale_prior=HalfCauchy(1e4), normalize_X=False, normalize_y=False, mean="zero", **IMPORTANCE
    )
    with pytest.warns(NumericalWarning, match="importance sampling of the scale is unreliable"):
        model.fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"inference": "sampling"}, "inference must be one of 'auto', 'exact', 'importance'; got 'sampling'"),
        ({"importance_samples": 24}, "importance_samples must be at least 25; got 24"),
        (
            {"inference": "importance", "noise_model": "independent"},
            'inference="importance" needs noise_model="scaled"',
        ),
    ],
)
def test_bad_parameters_are_refused_by_name(parameters, message, data):
    with pytest.raises(ValueError, match=message):
        ScaleMixtureGPRegressor(**parameters).fit(*data)


def test_a_mixture_with_a_point_mass_cannot_be_sampled_by_importance(data):
    model = ScaleMixtureGPRegressor(scale_prior=Mixture([Delta(), HalfCauchy()]), **IMPORTANCE)
    with pytest.raises(TypeError, match="a Mixture with a Delta has no density"):
        model.fit(*data)


def test_a_scale_that_is_not_kept_as_a_logarithm_is_profiled_out_too(data, gaussian):
    class Plain(ScalePrior):
        scale_name = "t"

        def __init__(self):
            super().__init__()
            self.t = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def log_prob(self, s):
            return -s / self.t - self.t.log()

    model = ScaleMixtureGPRegressor(scale_prior=Plain(), n_restarts=1).fit(*data)
    # One search, that of the Gaussian process, and none of its own for t.
    assert model.n_iter_ == gaussian.n_iter_
    known = ScaleMixtureGPRegressor(scale_prior=Gamma(), n_restarts=1).fit(*data)
    assert model.scale_prior_.t.item() == pytest.approx(1 / known.scale_prior_.b.item(), rel=1e-6)


def test_the_mean_of_a_joint_search_is_in_units_of_the_data(data):
    X, y = data
    prior = HalfStudentT()
    prior.log_df.requires_grad_(True)
    options = {"scale_prior": prior, "normalize_y": False, "n_restarts": 1}
    plain, small = (ScaleMixtureGPRegressor(**options).fit(X, g * y) for g in (1.0, 1e-9))
    assert small.converged_
    assert small.log_marginal_likelihood_ + 25 * np.log(1e-9) == pytest.approx(plain.log_marginal_likelihood_, abs=0.1)
    np.testing.assert_allclose(small.predict(X), 1e-9 * plain.predict(X), rtol=1e-2, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("noise_model", ["scaled", "independent"])
@pytest.mark.parametrize(
    ("prior", "thawed"),
    [
        (InverseGamma(), ["log_a"]),
        (Gamma(), ["log_a"]),
        (LogNormal(), ["log_v"]),
        (BurrXII(), ["log_c", "log_d"]),
        (HalfStudentT(), ["log_df"]),
        (GIG(), ["p"]),
        (GIG(), ["log_omega"]),
        (Mixture([InverseGamma(), LogNormal()]), ["log_weights", "components.1.log_v"]),
    ],
)
def test_shapes_that_are_learned_end_within_their_ranges(prior, thawed, noise_model):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 1))
    # Of a Gaussian process: the best scale is one that is known, which every one of these priors tends to.
    y = np.sin(X[:, 0]) + 0.3 * rng.normal(size=40)
    for name in thawed:
        prior.get_parameter(name).requires_grad_()
    # A tail that is not resolved by the quadrature would warn.
    model = ScaleMixtureGPRegressor(scale_prior=prior, noise_model=noise_model, n_restarts=1).fit(X, y)
    assert model.converged_
    for name in thawed:
        path, _, own = name.rpartition(".")
        low, high = model.scale_prior_.get_submodule(path).search_ranges[own]
        found = model.scale_prior_.get_parameter(name).detach()
        found = found.exp() if own.startswith("log_") else found
        assert (found > 0.999 * low if low > 0 else found > low - 1e-9).all()
        assert (found < 1.001 * high).all()
