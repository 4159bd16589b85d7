"""Kernels of networks on images by explicit loops over pixels and filter offsets, from plain covariances.

All pairs of all pixels of all images are kept, and angles come from acos: slow and obvious. In float64 that is right
for distant points only; arrays of mpmath numbers (dtype object) go through the same code for near ones.
"""

import mpmath as mp
import numpy as np
import torch


def images(n, *shape, seed=0, dtype=torch.float64):
    """Standard normal images (n, *shape), the same in every dtype but for rounding."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _apply(name, K):
    if K.dtype == object:
        return np.frompyfunc(getattr(mp, name), 1, 1)(K)
    return getattr(np, {"acos": "arccos"}.get(name, name))(K)


def exact(x):
    """Return an array of mpmath numbers with the values of ``x``."""
    return np.frompyfunc(mp.mpf, 1, 1)(np.asarray(x).astype(object))


def start(images):
    """Covariances (N, N, h, w, h, w) of images (N, h, w, c), and their tangent kernel."""
    K = np.einsum("aijc,bklc->abijkl", images, images) / images.shape[-1]
    return K, 0 * K


def padding_of(size, stride, padding, n):
    """Pixels before and after an axis of n pixels, and the number of windows."""
    if padding == "valid":
        return 0, 0, (n - size) // stride + 1
    n_out = -(-n // stride)
    total = max((n_out - 1) * stride + size - n, 0)
    return total // 2, total - total // 2, n_out


def filtered(K, size, stride, padding):
    """Sum over filter offsets of K[p + f, p' + f]."""
    h, w = K.shape[2:4]
    (top, _, h_out), (left, _, w_out) = (padding_of(size, stride, padding, n) for n in (h, w))
    out = np.zeros((*K.shape[:2], h_out, w_out, h_out, w_out), dtype=K.dtype)
    for i, j, k, m in np.ndindex(out.shape[2:]):
        for a, b in np.ndindex(size, size):
            at = [i * stride + a - top, j * stride + b - left, k * stride + a - top, m * stride + b - left]
            if padding == "circular":
                at = [at[0] % h, at[1] % w, at[2] % h, at[3] % w]
            elif min(at) < 0 or max(at[0], at[2]) >= h or max(at[1], at[3]) >= w:
                continue
            out[:, :, i, j, k, m] += K[:, :, at[0], at[1], at[2], at[3]]
    return out


def conv(w2, b2, size=3, stride=1, padding="zero"):
    """Convolution with variances w2, b2."""

    def layer(K, T):
        K = w2 * filtered(K, size, stride, padding) / size**2 + b2
        return K, w2 * filtered(T, size, stride, padding) / size**2 + K

    return layer


def dense(w2, b2=0):
    def layer(K, T):
        K = w2 * K + b2
        return K, w2 * T + K

    return layer


def _norms(K):
    """Products of the norms of every pair, from the variances of every pixel."""
    if K.ndim == 2:
        r = _apply("sqrt", np.diagonal(K))
        return r[:, None] * r
    r = _apply("sqrt", np.einsum("aaijij->aij", K))
    return r[:, None, :, :, None, None] * r[None, :, None, None]


def relu(K, T):
    n, pi = _norms(K), mp.pi if K.dtype == object else np.pi
    c = np.minimum(np.maximum(K / n, -1), 1)
    # A point and itself: acos of 1 less one rounding is 1e-8.
    for at in np.ndindex(K.shape[0], *K.shape[2 : 2 + (K.ndim - 2) // 2]):
        c[(at[0], *at[:1], *at[1:], *at[1:])] = 1
    t = _apply("acos", c)
    return n * (_apply("sin", t) + (pi - t) * c) / (2 * pi), T * (pi - t) / (2 * pi)


def residual(*layers):
    def layer(K, T):
        f = evaluate(layers, K, T)
        return K + f[0], T + f[1]

    return layer


def avg_pool(size):
    def mean(M):
        h, w = (n // size for n in M.shape[2:4])
        out = np.zeros((*M.shape[:2], h, w, h, w), dtype=M.dtype)
        for i, j, k, m in np.ndindex(out.shape[2:]):
            block = M[:, :, i * size :, j * size :, k * size :, m * size :][:, :, :size, :size, :size, :size]
            out[:, :, i, j, k, m] = block.sum((2, 3, 4, 5)) / size**4
        return out

    return lambda K, T: (mean(K), mean(T))


def flatten(K, T):
    P = K.shape[2] * K.shape[3]
    return np.einsum("abijij->ab", K) / P, np.einsum("abijij->ab", T) / P


def global_avg_pool(K, T):
    P = K.shape[2] * K.shape[3]
    return K.sum((2, 3, 4, 5)) / P**2, T.sum((2, 3, 4, 5)) / P**2


def evaluate(layers, K, T):
    for layer in layers:
        K, T = layer(K, T)
    return K, T
