"""What can be computed of a batch of solved problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc.ot._batch_inputs import RaggedInputs
from stochproc.ot._batch_pass import item_slices
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._form import Form
from stochproc.ot._inputs import DenseInputs
from stochproc.ot._result import OTResult

__all__ = ["BatchForm", "BatchResult", "RaggedForm"]

# Plans that are made at the same time where only numbers come out.
CHUNK_BYTES = 1 << 24


class BatchForm(DenseForm):
    """Problems of one size; everything has their axis B in front.

    M may be (n, m), shared by all of them; no more than a chunk of plans exists at a time unless plans, or gradients
    through them, are asked for.
    """

    def _chunks(self) -> list[slice]:
        n, m = self.M.shape[-2:]
        return item_slices(self.a.shape[0], 8 * n * m, CHUNK_BYTES)

    def _chunks_to_round(self) -> list[slice]:
        """Return chunks in which no item can keep another from being rounded."""
        k = self.a.shape[0]
        if k and not bool(self.M.detach().amax() < math.inf):
            return item_slices(k, 1, 1)
        return self._chunks()

    def _part(self, s: slice) -> DenseForm:
        """Return some of the items, outside the graph."""
        M, reg = self.M.detach(), self.reg.detach()
        M, reg = M if M.ndim == 2 else M[s], reg if reg.ndim == 0 else reg[s]
        inputs = DenseInputs(self.given, M, self.a[s].detach(), self.b[s].detach(), reg)
        return DenseForm(inputs, self.f[s], self.g[s], rounded=self.rounded)

    def _numbers(self, compute: Callable[[DenseForm], Tensor], chunks: list[slice]) -> Tensor:
        """Return one number an item, a chunk at a time."""
        parts = [compute(self._part(s)).reshape(-1) for s in chunks]
        return torch.cat(parts) if parts else self.f.new_zeros(0)

    def plan(self) -> Tensor:
        if self.tracked["plan"] and not self.rounded:
            return super().plan()
        n, m = self.M.shape[-2:]
        plan = torch.empty(self.a.shape[0], n, m, dtype=self.M.dtype, device=self.M.device)
        for s in self._chunks_to_round() if self.rounded else self._chunks():
            plan[s] = self._part(s).plan()
        return plan

    def sparse_plan(self) -> Tensor:
        chunks = [(s.start, self._part(s).sparse_plan()) for s in self._chunks()]
        n, m = self.M.shape[-2:]
        size = self.a.shape[0], n, m
        if not chunks:
            return self.M.new_empty(size).to_sparse_coo()
        where = [plan.indices() + plan.indices().new_tensor([[start], [0], [0]]) for start, plan in chunks]
        values = torch.cat([plan.values() for _, plan in chunks])
        return torch.sparse_coo_tensor(torch.cat(where, 1), values, size, is_coalesced=True, check_invariants=False)

    def value_linear(self) -> Tensor:
        if self.tracked["plan"]:
            return super().value_linear()
        return self._numbers(DenseForm.value_linear, self._chunks()).to(self.M.dtype)

    def marginals(self) -> tuple[Tensor, Tensor]:
        if self.tracked["plan"]:
            return super().marginals()
        pairs = [self._part(s).marginals() for s in (self._chunks_to_round() if self.rounded else self._chunks())]
        if not pairs:
            return torch.empty_like(self.a), torch.empty_like(self.b)
        return torch.cat([p for p, _ in pairs]), torch.cat([q for _, q in pairs])

    def primal_value(self) -> Tensor:
        return self._numbers(DenseForm.primal_value, self._chunks_to_round())

    def lower_bound(self) -> Tensor:
        return self._numbers(DenseForm.lower_bound, self._chunks())


class RaggedForm(Form):
    """A list of problems of different sizes: groups of padded ones, whose results come out unpadded."""

    def __init__(self, inputs: RaggedInputs, groups: list[BatchForm]):
        self.sizes, self.groups = inputs.sizes, groups
        self.items = [group.items for group in inputs.groups]
        self.order = torch.argsort(torch.cat(self.items))
        # What the results are like; no item in particular.
        self.a, self.b, self.reg = groups[0].a, groups[0].b, inputs.reg

    def _numbers(self, compute: Callable[[Any], Tensor]) -> Tensor:
        found = torch.cat([compute(group) for group in self.groups])
        return found[self.order.to(found.device)]

    def _arrays(self, stacks: list[Tensor], *sides: int) -> list[Tensor]:
        """Return the items of the groups' results, cut to the sizes of the given sides."""
        out: dict[int, Tensor] = {}
        for items, stack in zip(self.items, stacks, strict=True):
            for i, whole in zip(items.tolist(), stack, strict=True):
                out[i] = whole[tuple(slice(self.sizes[i][side]) for side in sides)]
        return [out[i] for i in range(len(out))]

    def _pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        return self._arrays([p for p, _ in pairs], 0), self._arrays([q for _, q in pairs], 1)

    def potentials(self) -> Any:
        return self._pairs([group.potentials() for group in self.groups])

    def marginals(self) -> Any:
        return self._pairs([group.marginals() for group in self.groups])

    def plan(self) -> Any:
        return self._arrays([group.plan() for group in self.groups], 0, 1)

    def lazy_plan(self) -> Any:
        return self.plan()

    def sparse_plan(self) -> Any:
        dense = self._arrays([group.sparse_plan().to_dense() for group in self.groups], 0, 1)
        return [plan.to_sparse_coo() for plan in dense]

    def value(self) -> Tensor:
        return self._numbers(BatchForm.value)

    def value_linear(self) -> Tensor:
        return self._numbers(BatchForm.value_linear)

    def dual_value(self) -> Tensor:
        return self._numbers(BatchForm.dual_value)

    def primal_value(self) -> Tensor:
        return self._numbers(BatchForm.primal_value)

    def lower_bound(self) -> Tensor:
        return self._numbers(BatchForm.lower_bound)

    def entropy_shift(self) -> Tensor:
        return self._numbers(BatchForm.entropy_shift)

    def images(self, points: Any, values: Any, *, forward: bool) -> Any:
        if values is not None:
            raise ValueError("values must be None for a list of problems; average with the items of plan.")
        return self._arrays(
            [group.images(points, None, forward=forward) for group in self.groups], *(0, 1)[:: 1 if forward else -1]
        )


class BatchResult(OTResult):
    """An :class:`OTResult` of many problems: everything has the axis B in front, or is a list."""

    def _sparse(self) -> Any:
        found = self._form.sparse_plan()
        if self._given.is_torch:
            return found
        from scipy.sparse import coo_array

        out = []
        for plan in found if isinstance(found, list) else (found[i].coalesce() for i in range(found.shape[0])):
            where = plan.indices().cpu().numpy()
            out.append(coo_array((plan.values().cpu().numpy(), tuple(where)), shape=tuple(plan.shape)))
        return out
