import pytest
import torch

from stochproc.solvers import brownian_increments, integrate
from tests.solvers.sde_examples import Equation, ExactOrnsteinUhlenbeck, Neural, geometric

Y0 = torch.ones(3, 2, dtype=torch.float64)
TS = [0.0, 1.0]


def equation(**attributes):
    made = geometric()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def without(name):
    made = geometric()
    delattr(made, name)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "milstein"},
            "'euler', 'heun', 'step' with backend='scan'; got 'milstein', which backend='torchsde'",
        ),
        ({"method": "nonsense"}, "method must be one of 'euler', 'heun', 'step' with backend='scan'; got 'nonsense'"),
        ({"method": "nonsense", "backend": "torchsde"}, "method must be one of 'euler', 'milstein', .* got 'nonsense'"),
        ({"method": "step", "backend": "torchsde"}, "got 'step', which needs backend='scan'"),
        ({"backend": "jax"}, "backend must be one of 'scan', 'torchsde'; got 'jax'"),
        ({"dt": 0.0}, "dt must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1; got 0"),
        ({"adjoint": True}, "adjoint must be False with backend='scan'"),
        ({"method": "heun"}, "method 'heun' does not solve .* 'ito' .*: use 'euler', or .*'milstein', 'srk'"),
        ({"method": "midpoint", "backend": "torchsde"}, "method 'midpoint' does not solve .*: use 'euler'"),
    ],
)
def test_rejects_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        integrate(geometric(), Y0, TS, **options)


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_rejects_ito_methods_for_stratonovich_equations(method):
    with pytest.raises(ValueError, match=f"method '{method}' does not solve .* 'stratonovich' .*: use 'heun'"):
        integrate(geometric(sde_type="stratonovich"), Y0, TS, method=method, backend="torchsde")


@pytest.mark.parametrize("method", ["milstein", "srk"])
def test_rejects_general_noise_where_a_method_has_none(method):
    with pytest.raises(ValueError, match=f"method '{method}' needs diagonal, scalar or additive noise"):
        integrate(Neural(2, "general"), Y0, TS, method=method, backend="torchsde")


@pytest.mark.parametrize("backend", ["scan", "torchsde"])
def test_additive_noise_is_served_by_methods_of_either_reading(backend):
    for method in ("euler", "heun"):
        for sde_type in ("ito", "stratonovich"):
            assert integrate(Neural(2, "additive", sde_type), Y0, TS, dt=0.5, method=method, backend=backend).ok


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (without("drift"), "sde must have drift; got Equation without it"),
        (without("diffusion"), "sde must have diffusion"),
        (without("noise_type"), "sde must have noise_type"),
        (without("sde_type"), "sde must have sde_type"),
        (ExactOrnsteinUhlenbeck(2), "its own step is method='step'"),
        (equation(drift=lambda t, y: 0.0), "sde.drift must return a torch.Tensor; got float"),
        (equation(diffusion=lambda t, y: 1.0), "sde.diffusion must return a torch.Tensor; got float"),
        (
            equation(drift=lambda t, y: y.float()),
            "sde.drift must return torch.float64 on cpu, like y0; got torch.float32",
        ),
    ],
)
def test_rejects_an_equation_that_lacks_something(sde, message):
    with pytest.raises(TypeError, match=message):
        integrate(sde, Y0, TS)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (equation(noise_type="white"), "sde.noise_type must be one of 'diagonal', .*; got 'white'"),
        (equation(sde_type="Ito"), "sde.sde_type must be one of 'ito', 'stratonovich'; got 'Ito'"),
        (equation(drift=lambda t, y: y[:, :1]), r"sde.drift must return the shape of y, \(3, 2\); got \(3, 1\)"),
        (equation(diffusion=lambda t, y: y[0]), r"sde.diffusion must return \(3, 2\) for diagonal noise; got \(2,\)"),
        (
            equation(noise_type="scalar", diffusion=lambda t, y: y),
            r"sde.diffusion must return \(3, 2, 1\) for scalar noise; got \(3, 2\)",
        ),
        (
            equation(noise_type="general", diffusion=lambda t, y: y),
            r"sde.diffusion must return \(3, 2\) and one more axis for general noise; got \(3, 2\)",
        ),
        (
            equation(noise_type="additive", diffusion=lambda t, y: torch.ones(2, 4)),
            r"sde.diffusion must return \(3, 2\) and one more axis for additive noise; got \(2, 4\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["scan", "torchsde"])
def test_rejects_shapes_and_kinds_that_do_not_fit(sde, message, backend):
    with pytest.raises(ValueError, match=message):
        integrate(sde, Y0, TS, backend=backend)


class InPlace(ExactOrnsteinUhlenbeck):
    def step(self, t, y, h, noise):
        return y.add_(h * noise)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}])
@pytest.mark.parametrize("inference", [False, True])
def test_rejects_an_own_step_in_place_and_leaves_the_start_alone(inference, options):
    with torch.inference_mode(inference):
        y0 = torch.ones(3, 2)
        with pytest.raises(ValueError, match=r"sde\.step must not change y in place"):
            integrate(InPlace(2), y0, TS, dt=0.25, method="step", **options)
        assert torch.equal(y0, torch.ones(3, 2))


def test_rejects_an_own_step_in_place_where_it_happens():
    class Late(ExactOrnsteinUhlenbeck):
        def step(self, t, y, h, noise):
            return y.mul_(2) if t >= 0.5 else y + h * noise

    with pytest.raises(ValueError, match=r"sde\.step must not change y in place"):
        integrate(Late(2), Y0, TS, dt=0.25, method="step")


@pytest.mark.parametrize("inference", [False, True])
def test_own_step_may_return_its_argument(inference):
    class Still(ExactOrnsteinUhlenbeck):
        def step(self, t, y, h, noise):
            return y

    with torch.inference_mode(inference):
        result = integrate(Still(2), Y0, TS, dt=0.25, method="step")
    assert result.ok
    assert torch.equal(result.value[-1], Y0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["drift", "diffusion"])
@pytest.mark.parametrize("backend", ["scan", "torchsde"])
def test_rejects_a_drift_or_diffusion_in_place_and_leaves_the_start_alone(name, inference, backend):
    y0 = Y0.clone()
    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match=rf"sde\.{name} must not change y in place"),
    ):
        integrate(equation(**{name: lambda t, y: y.mul_(0.5)}), y0, TS, backend=backend)
    assert torch.equal(y0, Y0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejects_a_start_that_is_not_finite(bad):
    y0 = Y0.clone()
    y0[1, 0] = bad
    with pytest.raises(ValueError, match=r"y0 must be finite; got 1 NaN or infinite entries, .* index \(1, 0\)"):
        integrate(geometric(), y0, TS)


@pytest.mark.bad_input
def test_rejects_steps_of_several_sizes_and_takes_a_tensor_of_one():
    with pytest.raises(ValueError, match=r"dt must be a single number; got a tensor of shape \(2,\)"):
        integrate(geometric(), Y0, TS, dt=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="dt must be positive and finite; got nan"):
        integrate(geometric(), Y0, TS, dt=torch.tensor(torch.nan))
    assert integrate(geometric(), Y0, TS, dt=torch.tensor(0.25)).stats["n_steps"] == 4


def test_rejects_an_own_step_without_its_noise_shape():
    class Bare:
        def step(self, t, y, h, noise):
            return y

    with pytest.raises(TypeError, match="sde must have noise_shape"):
        integrate(Bare(), Y0, TS, method="step")
    with pytest.raises(TypeError, match="sde must have step; got Equation"):
        integrate(geometric(), Y0, TS, method="step")
    sde = Bare()
    sde.noise_shape = (2.5,)
    with pytest.raises(ValueError, match=r"sde\.noise_shape must be a tuple of sizes"):
        integrate(sde, Y0, TS, method="step")


@pytest.mark.parametrize("wrong", [lambda y: y[:, :1], lambda y: y.float()])
def test_rejects_an_own_step_of_the_wrong_shape_or_dtype_where_it_happens(wrong):
    class Late(ExactOrnsteinUhlenbeck):
        def step(self, t, y, h, noise):
            return wrong(y) if t >= 0.5 else y

    with pytest.raises(ValueError, match=r"sde.step must return a tensor of shape \(3, 2\) .* at t = 0.5"):
        integrate(Late(2), Y0, TS, dt=0.25, method="step")


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (torch.zeros(10, 3, 1, dtype=torch.float64), r"\(10, 3, 2\); got \(10, 3, 1\)"),
        (torch.zeros(9, 3, 2, dtype=torch.float64), r"\(10, 3, 2\); got \(9, 3, 2\)"),
        (torch.zeros(10, 2, dtype=torch.float64), r"\(10, 3, 2\); got \(10, 2\)"),
    ],
)
@pytest.mark.parametrize("backend", ["scan", "torchsde"])
def test_rejects_noise_of_another_shape_and_names_the_right_one(noise, expected, backend):
    with pytest.raises(ValueError, match=r"noise must have shape \(n_steps, \*batch, m\) = " + expected):
        integrate(geometric(), Y0, TS, dt=0.1, noise=noise, backend=backend)


def test_rejects_noise_of_another_shape_for_an_own_step():
    with pytest.raises(ValueError, match=r"\(n_steps, \*batch, \*noise_shape\) = \(10, 3, 2\); got \(10, 3\)"):
        integrate(ExactOrnsteinUhlenbeck(2), Y0, TS, dt=0.1, method="step", noise=torch.zeros(10, 3))


def test_rejects_mixed_dtypes():
    with pytest.raises(TypeError, match=r"mixed dtypes: y0 is torch\.float64, noise is torch\.float32"):
        integrate(geometric(), Y0, TS, noise=torch.zeros(1, 3, 2, dtype=torch.float32))


@pytest.mark.cuda
def test_rejects_mixed_devices():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    with pytest.raises(TypeError, match="mixed devices"):
        integrate(geometric(), Y0, TS, noise=torch.zeros(1, 3, 2, device="cuda"))


@pytest.mark.bad_input
@pytest.mark.parametrize("y0", [torch.ones(3, 2, dtype=torch.int64), [1.0], 1.0, torch.ones(2, dtype=torch.float16)])
def test_rejects_a_start_that_is_no_floating_tensor(y0):
    with pytest.raises(TypeError, match="y0 must be"):
        integrate(geometric(), y0, TS)


@pytest.mark.bad_input
def test_rejects_a_start_without_axes():
    with pytest.raises(ValueError, match=r"y0 must have shape \(\*batch, d\)"):
        integrate(geometric(), torch.tensor(1.0), TS)


@pytest.mark.bad_input
@pytest.mark.parametrize("every", [2.0, True])
def test_rejects_checkpoints_that_are_no_count(every):
    with pytest.raises(TypeError, match="checkpoint_every must be an integer"):
        integrate(geometric(), Y0, TS, checkpoint_every=every)


@pytest.mark.bad_input
def test_rejects_times_whose_batch_does_not_fit():
    ts = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    with pytest.raises(ValueError, match=r"ts must have a batch that broadcasts to \(3,\), that of y0; got \(2,\)"):
        integrate(geometric(), Y0, ts)
    with pytest.raises(ValueError, match=r"shape must start with a batch to which \(2,\)"):
        brownian_increments(ts, (3, 2))


def test_rejects_own_times_with_torchsde():
    with pytest.raises(ValueError, match=r"ts must have shape \(n_times,\) with backend='torchsde'"):
        integrate(geometric(), Y0, torch.tensor([[0.0, 1.0]] * 3), backend="torchsde")


def test_rejects_an_adjoint_that_cannot_be():
    with pytest.raises(TypeError, match=r"sde must be a torch.nn.Module with adjoint=True; got Equation"):
        integrate(geometric(), Y0, TS, backend="torchsde", adjoint=True)
    options = {"backend": "torchsde", "adjoint": True}
    with pytest.raises(ValueError, match="checkpoint_every must be None with adjoint=True; got 2"):
        integrate(Neural(2), Y0, TS, checkpoint_every=2, **options)
    noise = torch.zeros(1, 3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="noise must not require gradients with adjoint=True"):
        integrate(Neural(2), Y0, TS, noise=noise, **options)


def test_nothing_is_evaluated_before_the_times_are_checked():
    def fail(t, y):
        raise AssertionError

    with pytest.raises(ValueError, match="ts must be strictly increasing"):
        integrate(Equation(fail, fail), Y0, [1.0, 0.0])
