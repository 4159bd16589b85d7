"""Fit the state-space approximations of the RBF kernel that stochproc/kernels/_state_space_rbf.py tabulates.

A stationary process with state covariance I has F + F' = -L Qc L'. With noise in the last entry alone, F is (up to
a rotation) skew-symmetric and tridiagonal but for the last diagonal entry -g, and f = h' x has the covariance
h' exp(F t) h, positive definite whatever the n - 1 couplings, g and the unit vector h. The largest error against
exp(-t^2 / 2) is minimised: least squares from several starts, then Lawson's reweighting. h is zero in even places,
by symmetry in time, and in the last two, so that f has two derivatives.

Run: python benchmarks/fit_rbf_state_space.py   (about 3 minutes; prints the table and the errors)
"""

import math

import numpy as np
from scipy.optimize import least_squares

T = np.concatenate([np.linspace(0, 6, 241), np.linspace(6.05, 14, 80)])
FINE = np.linspace(0, 20, 20_001)
STARTS, ROUNDS = 24, 300


def unpack(p, n):
    couplings, damping = p[: n - 1], p[n - 1] ** 2
    F = np.diag(couplings, 1) - np.diag(couplings, -1)
    F[-1, -1] = -damping
    h = np.zeros(n)
    h[0] = 1.0
    h[2 : max(n - 2, 1) : 2] = p[n:]
    return F, h / np.linalg.norm(h)


def error(p, n, t):
    F, h = unpack(p, n)
    speeds, vectors = np.linalg.eig(F)
    weights = (h @ vectors) * np.linalg.solve(vectors, h.astype(complex))
    return (np.exp(t[:, None] * speeds) @ weights).real - np.exp(-(t**2) / 2)


def polish(p, n, weight, n_steps):
    fun = lambda q: weight * error(q, n, T)  # noqa: E731
    return least_squares(fun, p, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=n_steps).x


def fit(n):
    rng = np.random.default_rng(0)
    # The first couplings of the exact kernel (Hermite functions) are sqrt(1), sqrt(2), ...
    couplings = 1.11 * np.sqrt(np.arange(1, n))
    couplings[-1] *= 2.6
    h = np.array([0.075, 0.02, 0.005])[: len(range(2, max(n - 2, 1), 2))]
    best, best_error = None, math.inf

    def keep(p):
        nonlocal best, best_error
        worst = np.abs(error(p, n, T)).max()
        if worst < best_error:
            best, best_error = p, worst

    for start in range(STARTS):
        noise = 0.1 * (start > 0)
        p = np.concatenate([couplings, [3.2], h])
        keep(polish(p * (1 + noise * rng.standard_normal(len(p))), n, np.ones_like(T), 1_000))
    p, weight = best, np.ones_like(T)
    for _ in range(ROUNDS):
        r = np.abs(error(p, n, T))
        weight *= r / r.max() + 0.02
        weight /= weight.max()
        p = polish(p, n, np.sqrt(weight), 30)
        keep(p)
    return best


def main():
    for n in range(2, 9):
        p = fit(n)
        p[n - 1] = abs(p[n - 1])
        couplings, damping, outputs = p[: n - 1], p[n - 1] ** 2, p[n:]
        row = ([round(float(c), 9) for c in couplings], round(float(damping), 9), [round(float(v), 9) for v in outputs])
        print(f"    {n}: {row},  # {np.abs(error(p, n, FINE)).max():.2e}", flush=True)


if __name__ == "__main__":
    main()
