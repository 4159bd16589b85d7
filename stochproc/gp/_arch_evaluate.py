"""Kernel matrices of infinitely wide networks, tile by tile, with gradients that evaluate each tile again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stochproc._checks import check_same_kind
from stochproc.exceptions import ArchitectureError
from stochproc.gp import _arch_rectified as rectified
from stochproc.gp._arch_base import DiagState, KernelState, Layer, Shape
from stochproc.gp._arch_blocks import by_blocks
from stochproc.gp._arch_plain import plain_enough
from stochproc.kernels import Pair, PlainPair

__all__ = ["dense_kernels", "diagonals", "same_points"]

# Pairs of points in a tile: enough that the calls count little, few enough for the cache; elsewhere memory bounds it.
_TILE = {"cpu": 2**16, "other": 2**24}
# Pairs of pixels in a tile; on the CPU 2**20 took longer, and twice the memory.
_PIXEL_TILE = {"cpu": 2**18, "other": 2**22}

# Squares of points must fit.
_LARGEST = {torch.float32: 1e18, torch.float64: 1e150}


def dense_kernels(net: Layer, X1: Tensor, X2: Tensor | None, kinds: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the matrices of the kinds asked for, "nngp" and "ntk", of shape (*batch, n, m)."""
    X2 = X1 if X2 is None else X2
    check_same_kind(X1=X1, X2=X2)
    same = same_points(X1, X2)
    x = _checked_points(net, "X1", X1, kinds)
    y = x if same else _checked_points(net, "X2", X2, kinds)
    if not net.takes_images():
        try:
            torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"the batch shapes of X1 and X2 must broadcast; got {tuple(x.shape[:-2])} and {tuple(y.shape[:-2])}."
            ) from None
    # What of a point has to agree: the columns, or the shape of the images.
    if x.shape[-_point_ndim(net) :] != y.shape[-_point_ndim(net) :]:
        raise ValueError(f"X1 and X2 must hold points of one kind; got shapes {tuple(X1.shape)} and {tuple(X2.shape)}.")
    parameters = tuple(net.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *parameters)):
        return _Kernels.apply(_snapshot(net), tuple(kinds), same, x, y, *parameters)
    return _by_tiles(net, tuple(kinds), same, x, y)


def diagonals(net: Layer, X: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the diagonals of the matrices that :func:`dense_kernels` gives, of shape (*batch, n)."""
    check_same_kind(X=X)
    return _diagonals(net, _checked_points(net, "X", X, kinds), kinds)


def same_points(x: Tensor, y: Tensor) -> bool:
    """Whether two sets of points are one: equal values are not enough where a gradient is wanted."""
    if x is y:
        return True
    wanted = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    return not wanted and x.shape == y.shape and torch.equal(x, y)


def _point_ndim(net: Layer) -> int:
    return 3 if net.takes_images() else 1


def _checked_points(net: Layer, name: str, X: Tensor, kinds: Sequence[str]) -> Tensor:
    """Return points as the network takes them, or raise ArchitectureError or ValueError if it can't act on them."""
    if "ntk" in kinds:
        net.check_tangent()
    shape: Shape = ()
    if net.takes_images():
        from stochproc.gp._arch_images import as_images

        X = as_images(net, X)
        if X.ndim != 4 or 0 in X.shape[1:]:
            raise ArchitectureError(f"{name} must hold images (n, height, width, channels); got {tuple(X.shape)}.")
        shape = (X.shape[1], X.shape[2])
    elif X.ndim < 2 or X.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (*batch, n, d), one row a point; got {tuple(X.shape)}.")
    if X.numel() and not (largest := X.detach().abs().max().item()) <= _LARGEST[X.dtype]:
        raise ValueError(f"{name} must be finite, of at most {_LARGEST[X.dtype]:g} in size; got {largest:.3g}.")
    behind = net.check(shape)
    if behind:
        raise ArchitectureError(
            f"{net.name} ends with {behind[0]}x{behind[1]} pixels; put Flatten or GlobalAvgPool behind the last layer "
            "that acts on pixels."
        )
    return X


def _start(net: Layer, x: Tensor, y: Tensor, tangent: bool, plain: bool) -> KernelState:
    if plain:
        covariances = PlainPair.from_points(x, y).affine(1 / x.shape[-1], 0.0)
        return KernelState(covariances, covariances.q.new_zeros(()) if tangent else None)  # type: ignore[arg-type]
    if net.takes_images():
        from stochproc.gp._arch_pixels import pairs_of_images

        return pairs_of_images(x, y, pairs=_needs_pairs(net), tangent=tangent)
    pair = Pair.from_points(x, y).affine(1 / x.shape[-1], 0.0)
    return KernelState(pair, pair.A.new_zeros(()) if tangent else None)


def _needs_pairs(net: Layer) -> bool:
    return any(isinstance(layer, Layer) and layer.needs_pixel_pairs for layer in net.modules())


def _tile(net: Layer, kinds: Sequence[str], x: Tensor, y: Tensor, *, plain: bool = False) -> tuple[Tensor, ...]:
    """Evaluate the kernels of all pairs of two sets of different points, by operations that autograd knows.

    ``plain`` takes them from covariances alone; see ``plain_enough``.
    """
    dtype = x.dtype
    if x.device.type == "cpu":
        # Rounding the state once a layer gives 4e-6 in float32 after ten GELU layers.
        x, y = x.double(), y.double()
    state = net.kernel(_start(net, x, y, "ntk" in kinds, plain))
    q = state.pair.q.to(dtype)
    if state.ntk is None:
        return (q,)
    tangent = state.ntk.to(dtype).expand(torch.broadcast_shapes(state.ntk.shape, q.shape))
    return tuple(q if kind == "nngp" else tangent for kind in kinds)


def _diagonals(net: Layer, x: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
    if not net.takes_images():
        return _diagonals_at_once(net, x, kinds)
    now = _snapshot(net)
    # The pairs of pixels of all images are never held at once.
    step = max(1, _images_of_a_tile(net, x))
    return by_blocks(lambda part: _diagonals_at_once(now, part, kinds), x, tuple(now.parameters()), step)


def _images_of_a_tile(net: Layer, x: Tensor) -> int:
    """Number of pairs of images that a tile holds."""
    pixels = x.shape[1] * x.shape[2]
    return _PIXEL_TILE["cpu" if x.device.type == "cpu" else "other"] // (pixels**2 if _needs_pairs(net) else pixels)


def _diagonals_at_once(net: Layer, x: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
    # Points are few beside pairs: float64 costs nothing here and keeps the digits that depth multiplies.
    wide, tangent = x.double(), "ntk" in kinds
    if net.takes_images():
        from stochproc.gp._arch_pixels import diagonal_of_images

        start = diagonal_of_images(wide, pairs=_needs_pairs(net), tangent=tangent)
    else:
        q = wide.square().sum(-1) / x.shape[-1]
        start = DiagState(q, torch.zeros_like(q) if tangent else None)
    state = net.diagonal(start)
    found = {"nngp": state.q, "ntk": state.ntk}
    return tuple(value.to(x.dtype) for kind in kinds if (value := found[kind]) is not None)


def _tiles(net: Layer, x: Tensor, y: Tensor, same: bool) -> Iterator[tuple[slice, slice]]:
    """Cut the matrix into tiles; of a symmetric one those on and right of the diagonal, which start on it."""
    axis = -1 - _point_ndim(net)
    n, m = x.shape[axis], y.shape[axis]
    if net.takes_images():
        room = _images_of_a_tile(net, x)
        n_rows = n_cols = max(1, int(room**0.5))
    else:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]).numel()
        room = _TILE["cpu" if x.device.type == "cpu" else "other"] // max(1, batch)
        n_rows = n_cols = 0
    start = 0
    while start < n:
        first = start if same else 0
        rows = n_rows or max(1, room // max(1, m - first))
        for left in range(first, m, n_cols or max(1, m)):
            yield slice(start, min(n, start + rows)), slice(left, min(m, left + (n_cols or m)))
        start += rows


def _batch_of(net: Layer, x: Tensor, y: Tensor) -> tuple[int, ...]:
    if net.takes_images():
        return ()
    batches = [p.shape[:-1] for p in net.parameters() if p.numel() > 1]
    return tuple(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], *batches))


def _by_tiles(net: Layer, kinds: tuple[str, ...], same: bool, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Evaluate without autograd."""
    axis = -1 - _point_ndim(net)
    n, m = x.shape[axis], y.shape[axis]
    out = [x.new_empty(*_batch_of(net, x, y), n, m) for _ in kinds]
    plan = rectified.plan(net, x, y)
    plain = plan is None and plain_enough(net, x, y, tangent="ntk" in kinds, gradient=False)
    for rows, cols in _tiles(net, x, y, same):
        values: Sequence[Tensor]
        if plan is None:
            values = _tile(net, kinds, _part(x, rows, axis), _part(y, cols, axis), plain=plain)
        else:
            values = plan.tile(kinds, rows, cols)
        for whole, value in zip(out, values, strict=True):
            whole[..., rows, cols] = value
            if same:
                _mirror(whole, rows, cols)
    if same:
        for whole, diagonal in zip(out, _diagonals(net, x, kinds), strict=True):
            whole.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return tuple(out)


def _part(x: Tensor, which: slice, axis: int) -> Tensor:
    return x[which] if axis < -2 else x[..., which, :]


def _mirror(whole: Tensor, rows: slice, cols: slice) -> None:
    """Copy what lies right of the diagonal to below it."""
    if cols.start == rows.start:
        square = whole[..., rows, rows]
        square.copy_(square.triu() + square.triu(1).mT)
    right = slice(max(cols.start, rows.stop), cols.stop)
    whole[..., right, rows] = whole[..., rows, right].mT


class _Kernels(torch.autograd.Function):
    """Kernel matrices whose backward evaluates each tile again; a backward that is differentiated does so at once."""

    @staticmethod
    def forward(
        ctx: Any, net: Layer, kinds: tuple[str, ...], same: bool, x: Tensor, y: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.net, ctx.kinds, ctx.same = net, kinds, same
        ctx.save_for_backward(x, y, *parameters)
        return _by_tiles(net, kinds, same, x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, y, *parameters = ctx.saved_tensors
        net, same, wanted = ctx.net, ctx.same, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            found = _differentiable(net, ctx.kinds, same, (x, y), parameters, wanted, grads)
        else:
            found = _gradients(net, ctx.kinds, same, x, y, wanted, grads)
        return None, None, None, *found


def _differentiable(
    net: Layer,
    kinds: tuple[str, ...],
    same: bool,
    points: tuple[Tensor, Tensor],
    parameters: Sequence[Tensor],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, from one evaluation of the whole matrices."""
    x, y = points
    values = _tile(net, kinds, x, y)
    if same:
        both = zip(values, _diagonals(net, x, kinds), strict=True)
        values = tuple(torch.diagonal_scatter(k, d.expand(k.shape[:-1]), dim1=-2, dim2=-1) for k, d in both)
    inputs = (x, y, *net.parameters())
    used = [t for i, t in enumerate(inputs) if wanted[i] and not (same and i == 1)]
    found = iter(torch.autograd.grad(values, used, grads, create_graph=True, allow_unused=True))
    return [next(found) if wanted[i] and not (same and i == 1) else None for i in range(len(inputs))]


def _gradients(
    net: Layer,
    kinds: tuple[str, ...],
    same: bool,
    x: Tensor,
    y: Tensor,
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients in x, y and the parameters, tile by tile."""
    axis, parameters = -1 - _point_ndim(net), tuple(net.parameters())
    plan = rectified.plan(net, x, y) if kinds == ("nngp",) else None
    plain = plan is None and plain_enough(net, x, y, tangent="ntk" in kinds, gradient=True)
    total = [torch.zeros_like(t) if w else None for t, w in zip((x, y, *parameters), wanted, strict=True)]
    for rows, cols in _tiles(net, x, y, same):
        upstream = [_upstream(g, rows, cols, same) for g in grads]
        if plan is not None:
            plan.add_gradient(upstream[0], rows, cols)
            continue
        parts = [None if t is None else _part(t, w, axis) for t, w in zip(total[:2], (rows, cols), strict=True)]
        with torch.enable_grad():
            points = [
                _part(p, w, axis).detach().requires_grad_(t is not None)
                for p, w, t in zip((x, y), (rows, cols), total[:2], strict=True)
            ]
            values = _tile(net, kinds, *points, plain=plain)
        _add_gradients([*parts, *total[2:]], (*points, *parameters), values, upstream)
    if plan is not None:
        plan.finish(total)
    if same:
        if total[0] is not None and total[1] is not None:
            total[0] += total[1]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(total[0] is not None)
            values = _diagonals(net, leaf, kinds)
        upstream = [g.diagonal(dim1=-2, dim2=-1) for g in grads]
        _add_gradients([total[0], *total[2:]], (leaf, *parameters), values, upstream)
        total[1] = None
    return total


def _add_gradients(
    slots: Sequence[Tensor | None], inputs: Sequence[Tensor], values: Sequence[Tensor], upstream: Sequence[Tensor]
) -> None:
    """Add the gradients of ``values``, times ``upstream``, to the slots of the inputs; None takes none."""
    taken = [(slot, t) for slot, t in zip(slots, inputs, strict=True) if slot is not None]
    given = [(v, g.sum_to_size(v.shape)) for v, g in zip(values, upstream, strict=True) if v.requires_grad]
    if not taken or not given:
        return
    found = torch.autograd.grad([v for v, _ in given], [t for _, t in taken], [g for _, g in given], allow_unused=True)
    for (slot, _), g in zip(taken, found, strict=True):
        if g is not None:
            slot += g


def _upstream(grad: Tensor, rows: slice, cols: slice, same: bool) -> Tensor:
    """Return the gradient of a tile; of a symmetric matrix that of both triangles, strictly right of the diagonal."""
    g = grad[..., rows, cols]
    if not same:
        return g
    g = g + grad[..., cols, rows].mT
    if cols.start == rows.start:
        g[..., : rows.stop - rows.start].triu_(1)
    return g


M = TypeVar("M", bound=torch.nn.Module)


def _snapshot(module: M, done: dict[int, Any] | None = None) -> M:
    """Return a shallow copy with the parameters of now, whatever replaces those of the original before backward."""
    done = {} if done is None else done
    if id(module) not in done:
        new = done[id(module)] = copy.copy(module)
        new.__dict__["_parameters"] = dict(module._parameters)
        children = {k: child if child is None else _snapshot(child, done) for k, child in module._modules.items()}
        new.__dict__["_modules"] = children
    return done[id(module)]  # type: ignore[no-any-return]
