"""Programs over pairs as operations of KeOps: one for the value, one for the gradient in each variable."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from stochproc.kernels._keops_program import Program, digest_of, gradient_code, parse, text_of, value_code

__all__ = ["lazy_program"]

_VALUE, _GRADIENT = "StochprocPair", "StochprocPairGradient"


def lazy_program(program: Program, rows: Any, cols: Any, parameters: Any) -> Any:
    """Return the last number of a program as a symbolic matrix.

    Parameters
    ----------
    program : tuple of Instruction
    rows, cols, parameters : LazyTensor
        The variables by row, by column and by neither.
    """
    _register()
    arguments = f"'{text_of(program)}', '{digest_of(program)}'"
    return rows.ternary(cols, parameters, _VALUE, dimres=1, dimcheck=None, opt_arg=arguments)


@functools.cache
def _register() -> None:
    """Make the operations known where KeOps looks up the names in the text of a formula."""
    value, gradient = _operations()
    for module in map(importlib.import_module, ("keopscore.formulas", "keopscore.formulas.GetReduction")):
        setattr(module, _VALUE, value)
        setattr(module, _GRADIENT, gradient)


def _operations() -> tuple[type, type]:
    # KeOps is imported at its first use, like everywhere in this layer.
    from keopscore.formulas.Operation import Operation
    from keopscore.formulas.variables.Zero import Zero

    class PairGradient(Operation):
        """Gradient of a program in its variable ``which``, times a number."""

        string_id = _GRADIENT

        def __init__(self, *children: Any, params: tuple = ()) -> None:
            # KeOps copies operations as type(self)(*children, *params).
            variables, params = (children[:4], children[4:] or params)
            self.text, self.digest, self.which = params
            super().__init__(*variables, params=tuple(params))
            self.dim = variables[self.which].dim

        def Op(self, out: Any, table: Any, *args: Any) -> str:
            _check_dtype(out.dtype)
            x, y, p, g = (arg.id for arg in args)
            return gradient_code(parse(self.text), out.dtype, (x, y, p), g, out.id, self.dim, self.which)

        def DiffT(self, v: Any, gradin: Any) -> Any:
            raise NotImplementedError(
                "the keops backend has no second derivatives of infinite networks; use the chunked backend."
            )

    class Pair(Operation):
        """Last number of a program."""

        string_id = _VALUE
        dim = 1

        def __init__(self, *children: Any, params: tuple = ()) -> None:
            variables, params = (children[:3], children[3:] or params)
            self.text, self.digest = params
            super().__init__(*variables, params=tuple(params))

        def Op(self, out: Any, table: Any, *args: Any) -> str:
            _check_dtype(out.dtype)
            x, y, p = (arg.id for arg in args)
            return value_code(parse(self.text), out.dtype, (x, y, p), out.id)

        def DiffT(self, v: Any, gradin: Any) -> Any:
            total: Any = Zero(v.dim)
            for which, variable in enumerate(self.children):
                if v in variable.Vars_:
                    gradient = PairGradient(*self.children, gradin, self.text, self.digest, which)
                    total = total + variable.DiffT(v, gradient)
            return total

    return Pair, PairGradient


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float", "double"):
        raise NotImplementedError(f"formulas of infinite networks need float32 or float64; got {dtype}.")
