"""Formulas of infinite networks: their C++ against torch, how long they are, and one whole network through KeOps."""

import dataclasses

import pytest
import torch

from stochproc.gp import arch
from stochproc.kernels import KeopsPair, Pair, keops_status, matvec
from stochproc.kernels._duals import ABRelu, Cos, Erf, Exp, Gelu, Numeric, Rbf, Relu, Sign, Sin
from stochproc.kernels._keops_program import digest_of, parse, text_of, value_code
from stochproc.kernels._keops_snippets import SNIPPETS
from tests.kernels.native_code import compiled, function, matrix

DUALS = {
    "relu": Relu(),
    "abrelu": ABRelu(-0.5, 2.0),
    "sign": Sign(),
    "erf": Erf(),
    "gelu": Gelu(),
    "sin": Sin(0.7),
    "cos": Cos(),
    "rbf": Rbf(0.5),
    "exp": Exp(),
}
SLOPES = [name for name in DUALS if name != "sign"]
# Sums of a handful of terms, all of one sign or of the size of the largest.
VALUE = {torch.float64: 1e-14, torch.float32: 2e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-4}


def behind(dual, pair, w2, b2):
    return pair.affine(w2, b2).through(dual).q


def slope(dual, pair, w2, b2):
    return pair.affine(w2, b2).slope(dual)


def network(pair, zero, w2, b2):
    """Tangent kernel of a network with every kind of instruction, a branch that is used twice among them."""
    tangent, pair = zero * w2 + pair.q, pair.affine(w2, b2)
    short = pair.affine(0.5, 0.0)
    tangent, pair = tangent * pair.slope(Gelu()), pair.through(Gelu()).affine(w2, b2)
    tangent = tangent * w2 + pair.q
    pair = pair.plus(short)
    if isinstance(pair, Pair):
        # Layer normalisation as gp.arch writes it on tensors.
        pair, factor = arch.LayerNorm(0.1)._normalised(pair)
    else:
        pair, factor = pair.normalised(0.1)
    return tangent * factor + pair.through(Erf()).affine(w2, 0.0).q


def points(dtype, near):
    """Ordinary pairs; with ``near`` equal, collinear, opposite and almost equal points and the origin among them."""
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=gen) / 2 for n in (6, 3))
    if near:
        close = x[4:5] + 1e-6 * torch.randn(1, 4, generator=gen)
        y = torch.cat([y, x[:1], 2 * x[1:2], -x[2:3], close, torch.zeros(1, 4)])
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def numbers():
    return torch.tensor(1.3, requires_grad=True), torch.tensor(0.2, requires_grad=True)


def cases():
    """Name: what to evaluate, dtype, whether at nearly equal points."""
    for dtype in (torch.float64, torch.float32):
        bits = torch.finfo(dtype).bits
        # The slope of a rectifier and the sign change like the root of the distance: their gradient is unbounded.
        for name, dual in DUALS.items():
            yield f"{name}_{bits}", lambda p, z, *n, dual=dual: behind(dual, p, *n), dtype, name != "sign"
        for name in SLOPES:
            smooth = "relu" not in name
            yield f"slope_{name}_{bits}", lambda p, z, *n, name=name: slope(DUALS[name], p, *n), dtype, smooth
        yield f"network_{bits}", network, dtype, True


CASES = {name: case for name, *case in cases()}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """All cases, compiled at once: some 10 s."""
    sources = []
    for name, (evaluate, dtype, near) in CASES.items():
        pair = KeopsPair.from_points(*points(dtype, near))
        sources.append(function(name, evaluate(pair, pair.zero, *numbers()), dtype))
    return compiled(sources, tmp_path_factory.mktemp("native"))


@pytest.mark.keops
@pytest.mark.parametrize("name", CASES)
def test_the_code_of_a_formula_gives_the_numbers_and_gradients_of_torch(native, name):
    evaluate, dtype, near = CASES[name]
    results = []
    for kind in (KeopsPair, Pair):
        x, y = points(dtype, near)
        w2, b2 = numbers()
        pair = kind.from_points(x, y)
        zero = pair.zero if kind is KeopsPair else torch.zeros((), dtype=dtype)
        value = evaluate(pair, zero, w2, b2)
        value = matrix(native, name, value) if kind is KeopsPair else value
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(value, (x, y, w2, b2), weights, materialize_grads=True)
        results.append((value.detach(), *grads))
    (got, *found), (want, *wanted) = results
    torch.testing.assert_close(got, want, rtol=VALUE[dtype], atol=VALUE[dtype] * want.abs().max().item())
    for grad, reference in zip(found, wanted, strict=True):
        # Sums over up to 48 pairs of both signs, hence against the size of the terms.
        scale = max(reference.abs().max().item(), want.abs().max().item())
        torch.testing.assert_close(grad, reference, rtol=GRADIENT[dtype], atol=GRADIENT[dtype] * scale)


def deep(depth, dual=None, *, shortcut=False):
    """A formula of ``depth`` layers, traced but not compiled."""
    dual = dual or Relu()
    pair = KeopsPair.from_points(torch.ones(2, 3), torch.ones(2, 3))
    for _ in range(depth):
        after = pair.affine(*numbers()).through(dual)
        pair = pair.plus(after) if shortcut else after
    return pair.q


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("name", [name for name in DUALS if name != "exp"])
def test_text_and_code_of_a_formula_are_linear_in_depth(name, shortcut):
    programs = {depth: deep(depth, DUALS[name], shortcut=shortcut).program for depth in (5, 10, 20)}
    for length in (
        lambda p: len(text_of(p)),
        lambda p: len(value_code(p, "double", ("x", "y", "p"), "out")),
    ):
        small, medium, large = (length(p) for p in programs.values())
        # Twice as many layers add twice as much; numbers of two digits take one letter more than those of one.
        assert large - medium < 2.2 * (medium - small)
    assert len(programs[20]) == 2 + 20 * (3 if shortcut else 2)


def test_each_dual_is_one_instruction():
    program = deep(4, Gelu()).program
    assert [step.name for step in program] == ["points", *["affine", "gelu"] * 4, "value"]


def test_a_program_is_read_back_from_its_text():
    program = deep(3, Sin(0.3), shortcut=True).program
    assert parse(text_of(program)) == program


def test_a_changed_snippet_changes_the_text_so_that_no_old_binary_is_used(monkeypatch):
    program = deep(1, Rbf()).program
    before = digest_of(program)
    changed = dataclasses.replace(SNIPPETS["rbf"], step="Dn = 0; An = A;")
    monkeypatch.setitem(SNIPPETS, "rbf", changed)
    digest_of.cache_clear()
    assert digest_of(program) != before
    digest_of.cache_clear()


def test_tied_weights_and_constants_of_one_dual_are_handed_over_once():
    pair, (w2, b2) = KeopsPair.from_points(torch.ones(2, 3), torch.ones(2, 3)), numbers()
    for _ in range(5):
        pair = pair.affine(w2, b2).through(Relu())
    # w^2, b^2, and three constants of the rectifier.
    assert pair.q.variables()[2].shape == (5,)


def test_norms_are_those_of_the_pair_of_tensors():
    x, y = points(torch.float64, near=True)
    made = [kind.from_points(x, y).affine(1.3, 0.2).through(Gelu()).affine(0.7, 0.0) for kind in (KeopsPair, Pair)]
    assert torch.equal(made[0].r1, made[1].r1)
    assert torch.equal(made[0].r2, made[1].r2)


def test_quadrature_and_functions_of_ones_own_have_no_formula():
    class Mine(Relu):
        pass

    pair = KeopsPair.from_points(torch.ones(2, 3), torch.ones(2, 3))
    for dual in (Numeric(torch.tanh), Mine()):
        assert not dual.has_formula
        with pytest.raises(NotImplementedError, match=f"{type(dual).__name__} has no KeOps formula"):
            pair.through(dual)
    assert all(dual.has_formula for dual in DUALS.values())


def test_what_torch_refuses_a_formula_refuses_too():
    pair = KeopsPair.from_points(torch.ones(2, 3), 1e60 * torch.ones(2, 3))
    with pytest.raises(ValueError, match="Sign has no tangent kernel"):
        pair.slope(Sign())
    with pytest.raises(ValueError, match="Erf: norms must be at most 1e"):
        pair.through(Erf())
    with pytest.raises(ValueError, match="weight_variance must be non-negative"):
        pair.affine(-1.0, 0.0)
    with pytest.raises(ValueError, match="stem from the same from_points"):
        pair.plus(KeopsPair.from_points(torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(NotImplementedError, match="one value of a hyperparameter"):
        pair.affine(torch.ones(2, 1, 1), 0.0)


@pytest.mark.keops
def test_second_derivatives_raise_instead_of_being_wrong():
    from keopscore.formulas import Var

    from stochproc.kernels._keops_operations import _operations

    program = deep(1).program
    text, digest = text_of(program), digest_of(program)
    rows, cols, parameters, g = Var(0, 7, 0), Var(1, 7, 1), Var(2, 5, 2), Var(3, 1, 0)
    formula = _operations()[0](rows, cols, parameters, text, digest)
    first = formula.DiffT(rows, g)
    assert first.dim == 7
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        first.DiffT(rows, first)


@pytest.mark.keops
@pytest.mark.slow
def test_a_network_through_keops_equals_the_row_blocks(gen):
    if keops_status(torch.float64) is not None:
        pytest.skip("KeOps cannot be used here")
    net = arch.serial(
        arch.Dense(1.4, 0.2),
        arch.Relu(),
        arch.LayerNorm(0.1),
        arch.residual(arch.Gelu(), arch.Dense(1.2)),
        arch.Dense(),
    )
    kernel = arch.NetworkKernel(net, "ntk").requires_grad_(False)
    x, y, v = (torch.randn(*s, generator=gen) for s in ((30, 3), (20, 3), (20, 2)))
    results = []
    for backend in ("keops", "chunked"):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = matvec(kernel, *leaves, v, backend=backend, strict=True)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out.detach(), *torch.autograd.grad(out, leaves, weights)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize(
    ("layers", "kind", "found"),
    [
        ((arch.Dense(1.4, 0.2), arch.Erf(), arch.Scale(2.0), arch.LayerNorm(), arch.Identity()), "ntk", True),
        ((arch.residual(arch.Relu(), arch.Dense()),), "ntk", True),
        ((arch.Relu(),), "nngp", True),
        ((arch.Relu(),), "ntk", False),
        ((arch.Dense(), arch.Dropout(0.9)), "nngp", False),
        ((arch.Dense(), arch.branches(arch.Relu(), arch.Numeric(torch.tanh))), "nngp", False),
    ],
)
def test_a_network_has_a_formula_if_all_its_layers_have(layers, kind, found):
    kernel = arch.NetworkKernel(arch.serial(*layers), kind)
    assert kernel.has_formula is found
    if not found:
        with pytest.raises(NotImplementedError, match="has no KeOps formula"):
            kernel.formula(torch.ones(2, 3), torch.ones(2, 3))
