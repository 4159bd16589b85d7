import copy
import itertools
import math
import pickle

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import integrate, stats

from stochproc import gp
from stochproc.gp import (
    GIG,
    BurrXII,
    Delta,
    Gamma,
    HalfCauchy,
    HalfNormal,
    HalfStudentT,
    InverseGamma,
    Mixture,
    ScalePrior,
    as_scale_prior,
    log_evidence,
    scale_prior_from_config,
)
from tests.gp.scale_reference import LogNormal, TwoPeaks, UserInverseGamma

EPS = torch.finfo(torch.float64).eps
DENSITIES = [
    InverseGamma(2.0, 2.0),
    InverseGamma(0.5, 7.0),
    InverseGamma(300.0, 1e-3),
    BurrXII(2.0, 1.0, 1.0),
    BurrXII(0.3, 4.0, 20.0),
    HalfCauchy(1.0),
    HalfCauchy(0.01),
    LogNormal(),
    TwoPeaks(),
    gp.LogNormal(0.4, 2.5),
    Gamma(1.0, 1.0),
    Gamma(0.3, 20.0),
    Gamma(300.0, 1e3),
    HalfNormal(1.3),
    HalfStudentT(3.5, 1.3),
    HalfStudentT(0.7, 0.01),
    GIG(-0.5, 1.0, 1.0),
    GIG(-300.0, 1e-3, 60.0),
    Mixture([HalfNormal(1.3), GIG(), InverseGamma()], [1, 2, 3], 1.5),
]


def _cdf_of_gig(s):
    """GIG(1.3, 0.5, 2) by the trapezoid rule; scipy integrates anew for each point."""
    grid = np.linspace(-12.0, 12.0, 20_001)
    density = np.exp(stats.geninvgauss(1.3, 1.0, scale=2.0).logpdf(np.exp(grid)) + grid)
    return np.interp(np.log(s), grid, np.cumsum(density) * (grid[1] - grid[0]))


# The same laws in scipy; sigma = sqrt(s) is half-Cauchy.
IN_SCIPY = [
    (InverseGamma(2.5, 3.0), stats.invgamma(2.5, scale=3.0).cdf, stats.invgamma(2.5, scale=3.0).logpdf),
    (BurrXII(1.7, 0.6, 2.0), stats.burr12(1.7, 0.6, scale=2.0).cdf, stats.burr12(1.7, 0.6, scale=2.0).logpdf),
    (
        HalfCauchy(1.5),
        lambda s: stats.halfcauchy(scale=1.5).cdf(s**0.5),
        lambda s: stats.halfcauchy(scale=1.5).logpdf(s**0.5) - math.log(2) - 0.5 * torch.tensor(s).log().numpy(),
    ),
    (LogNormal(), stats.lognorm(1.0).cdf, stats.lognorm(1.0).logpdf),
    (
        gp.LogNormal(0.4, 2.5),
        stats.lognorm(2.5**0.5, scale=math.exp(0.4)).cdf,
        stats.lognorm(2.5**0.5, scale=math.exp(0.4)).logpdf,
    ),
    (Gamma(1.7, 0.6), stats.gamma(1.7, scale=1 / 0.6).cdf, stats.gamma(1.7, scale=1 / 0.6).logpdf),
    # s / t² is F(1, infinity) and F(1, df).
    (HalfNormal(1.5), stats.chi2(1, scale=2.25).cdf, stats.chi2(1, scale=2.25).logpdf),
    (HalfStudentT(3.5, 1.5), stats.f(1, 3.5, scale=2.25).cdf, stats.f(1, 3.5, scale=2.25).logpdf),
    (HalfStudentT(0.7, 1.5), stats.f(1, 0.7, scale=2.25).cdf, stats.f(1, 0.7, scale=2.25).logpdf),
    (GIG(1.3, 0.5, 2.0), _cdf_of_gig, stats.geninvgauss(1.3, 1.0, scale=2.0).logpdf),
]


@pytest.mark.parametrize("prior", DENSITIES, ids=repr)
def test_the_density_integrates_to_one(prior):
    def in_log(u):
        return (prior.log_prob(torch.tensor(math.exp(u))) + u).exp().item()

    points = [-20, -10, -5, -2, 0, 2, 3, 5, 10, 20]
    ends = [-300.0, *points, 300.0]
    total = sum(integrate.quad(in_log, a, b, epsabs=1e-12, limit=200)[0] for a, b in itertools.pairwise(ends))
    # quad asks 1e-12 of each of 11 panels; beyond exp(±300) the slowest tail, s^0.3 at 0, holds exp(-90).
    assert total == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(
    ("prior", "_cdf", "logpdf"), IN_SCIPY, ids=lambda v: repr(v) if isinstance(v, ScalePrior) else ""
)
def test_the_log_density_is_that_of_scipy(prior, _cdf, logpdf):
    s = torch.logspace(-6, 6, 50)
    # scipy's own formulas lose a few digits in the tails.
    torch.testing.assert_close(prior.log_prob(s), torch.as_tensor(logpdf(s.numpy())), rtol=1e-11, atol=1e-11)


def test_a_sharp_inverse_gamma_keeps_its_digits():
    a = 1e8
    s = 1 + 1e-4
    with mp.workdps(40):
        # a and b as the prior has them, after one exp(log(.)).
        prior = InverseGamma(a, a)
        shape, scale = mp.mpf(prior.a.item()), mp.mpf(prior.b.item())
        exact = shape * mp.log(scale) - mp.loggamma(shape) - (shape + 1) * mp.log(mp.mpf(s)) - scale / mp.mpf(s)
    # a times the rounding of log(b/s/a), about log(a) eps, times its value 1e-4.
    assert prior.log_prob(torch.tensor(s)).item() == pytest.approx(float(exact), abs=4 * a * 1e-4 * math.log(a) * EPS)


@pytest.mark.parametrize("prior", DENSITIES[:7], ids=repr)
def test_the_density_is_zero_outside_the_positive_numbers(prior):
    assert prior.log_prob(torch.tensor([-1.0, 0.0])).tolist() == [-math.inf, -math.inf]


def test_the_density_keeps_dtype_and_shape():
    s = torch.ones(2, 3, dtype=torch.float32)
    for prior in (InverseGamma(), BurrXII(), HalfCauchy()):
        assert prior.log_prob(s).dtype == torch.float32
        assert prior.log_prob(s).shape == (2, 3)


@pytest.mark.parametrize(
    ("prior", "cdf", "_logpdf"), IN_SCIPY, ids=lambda v: repr(v) if isinstance(v, ScalePrior) else ""
)
def test_samples_follow_the_density(prior, cdf, _logpdf, gen):
    s = prior.sample(20_000, generator=gen)
    # Fixed seed; by chance one seed in a hundred would fail.
    assert stats.kstest(s.numpy(), cdf).pvalue > 0.01


def test_samples_have_the_shape_asked_for_and_repeat_with_the_seed():
    mixed = Mixture([Delta(), HalfCauchy(), GIG()])
    light = (Gamma(), gp.LogNormal(), HalfNormal(), HalfStudentT(), GIG(), mixed)
    for prior in (InverseGamma(), BurrXII(), HalfCauchy(), Delta(3.0), LogNormal(), *light):
        a, b = (prior.sample((2, 5), generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert a.shape == (2, 5)
        assert torch.equal(a, b)
        assert prior.sample().shape == ()


@pytest.mark.parametrize(
    ("prior", "mean"),
    [
        (InverseGamma(3.0, 4.0), 2.0),
        (InverseGamma(1.0, 4.0), math.inf),
        (BurrXII(2.0, 1.0, 3.0), 3 * math.pi / 2),
        (BurrXII(0.5, 1.5), math.inf),
        (HalfCauchy(), math.inf),
        (Delta(0.7), 0.7),
        (LogNormal(), math.exp(0.5)),
        (UserInverseGamma(2.0), 2.0),
        (gp.LogNormal(0.4, 2.5), math.exp(1.65)),
        (Gamma(1.5, 0.5), 3.0),
        (HalfNormal(1.3), 1.69),
        (HalfStudentT(3.0, 2.0), 12.0),
        (HalfStudentT(2.0), math.inf),
        (GIG(-0.5, 1.0, 4.0), 2.0),
        (Mixture([Delta(2.0), InverseGamma(3.0, 4.0)], [3, 1], 10.0), 20.0),
        (Mixture([Delta(2.0), HalfCauchy()], [1e9, 1]), math.inf),
    ],
    ids=repr,
)
def test_the_mean_is_the_first_moment_and_infinite_where_there_is_none(prior, mean):
    # 1e-12: one integral over the scale.
    assert prior.mean == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    "prior",
    [
        InverseGamma(1.7),
        BurrXII(0.4, 2.0),
        HalfCauchy(3.0),
        UserInverseGamma(),
        HalfStudentT(3.5, 0.1),
        Mixture([InverseGamma(1.7), GIG()]),
    ],
    ids=repr,
)
def test_the_tail_index_is_the_slope_of_the_density_far_out(prior):
    s = torch.tensor([1e80, 1e90])
    value = prior.log_prob(s)
    slope = ((value[0] - value[1]) / (10 * math.log(10))).item() - 1
    assert prior.tail_index == pytest.approx(slope, abs=1e-10)


def test_light_tails_have_an_infinite_index():
    class Exponential(ScalePrior):
        def log_prob(self, s):
            return -s

    for prior in (LogNormal(), gp.LogNormal(), Gamma(), HalfNormal(), GIG()):
        assert prior.tail_index == math.inf
    assert Exponential().tail_index == math.inf
    assert Exponential().mean == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    "prior",
    [
        InverseGamma(1.7, 3.0),
        BurrXII(2.0, 1.0, 0.1),
        HalfCauchy(3.0),
        UserInverseGamma(),
        gp.LogNormal(0.4, 2.5),
        Gamma(1.5, 0.5),
        HalfNormal(3.0),
        HalfStudentT(3.5, 0.1),
        GIG(-0.7, 1.2, 0.8),
        Mixture([HalfNormal(3.0), GIG()], [1, 2], 0.3),
    ],
    ids=repr,
)
def test_rescaling_by_c_gives_the_law_of_c_times_s(prior):
    c, s = 3.7, torch.logspace(-3, 3, 20)
    scaled = copy.deepcopy(prior)
    scaled.rescale(c)
    torch.testing.assert_close(scaled.log_prob(s), prior.log_prob(s / c) - math.log(c), rtol=1e-13, atol=1e-13)


def test_rescaling_needs_a_scale_parameter():
    with pytest.raises(TypeError, match="LogNormal declares no scale parameter"):
        LogNormal().rescale(2.0)


def test_fits_learn_the_scale_and_keep_the_shapes():
    learned = {
        type(p).__name__: [n for n, t in p.named_parameters() if t.requires_grad]
        for p in (Delta(), InverseGamma(), BurrXII(), HalfCauchy(), gp.LogNormal(), Gamma(), HalfNormal())
    }
    for prior in (HalfStudentT(), GIG(), Mixture([Delta(), HalfCauchy()])):
        expected = f"log_{prior.scale_name}"
        assert [n for n, t in prior.named_parameters() if t.requires_grad] == [expected]
    assert learned == {
        "Delta": ["log_value"],
        "InverseGamma": ["log_b"],
        "BurrXII": ["log_scale"],
        "HalfCauchy": ["log_t"],
        "LogNormal": ["log_median"],
        "Gamma": ["log_b"],
        "HalfNormal": ["log_t"],
    }
    prior = InverseGamma()
    assert prior.has_scale
    prior.log_b.requires_grad_(False)
    assert not prior.has_scale
    assert not LogNormal().has_scale


def test_numbers_are_set_through_properties_and_stay_float64():
    prior = InverseGamma().float().double()
    prior.b = 5
    assert prior.log_b.dtype == torch.float64
    # exp(log(5)): two roundings.
    assert prior.b.item() == pytest.approx(5, rel=4 * EPS)
    assert repr(prior) == "InverseGamma(a=2, b=5)"


def test_a_point_mass_has_no_density():
    with pytest.raises(TypeError, match="point mass"):
        Delta().log_prob(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InverseGamma(a=0.0), "a must be positive and finite; got 0.0"),
        (lambda: InverseGamma(b=-1.0), "b must be positive and finite; got -1.0"),
        (lambda: BurrXII(c=math.nan), "c must be positive"),
        (lambda: BurrXII(d=-2.0), "d must be positive"),
        (lambda: BurrXII(scale=math.inf), "scale must be positive"),
        (lambda: HalfCauchy(t=0), "t must be positive"),
        (lambda: Delta(-0.5), "value must be positive"),
        (lambda: gp.LogNormal(v=0.0), "v must be positive and finite; got 0.0"),
        (lambda: gp.LogNormal(m=math.nan), "m must lie between -700 and 700; got nan"),
        (lambda: gp.LogNormal(m=701.0), "m must lie between -700 and 700; got 701.0"),
        (lambda: Gamma(a=-1.0), "a must be positive"),
        (lambda: Gamma(b=0), "b must be positive"),
        (lambda: HalfNormal(t=-2.0), "t must be positive"),
        (lambda: HalfStudentT(df=0.0), "df must be positive"),
        (lambda: HalfStudentT(t=math.inf), "t must be positive"),
        (lambda: GIG(p=math.nan), "p must be at most 1e12 in size; got nan"),
        (lambda: GIG(p=2e12), "p must be at most 1e12 in size"),
        (lambda: GIG(a=0.0), "a must be positive and finite; got 0.0"),
        (lambda: GIG(b=-1.0), "b must be positive and finite; got -1.0"),
        (lambda: GIG(a=1e-150, b=1e-150), "product of a and b must lie between 1e-200 and 1e200"),
        (lambda: Mixture([]), "components must hold at least one prior; got none"),
        (lambda: Mixture([Delta()], [1, 2]), "weights must be one a component, 1; got 2"),
        (lambda: Mixture([Delta(), Gamma()], [1, 0]), "weights must be positive and finite; got 0"),
        (lambda: Mixture([Delta()], scale=-1.0), "scale must be positive"),
        (lambda: InverseGamma().rescale(0.0), "factor must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bad_input
def test_a_number_must_be_a_number():
    with pytest.raises(TypeError, match="a must be a number; got 'two'"):
        InverseGamma(a="two")
    with pytest.raises(TypeError, match="scale_prior must be a ScalePrior or one of"):
        as_scale_prior(3)
    with pytest.raises(TypeError, match="components must be a sequence of priors; got Delta"):
        Mixture(Delta())
    with pytest.raises(TypeError, match="components must be priors of the scale; got str"):
        Mixture(["delta"])
    with pytest.raises(TypeError, match="weights must be a sequence of numbers; got int"):
        Mixture([Delta()], 5)
    with pytest.raises(TypeError, match="p must be a number; got 'one'"):
        GIG(p="one")
    with pytest.raises(ValueError, match=r"config must be what config\(\) of a prior returned; got 3"):
        scale_prior_from_config(3)


def test_names_stand_for_priors():
    assert isinstance(as_scale_prior("delta"), Delta)
    assert isinstance(as_scale_prior("burr_xii"), BurrXII)
    assert isinstance(as_scale_prior("half_cauchy"), HalfCauchy)
    assert isinstance(as_scale_prior("half_normal"), HalfNormal)
    assert isinstance(as_scale_prior("half_student_t"), HalfStudentT)
    assert isinstance(as_scale_prior("log_normal"), gp.LogNormal)
    assert isinstance(as_scale_prior("gamma"), Gamma)
    assert isinstance(as_scale_prior("gig"), GIG)
    prior = InverseGamma(3.0)
    assert as_scale_prior(prior) is prior
    with pytest.raises(ValueError, match="'half_student_t', 'inverse_gamma', 'log_normal'; got 'cauchy'"):
        as_scale_prior("cauchy")


@pytest.mark.parametrize(
    "prior",
    [
        Delta(0.3),
        InverseGamma(3.0, 0.1),
        BurrXII(0.3, 2.0, 7.0),
        HalfCauchy(0.2),
        gp.LogNormal(-3.0, 0.2),
        Gamma(3.0, 0.1),
        HalfNormal(0.2),
        HalfStudentT(7.0, 0.2),
        GIG(0.3, 2.0, 7.0),
    ],
    ids=repr,
)
def test_copies_pickles_and_configs_are_the_same_prior(prior):
    twins = [copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), scale_prior_from_config(prior.config())]
    fresh = type(prior)()
    fresh.load_state_dict(prior.state_dict())
    for twin in [*twins, fresh]:
        assert repr(twin) == repr(prior)
        assert [t.requires_grad for t in twin.parameters()] == [t.requires_grad for t in prior.parameters()]


def test_only_priors_of_the_library_have_a_config():
    class Mine(InverseGamma):
        pass

    for prior in (LogNormal(), Mine()):
        with pytest.raises(TypeError, match="cannot be saved"):
            prior.config()
    with pytest.raises(ValueError, match="config must have a class among BurrXII, Delta"):
        scale_prior_from_config({"class": "Levy"})
    with pytest.raises(ValueError, match="not its own"):
        scale_prior_from_config({"class": "HalfCauchy", "b": 1.0})


def test_a_subclass_with_its_own_density_gives_up_closed_forms():
    class Mine(InverseGamma):
        def log_prob(self, s):
            return LogNormal().log_prob(s)

    quad = torch.tensor(3.0)
    assert log_evidence(Mine(), 4, quad).item() == log_evidence(LogNormal(), 4, quad).item()
    assert Mine().mean == pytest.approx(math.exp(0.5), rel=1e-12)
    assert not Mine().has_scale


def test_a_density_that_is_nan_infinite_or_misshapen_is_refused():
    class Broken(ScalePrior):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def log_prob(self, s):
            return torch.where(s > 1, self.value, -s) if self.value is not None else torch.zeros(3)

    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be below infinity and not NaN"):
            log_evidence(Broken(value), 4, torch.tensor(3.0))
    with pytest.raises(ValueError, match="one value an entry"):
        log_evidence(Broken(None), 4, torch.tensor(3.0))

    class Number(ScalePrior):
        def log_prob(self, s):
            return 0.0

    with pytest.raises(TypeError, match=r"Number\.log_prob must return a tensor; got float"):
        log_evidence(Number(), 4, torch.tensor(3.0))
    with pytest.raises(NotImplementedError, match="must define log_prob"):
        ScalePrior().log_prob(torch.ones(1))
