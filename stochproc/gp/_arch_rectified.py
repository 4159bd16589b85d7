r"""Fast evaluation of chains of dense layers and two-slope rectifiers, such as ReLU networks, on vectors.

Such a chain acts on the angle of a pair alone. With :math:`v = \sin^2(\theta/2)`, the defect over twice the product of
the norms, a rectifier is :math:`v' = v - g h(\theta) / (2c)` with c and g of the slopes, and a dense
layer :math:`v' = \alpha_x \alpha_y v + \sin^2((\varphi_x - \varphi_y)/2)` with
:math:`\alpha = \cos\varphi` the share of the weights in the new norm, :math:`\gamma = \sin\varphi` that of the bias.
All but v depends on one point each. Gradients go through :math:`c = 1 - 2v`, where a dense layer is
:math:`c' = \alpha_x \alpha_y c + \gamma_x \gamma_y`: what a tile adds to those of the vectors are products of matrices
and vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.gp._arch_activations import ABRelu
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_compose import Serial
from stochproc.gp._arch_layers import Dense, Identity, Scale
from stochproc.kernels import HalfAngles

__all__ = ["Plan", "plan"]

# A product of six norms is formed.
_NORMS = {torch.float32: (1e-5, 1e5), torch.float64: (1e-48, 1e48)}

Step = Dense | Scale | ABRelu


class _Side(NamedTuple):
    """Vectors of one set of points, one a dense layer, of shape (points,)."""

    alpha: list[Tensor]  # sqrt(w^2) r / r'; in the first layer without r, so that points at 0 have their gradient
    gamma: list[Tensor]  # b / r'
    norms: list[Tensor]  # r before each dense layer, and at the end
    grown: list[Tensor]  # r' behind each dense layer


def plan(net: Layer, x: Tensor, y: Tensor) -> Plan | None:
    """Return how to evaluate a chain on points (n, d) and (m, d); None if it is no chain, or a norm is extreme."""
    steps = _steps(net)
    if steps is None or x.ndim != 2 or y.ndim != 2 or x.device.type != "cpu" or not (len(x) and len(y)):
        return None
    made = Plan(net, steps, x, y)
    if made.weights[0][1] == 0 and any(bool((side.norms[0] == 0).any()) for side in (made.first, made.second)):
        # Without a bias the kernel has a kink at 0, where the layers take the mean of the slopes on both sides.
        return None
    low, high = _NORMS[x.dtype]
    for r in (r for side in (made.first, made.second) for r in (*side.norms, *side.grown)):
        if not bool((((r >= low) & (r <= high)) | (r == 0)).all()):
            return None
    return made


def _steps(net: Layer) -> list[Step] | None:
    """Return the dense layers and rectifiers in order, or None if there are other layers."""
    if isinstance(net, Serial):
        out: list[Step] = []
        for part in net.parts:
            inner = _steps(part)
            if inner is None:
                return None
            out += inner
        return out
    # By type: a convolution is a dense layer too, of another kind.
    if isinstance(net, (Dense, Scale)) and type(net) in (Dense, Scale):
        return [net] if all(p.numel() == 1 for p in net.parameters()) else None
    if isinstance(net, ABRelu):
        return [net] if net.acts_by_dual else None
    return [] if isinstance(net, Identity) else None


def _variances(layer: Dense | Scale) -> tuple[Tensor, Tensor | None]:
    """Return the variances of weights and biases as 0-dim tensors, None for no bias."""
    if isinstance(layer, Scale):
        return torch.tensor(layer.s**2, dtype=torch.float64), None
    bias = layer.log_b_std
    return (2 * layer.log_w_std).exp().reshape(()), None if bias is None else (2 * bias).exp().reshape(())


def _slopes(layer: ABRelu) -> tuple[float, float]:
    """Return the mean square c of the rectifier, and g, what its angle is multiplied by."""
    a, b = layer.dual.a, layer.dual.b
    return (a * a + b * b) / 2, (a - b) ** 2 / (2 * math.pi)


class Plan:
    """A chain on two sets of points, evaluated tile by tile; gradients are gathered over the tiles.

    Parameters
    ----------
    net : Layer
        The chain.
    steps : list of layers
        Its layers in order.
    x, y : Tensor of shape (n, d) and (m, d)
    """

    def __init__(self, net: Layer, steps: Sequence[Step], x: Tensor, y: Tensor) -> None:
        # A dense layer of weight 1 changes nothing; the first takes the step from points to angles.
        begins = bool(steps) and not isinstance(steps[0], ABRelu)
        self.net, self.steps = net, list(steps) if begins else [Scale(1.0), *steps]
        self.x, self.y = x.detach(), y.detach()
        with torch.no_grad():
            self.first = _side(self.steps, _sqnorms(self.x))
            self.second = self.first if y is x else _side(self.steps, _sqnorms(self.y))
            dense = [_variances(s) for s in self.steps if not isinstance(s, ABRelu)]
        self.weights = [(w2.item(), 0.0 if b2 is None else b2.item()) for w2, b2 in dense]
        sides = (self.first, self.second)
        self.vectors = [
            _Side(*([v.to(x.dtype).unsqueeze(-1 - i) for v in field] for field in side)) for i, side in enumerate(sides)
        ]
        # An angle to a few roundings is all that 1 - 2 v can show. What v of points at 0 is multiplied by vanishes.
        self.angles = HalfAngles(self.x, self.x if y is x else self.y)
        # Of each biased layer, sine and cosine of half the angle phi between weights and bias.
        self.halves = [
            [tuple(t.to(x.dtype).unsqueeze(-1 - i) for t in pair) for pair in _half_angles(side)]
            for i, side in enumerate(sides)
        ]
        self.sums = [[[torch.zeros_like(v) for v in f] for f in side] for side in sides]
        self.point_sums = [torch.zeros_like(z) for z in (self.x, self.y)]
        self.one = torch.ones((), dtype=x.dtype)
        self.buffers: dict[int, Tensor] = {}

    def tile(self, kinds: Sequence[str], rows: slice, cols: slice) -> list[Tensor]:
        """Return the kernels of the kinds asked for of a tile, in memory that the next tile overwrites."""
        tangent = None
        v = self.angles.tile(rows, cols)
        left, right = self._cut(rows, cols)
        layer = 0
        for step in self.steps:
            if isinstance(step, ABRelu):
                angle = self._rectify(v, step)
                c, g = _slopes(step)
                if tangent is not None:
                    tangent.mul_(angle.mul_(-2 * g).add_(c))
                continue
            self._affine(v, left, right, layer, rows, cols)
            w2, _ = self.weights[layer]
            if isinstance(step, Scale):
                tangent = None if tangent is None else tangent.mul_(w2)
            elif "ntk" in kinds:
                new = torch.mul(v, -2, out=self._buffer(v, 1)).add_(1).mul_(left.grown[layer]).mul_(right.grown[layer])
                tangent = new.clone() if tangent is None else tangent.mul_(w2).add_(new)
            layer += 1
        found = {"ntk": torch.zeros_like(v) if tangent is None else tangent}
        if "nngp" in kinds:
            found["nngp"] = v.mul_(-2).add_(1).mul_(left.norms[-1]).mul_(right.norms[-1])
        return [found[kind] for kind in kinds]

    def _cut(self, rows: slice, cols: slice) -> tuple[_Side, _Side]:
        left, right = self.vectors
        return _Side(*([v[rows] for v in f] for f in left)), _Side(*([v[:, cols] for v in f] for f in right))

    def _buffer(self, like: Tensor, which: int) -> Tensor:
        """Return memory of the shape of a tile, which other tiles use again."""
        if which not in self.buffers or self.buffers[which].numel() < like.numel():
            self.buffers[which] = like.new_empty(like.numel())
        return self.buffers[which][: like.numel()].view(like.shape)

    def _affine(self, v: Tensor, left: _Side, right: _Side, layer: int, rows: slice, cols: slice) -> None:
        """Take v through a dense layer, in place."""
        if self.weights[layer][1] == 0:
            return
        alpha = [side.alpha[layer] * (side.norms[0] if layer == 0 else 1.0) for side in (left, right)]
        v.mul_(alpha[0]).mul_(alpha[1])
        # The sine of half the difference of two angles errs by eps, and so does the angle behind the layer.
        (sine1, cosine1), (sine2, cosine2) = self.halves[0][layer], self.halves[1][layer]
        sine = torch.mul(sine1[rows], cosine2[:, cols], out=self._buffer(v, 1))
        sine.addcmul_(cosine1[rows], sine2[:, cols], value=-1)
        v.addcmul_(sine, sine)

    def _rectify(self, v: Tensor, step: ABRelu, into: Tensor | None = None) -> Tensor:
        """Take v through a rectifier, in place, and return half the angle before it."""
        v.clamp_(0, 1)
        root, sine = self._buffer(v, 0), self._buffer(v, 1)
        angle = self._buffer(v, 2) if into is None else into
        torch.asin(torch.sqrt(v, out=root), out=angle)
        torch.sub(self.one, v, out=sine).sqrt_().mul_(root)
        # h/2 = sin(t)/2 - t/2 + t v: wrong by eps sqrt(v), nothing beside the rounding of 1 - 2 v.
        sine.sub_(angle).addcmul_(v, angle, value=2)
        c, g = _slopes(step)
        v.add_(sine, alpha=-g / c)
        return angle

    def add_gradient(self, grad: Tensor, rows: slice, cols: slice) -> None:
        """Gather what a tile of the covariance, times ``grad``, adds to the gradients."""
        left, right = self._cut(rows, cols)
        v = self.angles.tile(rows, cols)
        # Behind the input and each layer: c, and half the angles before each rectifier.
        cosines, angles, layer = [], [], 0
        for step in self.steps:
            if isinstance(step, ABRelu):
                angles.append(self._rectify(v, step, torch.empty_like(v)))
                continue
            cosines.append(torch.mul(v, -2).add_(1))
            self._affine(v, left, right, layer, rows, cols)
            layer += 1
        end = v.mul_(-2).add_(1).mul_(grad)
        self._gather(end, left.norms[-1], right.norms[-1], "norms", -1, rows, cols)
        g = grad * left.norms[-1]
        g.mul_(right.norms[-1])
        for step in reversed(self.steps):
            if isinstance(step, ABRelu):
                mean_square, by_angle = _slopes(step)
                g.mul_(angles.pop().mul_(-2 * by_angle / mean_square).add_(1))
                continue
            layer -= 1
            c = cosines.pop()
            biased = self.weights[layer][1] > 0
            if biased:
                self._gather(g, left.gamma[layer], right.gamma[layer], "gamma", layer, rows, cols)
            if layer == 0:
                c.mul_(left.norms[0]).mul_(right.norms[0])
            if biased or layer == 0:
                self._gather(c.mul_(g), left.alpha[layer], right.alpha[layer], "alpha", layer, rows, cols)
                g.mul_(left.alpha[layer]).mul_(right.alpha[layer])
        scale = 1 / self.x.shape[-1]
        self.point_sums[0][rows].addmm_(g, self.y[cols], alpha=scale)
        self.point_sums[1][cols].addmm_(g.mT, self.x[rows], alpha=scale)

    def _gather(self, g: Tensor, left: Tensor, right: Tensor, field: str, layer: int, rows: slice, cols: slice) -> None:
        """Add the gradients in two vectors of which the outer product is multiplied by ``g``."""
        index = _Side._fields.index(field)
        first, second = (self.sums[i][index][layer] for i in range(2))
        first[rows] += (g @ right.mT)[:, 0]
        second[cols] += (left.mT @ g)[0]

    def finish(self, total: list[Tensor | None]) -> None:
        """Add what was gathered to the gradients in x, y and the parameters of the net; None takes none."""
        parameters = list(self.net.parameters())
        taken = [(slot, p) for slot, p in zip(total[2:], parameters, strict=True) if slot is not None]
        for slot, points, sums, direct in zip(total[:2], (self.x, self.y), self.sums, self.point_sums, strict=True):
            with torch.enable_grad():
                q = _sqnorms(points).requires_grad_()
                side = _side(self.steps, q)
            values = [v for f in side for v in f]
            given = [(v, g) for v, g in zip(values, (g for f in sums for g in f), strict=True) if v.requires_grad]
            inputs = [q, *(p for _, p in taken)]
            by_q, *found = torch.autograd.grad(
                [v for v, _ in given], inputs, [g for _, g in given], allow_unused=True, materialize_grads=True
            )
            if slot is not None:
                slot += direct + points * (by_q * (2 / points.shape[-1])).unsqueeze(-1).to(points.dtype)
            for (out, _), g in zip(taken, found, strict=True):
                out += g


def _sqnorms(x: Tensor) -> Tensor:
    """Return squared norms over the number of columns, in float64: points are few beside pairs."""
    return x.double().square().sum(-1) / x.shape[-1]


def _side(steps: Sequence[Step], q: Tensor) -> _Side:
    """Return the vectors of points of squared norms q, by operations that autograd knows."""
    side = _Side([], [], [], [])
    for step in steps:
        if isinstance(step, ABRelu):
            q = q * _slopes(step)[0]
            continue
        w2, b2 = _variances(step)
        r = _root(q)
        q = q * w2 if b2 is None else q * w2 + b2
        grown = _root(q)
        inverse = 1 / torch.where(grown > 0, grown, math.inf)
        side.alpha.append(w2.sqrt() * inverse * (r if side.alpha else 1.0))
        side.gamma.append(torch.zeros_like(q) if b2 is None else b2.sqrt() * inverse)
        side.norms.append(r)
        side.grown.append(grown)
    side.norms.append(_root(q))
    return side


def _half_angles(side: _Side) -> list[tuple[Tensor, Tensor]]:
    """Return sine and cosine of half of each layer's angle phi, whose cosine is alpha and whose sine is gamma."""
    out = []
    for layer, (alpha, gamma) in enumerate(zip(side.alpha, side.gamma, strict=True)):
        cosine = ((1 + (alpha * side.norms[0] if layer == 0 else alpha)) / 2).sqrt()
        out.append((gamma / (2 * cosine), cosine))
    return out


def _root(q: Tensor) -> Tensor:
    """Return the square root, with gradient 0 at 0."""
    empty = q == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, q).sqrt())
