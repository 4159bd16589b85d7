"""Positive definite systems that the tests of linear solvers share."""

import math

import torch

from stochproc.kernels import RBF, Matern
from stochproc.solvers import Preconditioner


def spd(gen, *shape):
    B = torch.randn(*shape, shape[-1], generator=gen)
    return B @ B.mT / shape[-1] + 0.5 * torch.eye(shape[-1])


def spectrum(gen, values):
    """A dense matrix with given eigenvalues."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=gen))[0]
    A = (Q * values) @ Q.mT
    return (A + A.mT) / 2


def all_directions(n):
    """n probes whose mean outer product is exactly the identity."""
    return math.sqrt(n) * torch.eye(n)


def some_preconditioner(gen, n, *batch):
    return Preconditioner("test", torch.randn(*batch, n, 3, generator=gen), 0.5 + torch.rand(*batch, n, generator=gen))


def dense(P):
    return P.factor @ P.factor.mT + torch.diag_embed(P.diagonal)


def kernel_system(name, n, noise, seed=0):
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
    kernel = {"rbf": RBF(0.3), "matern": Matern(0.3, nu=2.5)}[name]
    K = kernel.operator(x)
    A = K.add_jitter(noise)
    return K, A, float(torch.linalg.slogdet(A.to_dense().detach())[1])
