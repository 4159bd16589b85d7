"""Kernels of infinitely wide networks at 50 digits, by the textbook recursion on three covariances and a tangent."""

import mpmath as mp

from stochproc.gp import arch
from tests.kernels import dual_reference as ref


def forms(layer):
    """E f(u) f(v) and E f'(u) f'(v) of an activation."""
    dual = layer.dual
    if isinstance(layer, arch.ABRelu):
        return ref.ab_relu(dual.a, dual.b)
    made = {
        arch.Erf: ref.erf,
        arch.Gelu: ref.gelu,
        arch.Cos: ref.cos,
        arch.Exp: ref.exp,
        arch.Sign: ref.sign,
        arch.Sin: lambda: ref.sin(dual.c),
        arch.Rbf: lambda: ref.rbf(dual.gamma),
    }
    return made[type(layer)]()


def through(layer, k):
    """Covariances and tangent behind a layer or network."""
    if isinstance(layer, arch.Serial):
        for part in layer.parts:
            k = through(part, k)
        return k
    if isinstance(layer, arch.Branches):
        return ref.Cov(*map(mp.fsum, zip(*(through(part, k) for part in layer.parts), strict=True)))
    if isinstance(layer, arch.Dense):
        return ref.dense(k, layer.w_std.item() ** 2, layer.b_std.item() ** 2)
    if isinstance(layer, arch.Scale):
        return ref.Cov(*(mp.mpf(layer.s) ** 2 * q for q in k))
    if isinstance(layer, arch.LayerNorm):
        s1, s2 = (mp.sqrt(q + mp.mpf(layer.eps)) for q in (k.q11, k.q22))
        return ref.Cov(k.q11 / s1**2, k.q12 / (s1 * s2), k.q22 / s2**2, k.ntk / (s1 * s2))
    if isinstance(layer, arch.Identity):
        return k
    return ref.activate(k, *forms(layer))


def kernels(net, x, y):
    """Covariances and tangent kernel of two points."""
    q = ref.from_points(x.tolist(), y.tolist())
    return through(net, ref.Cov(*(v / len(x) for v in q[:3])))
