"""What a dual does to a pair, as C++ for KeOps formulas: value, slope and the derivatives of both.

The formulas are those of ``_dual_steps`` and ``_dual_smooth``, where they are explained. A snippet sees the state
before the nonlinearity, ``r1 r2 D A n`` with ``n = r1 r2``, the norms behind it, ``s1 s2``, and the constants ``p0 p1
p2`` of the dual. It is plain C++11 with the functions that both a C++ and a CUDA compiler know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stochproc.kernels._dual_base import Dual
from stochproc.kernels._dual_steps import EXCESS_SERIES, H_SERIES, TERMS_TO_HALF, TERMS_TO_ONE
from stochproc.kernels._duals import ABRelu, Abs, Cos, Erf, Exp, Gelu, LeakyRelu, Rbf, Relu, Sign, Sin

__all__ = ["SNIPPETS", "Snippet", "constants_of", "has_snippet", "name_of", "prelude"]

_DTYPES = {"float": torch.float32, "double": torch.float64}


@dataclass(frozen=True)
class Snippet:
    """C++ of one dual.

    With k the covariance of the pair, k' that behind the nonlinearity and kdot the slope, its derivatives are taken
    at fixed norms (``by_k``) and in the norms at fixed k (``by_r1, by_r2``). These three are all that the adjoint
    of a network needs, whatever state carries the value.

    Parameters
    ----------
    step : str
        Sets ``Dn`` and ``An``, the state behind the nonlinearity.
    slope : str
        Sets ``kdot = E f'(u) f'(v)``; empty if there is none.
    pull : str
        Sets by_k, by_r1, by_r2: derivatives of k'.
    pull_slope : str
        The same of kdot.
    common : dict
        Name and expression of what several of these use, evaluated once a pair where one of them mentions it.
    constants : callable
        Constants p0, p1, ... of a dual of this family.
    behind : bool
        Whether ``step`` or ``pull`` use the norms s1, s2.
    """

    step: str
    slope: str
    pull: str
    pull_slope: str
    common: dict[str, str] = field(default_factory=dict)
    constants: Callable[[Any], tuple[float, ...]] = lambda dual: ()
    behind: bool = True


def _cube_series(coefficients: list[float]) -> str:
    """Odd series of t without its first power, by Horner's rule in y = t^2."""
    out = f"y * real({coefficients[-1]!r})"
    for c in reversed(coefficients[1:-1]):
        out = f"({out} + real({c!r})) * y"
    return f"({out} + real({coefficients[0]!r})) * y * t"


def prelude(dtype: str) -> str:
    """Return the definitions that all snippets share, for ``dtype`` "float" or "double"."""
    half, one = (_DTYPES[dtype] in t and t[_DTYPES[dtype]] for t in (TERMS_TO_HALF, TERMS_TO_ONE))
    return f"""
typedef {dtype} real;
const auto inv0 = [](real z) -> real {{ return z == 0 ? real(0) : 1 / z; }};
const auto sqrt0 = [](real z) -> real {{ return z > 0 ? real(sqrt(z)) : real(0); }};
const auto within = [](real a, real n) -> real {{ return a < 0 ? real(0) : (a > 2 * n ? 2 * n : a); }};
const auto versine = [](real A, real n, real r1, real r2) -> real {{
    if (n == 0) return r1 > 0 || r2 > 0 ? real(0.5) : real(0);
    const real h = A / (2 * n);
    return h < 0 ? real(0) : (h > 1 ? real(1) : h);
}};
const auto chord = [](real t) -> real {{
    const real y = t * t;
    return t < real(0.5) ? {_cube_series(H_SERIES[:half])} : real(sin(t) - t * cos(t));
}};
const auto excess = [](real t) -> real {{
    const real y = t * t;
    return t < 1 ? {_cube_series(EXCESS_SERIES[:one])} : real(t - sin(t));
}};
"""


# Arcs of the pair with covariances scaled by `sc` and the defect AA; see `_dual_steps._arcs`.
_ARCS = """
const real t1 = sc * r1 * r1, t2 = sc * r2 * r2, m = sc * n, a = sc * AA;
const real det = a * (2 * m - a), q = m - a;
const real c1 = sqrt(1 + 2 * t1), c2 = sqrt(1 + 2 * t2), total = c1 + c2;
const real dc = 2 * sc * (D * (r1 + r2)) / total, pc = c1 * c2, dc2 = dc * dc;
const real pm = 2 * (t1 + t2 + 2 * t1 * t2) / (pc + 1);
const real g = sqrt(1 + (t1 + t2)), rt = sqrt(g * g + det), p = (1 + t1) * (1 + t2);
const real bend = atan(dc2 * ((pc + 1) * (pc + 1) + dc2) / 4 * inv0(pm * g + m * total) / (total * g + m * pm));
const real tilt = atan(dc / (1 + pc));
const real turn = atan2(q >= 0 ? real(det * inv0(m * rt + q * g) * p) : real(m * rt - q * g), real(g * rt + m * q));
"""

# d angle / d k = -turning at fixed norms; unbounded where it is returned as 0.
_TURNING = "const real turning = inv0(sqrt0(A) * sqrt0(2 * n - A)), cosine = 1 - A * inv0(n);"

_RECTIFIER = Snippet(
    step="Dn = p2 * D; An = within(p0 * A - p1 * n * chord(angle), p0 * n);",
    slope="kdot = p0 - p1 * angle;",
    pull="""
const real h = versine(A, n, r1, r2), side = p1 * 2 * sqrt(h * (1 - h));
by_k = p0 - p1 * angle; by_r1 = side * r2; by_r2 = side * r1;""",
    pull_slope=f"{_TURNING} by_k = p1 * turning; by_r1 = -by_k * cosine * r2; by_r2 = -by_k * cosine * r1;",
    common={"angle": "2 * asin(sqrt(versine(A, n, r1, r2)))"},
    constants=lambda dual: (dual._c, dual._g, math.sqrt(dual._c)),
    behind=False,
)

_SIGN = Snippet(
    step=f"Dn = s1 - s2; An = real({2 / math.pi!r}) * angle * (s1 * s2);",
    slope="",
    pull=f"""
{_TURNING}
by_k = real({2 / math.pi!r}) * turning * s1 * s2; by_r1 = -by_k * cosine * r2; by_r2 = -by_k * cosine * r1;""",
    pull_slope="",
    common={"angle": "2 * asin(sqrt(versine(A, n, r1, r2)))"},
)

_ERF = Snippet(
    step=f"""
const real sc = 2, AA = A;
{_ARCS}
Dn = real({4 / math.pi!r}) * tilt * inv0(s1 + s2);
An = within(real({2 / math.pi!r}) * (bend + turn) - Dn * Dn / 2, s1 * s2);""",
    slope=f"kdot = real({4 / math.pi!r}) / wide;",
    pull=f"""
const real f = real({4 / math.pi!r}) / wide, k = n - A;
by_k = f; by_r1 = -2 * f * k * (r1 / (1 + 2 * r1 * r1)); by_r2 = -2 * f * k * (r2 / (1 + 2 * r2 * r2));""",
    pull_slope=f"""
const real f = real({8 / math.pi!r}) / wide / wide / wide;
by_k = 2 * f * (n - A); by_r1 = -f * r1 * (1 + 2 * r2 * r2); by_r2 = -f * r2 * (1 + 2 * r1 * r1);""",
    common={"wide": "sqrt(1 + 2 * (r1 * r1 + r2 * r2) + 4 * (A * (2 * n - A)))"},
)

_TWO_PI = repr(2 * math.pi)
_GELU_PARTS = "const real k = n - A, q1 = r1 * r1, q2 = r2 * r2, o1 = 1 / (1 + q1), o2 = 1 / (1 + q2);"

_GELU = Snippet(
    step=f"""
const real sc = 1, AA = A < 2 * n - A ? A : 2 * n - A;
{_ARCS}
const real share = (t1 / (1 + t1)) * (t2 / (1 + t2)), gap = D * (r1 + r2), flat = atan(n / g);
const real rational = dc2 * (
    (3 * pc + dc2 / 2) / (pc * g * (g * total + 2 * pc))
    + total * ((total * g + 2 * g * g + pc + 1) / p) / (2 * (c1 + g) * (c2 + g)) - 1 / (total + 2 * g));
const real radial = (t1 + t2) * bend + gap * tilt + D * D * flat + rational;
const real joined = (1 / p + share / (g * (rt + g))) / rt
    + (q * (g * g / p) - share * (rt / (rt + g)) * AA) * inv0(n * rt + q * g);
const real drop = AA * flat + q * excess(turn) + det * joined;
const real even = dc * pm * (1 / pc + 1 / p) + gap * (flat + bend) + (t1 + t2) * tilt;
Dn = (gap / 4 + even / real({_TWO_PI})) * inv0(s1 + s2);
An = within(((2 * A + D * D) / 4 + (radial + 2 * drop) / real({_TWO_PI}) - Dn * Dn) / 2, s1 * s2);""",
    slope=f"""
{_GELU_PARTS}
kdot = real(0.25) + (atan2(k, wide) + k / wide * (1 / wide / wide + (2 + (q1 + q2)) * o1 * o2)) / real({_TWO_PI});""",
    # The square of k over p and over wide^2 is at most 1, in this order of the factors.
    pull=f"""
{_GELU_PARTS}
const real ratio = 1 / wide / wide + (2 + (q1 + q2)) * o1 * o2, det = A * (2 * n - A);
by_k = real(0.25) + (atan2(k, wide) + k / wide * ratio) / real({_TWO_PI});
const real both = det / (2 * wide) - k / wide * (k * o1 * o2 + k / wide / wide / 2);
by_r1 = r1 * o1 * (both + o1 * (q2 * o2) * wide) / real({math.pi!r});
by_r2 = r2 * o2 * (both + o2 * (q1 * o1) * wide) / real({math.pi!r});""",
    pull_slope=f"""
{_GELU_PARTS}
const real ratio = 1 / wide / wide + (2 + (q1 + q2)) * o1 * o2, p = (1 + q1) / wide * ((1 + q2) / wide);
by_k = (1 + p * ratio + 2 * (k / wide) * (k / wide) / wide / wide) / wide / real({_TWO_PI});
const real both = 1 + p * ratio + 2 * p / wide / wide, scale = -k / wide / real({_TWO_PI});
by_r1 = scale * r1 * o1 * (both + 2 * o1); by_r2 = scale * r2 * o2 * (both + 2 * o2);""",
    common={"wide": "sqrt(1 + (r1 * r1 + r2 * r2) + A * (2 * n - A))"},
)

_SIN = Snippet(
    step="""
const real q1 = r1 * r1, q2 = r2 * r2, u = q1 + q2 - s > 0 ? q1 + q2 - s : 0, low = q1 < q2 ? q1 : q2;
const real gap = D * (r1 + r2), size = fabs(gap), sgn = gap > 0 ? 1 : (gap < 0 ? -1 : 0);
const real spread = exp(-low) * expm1(-size);
const real factor = p0 > 0 ? real(1 + p0 * exp(-u)) : real(p1 + p0 * expm1(-u));
Dn = -p0 / 2 * exp(-2 * low) * expm1(-2 * size) * sgn * inv0(s1 + s2);
An = within((-expm1(-s) * factor - p0 / 2 * spread * spread - Dn * Dn) / 2, s1 * s2);""",
    slope="kdot = sine_slope;",
    pull="by_k = sine_slope; by_r1 = -sine_value * r1; by_r2 = -sine_value * r2;",
    pull_slope="by_k = sine_value; by_r1 = -sine_slope * r1; by_r2 = -sine_slope * r2;",
    common={
        "s": "(2 * A + D * D) / 2",
        "sine_value": "(exp(-s) - p0 * exp(s - r1 * r1 - r2 * r2)) / 2",
        # The larger exponential taken out, so that nearly equal ones do not cancel.
        "sine_slope": """(n >= A ? exp(-s) * (p1 + p0 * expm1(-2 * (n - A)))
    : exp(s - r1 * r1 - r2 * r2) * (p1 + expm1(2 * (n - A)))) / 2""",
    },
    constants=lambda dual: (dual._kappa, dual._one_plus_kappa),
)

_RBF = Snippet(
    step="Dn = 0; An = within(-expm1(-p0 * (2 * A + D * D)), s1 * s2);",
    slope="kdot = bell;",
    pull="by_k = bell; by_r1 = -bell * r1; by_r2 = -bell * r2;",
    pull_slope="by_k = 2 * p0 * bell; by_r1 = -by_k * r1; by_r2 = -by_k * r2;",
    common={"bell": "2 * p0 * exp(-p0 * (2 * A + D * D))"},
    constants=lambda dual: (float(dual.gamma),),
)

_EXP = Snippet(
    step="""
const real gap = D * (r1 + r2), top = s1 > s2 ? s1 : s2;
Dn = gap > 0 ? real(-top * expm1(-gap)) : real(top * expm1(gap));
An = within(-s1 * s2 * expm1(-(2 * A + D * D) / 2), s1 * s2);""",
    slope="kdot = grown;",
    pull="by_k = grown; by_r1 = grown * r1; by_r2 = grown * r2;",
    pull_slope="by_k = grown; by_r1 = grown * r1; by_r2 = grown * r2;",
    common={"grown": "exp((r1 * r1 + r2 * r2) / 2 + (n - A))"},
)

SNIPPETS = {
    "rectifier": _RECTIFIER,
    "sign": _SIGN,
    "erf": _ERF,
    "gelu": _GELU,
    "sine": _SIN,
    "rbf": _RBF,
    "exp": _EXP,
}

# By exact type: a subclass may be another function.
_FAMILIES: dict[type[Dual], str] = {
    ABRelu: "rectifier",
    Relu: "rectifier",
    LeakyRelu: "rectifier",
    Abs: "rectifier",
    Sign: "sign",
    Erf: "erf",
    Gelu: "gelu",
    Sin: "sine",
    Cos: "sine",
    Rbf: "rbf",
    Exp: "exp",
}


def has_snippet(dual: Dual) -> bool:
    """Whether a dual has a snippet."""
    return type(dual) in _FAMILIES


def name_of(dual: Dual) -> str:
    """Return the name of the snippet of a dual, or raise NotImplementedError."""
    name = _FAMILIES.get(type(dual))
    if name is None:
        raise NotImplementedError(f"{type(dual).__name__} has no KeOps formula.")
    return name


def constants_of(dual: Dual) -> tuple[float, ...]:
    """Return the constants p0, p1, ... of a dual."""
    return SNIPPETS[name_of(dual)].constants(dual)
