"""Straight-line programs over pairs of points, and the C++ that evaluates them and their gradients.

A formula of KeOps is a tree: what mentions its argument twice doubles the text at every layer, and the gradient of a
chain of layers repeats the chain at each of them. So a whole network is one operation of KeOps, whose C++ is written
from a list of instructions. Each instruction occurs once in the value; the gradient is one sweep back over the list.

A pair is held as (D, A), with its norms in columns of two variables, one by row and one by column. The sweep back
needs only the adjoint of the covariance of each pair: the norms are functions of single points, whose gradients are
written into the columns they came from.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

from stochproc.kernels._keops_snippets import SNIPPETS, prelude

__all__ = ["Instruction", "Program", "digest_of", "gradient_code", "parse", "text_of", "value_code"]


class Instruction(NamedTuple):
    """One step; its result is the register with the number of its place in the program.

    Parameters
    ----------
    name : str
        ``points`` (its input is the number of coordinates), ``scaled``, ``affine``, ``plus``, ``normalise`` or the
        name of a dual make a pair; ``value``, ``slope_<dual>``, ``outer``, ``add``, ``times`` and ``multiple`` a
        number.
    inputs : tuple of int
        Registers.
    columns : tuple of int
        Columns of the variables by row and by column: norms before, other factors, norms behind.
    parameters : tuple of int
        Entries of the parameter variable.
    """

    name: str
    inputs: tuple[int, ...]
    columns: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.name, *(" ".join(map(str, part)) for part in self[1:])))

    @property
    def family(self) -> str:
        """Name of the dual, also where this is its slope."""
        return self.name.removeprefix("slope_")

    @property
    def is_pair(self) -> bool:
        """Whether the result is a pair rather than a number."""
        return self.name in ("points", "scaled", "affine", "plus", "normalise") or self.name in SNIPPETS


Program = tuple[Instruction, ...]


def text_of(program: Program) -> str:
    """Return the program as one word of a formula."""
    return ";".join(map(str, program))


def parse(text: str) -> Program:
    """Return the program of a text."""
    lines = (line.split(":") for line in text.split(";"))
    return tuple(Instruction(name, *(tuple(map(int, part.split())) for part in rest)) for name, *rest in lines)


@functools.lru_cache(maxsize=256)
def digest_of(program: Program) -> str:
    """Name the C++ of a program: KeOps finds compiled formulas by their text, which does not hold the snippets."""
    arrays = ("x", "y", "p")
    code = value_code(program, "double", arrays, "out")
    for which in range(3):
        code += gradient_code(program, "double", arrays, "g", "out", 1, which)
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def value_code(program: Program, dtype: str, arrays: tuple[str, str, str], out: str) -> str:
    """Return C++ that sets ``*out`` to the last register, given the names of the arrays by row, column and neither."""
    writer = _Writer(program, arrays)
    writer.forward(gradient=False)
    return writer.block(dtype, f"*({out}) = v{len(program) - 1};")


def gradient_code(
    program: Program, dtype: str, arrays: tuple[str, str, str], g: str, out: str, size: int, which: int
) -> str:
    """Return C++ that fills ``out`` with ``*g`` times the gradient in the array of number ``which``, of this size."""
    writer = _Writer(program, arrays)
    writer.forward(gradient=True)
    writer.backward(g, out, size, which)
    return writer.block(dtype)


def codes_of(step: Instruction) -> tuple[str, str]:
    """Return the snippets of the value of a dual, or of its slope, and of the derivatives of that."""
    snippet = SNIPPETS[step.family]
    return (snippet.step, snippet.pull) if step.is_pair else (snippet.slope, snippet.pull_slope)


class _Writer:
    """Writes the C++ of one program: registers are ``D3, A3`` or ``v3``, their adjoints ``b3``."""

    def __init__(self, program: Program, arrays: tuple[str, str, str]) -> None:
        self.program = program
        self.x, self.y, self.p = arrays
        self.lines: list[str] = []
        # Where the common expressions of a dual at a pair are kept.
        self.common: dict[tuple[str, tuple[int, ...], tuple[int, ...], str], str] = {}

    def block(self, dtype: str, *end: str) -> str:
        return "{\n" + "\n".join((prelude(dtype), *self.lines, *end)) + "\n}\n"

    def norms(self, column: int, one: str, two: str) -> str:
        return f"const real {one} = ({self.x})[{column}], {two} = ({self.y})[{column}];"

    def parameter(self, i: int) -> str:
        return f"({self.p})[{i}]"

    def forward(self, *, gradient: bool) -> None:
        for i, step in enumerate(self.program):
            if step.family in SNIPPETS:
                self.evaluate_common(step, gradient)
            self.lines.append(f"real D{i}, A{i};" if step.is_pair else f"real v{i};")
            body = self.dual(step, i) if step.family in SNIPPETS else getattr(self, f"do_{step.name}")(step, i)
            self.lines.append("{ " + body + " }")

    def state(self, step: Instruction, code: str, *, behind: bool = False) -> str:
        """Declare what a snippet of a dual may mention."""
        j = step.inputs[0]
        lines = [self.norms(step.columns[0], "r1", "r2"), f"const real D = D{j}, A = A{j}, n = r1 * r2;"]
        if behind and len(step.columns) > 1:
            lines.append(self.norms(step.columns[1], "s1", "s2"))
        lines += [f"const real p{i} = {self.parameter(k)};" for i, k in enumerate(step.parameters)]
        for name in SNIPPETS[step.family].common:
            place = self.common.get((step.family, step.inputs, step.parameters, name))
            if place and re.search(rf"\b{name}\b", code):
                lines.append(f"const real {name} = {place};")
        return " ".join(lines) + code

    def evaluate_common(self, step: Instruction, gradient: bool) -> None:
        """Evaluate, once for a pair, what the snippets to come mention and what that mentions in turn."""
        common, (value, pull) = SNIPPETS[step.family].common, codes_of(step)
        text = value + pull if gradient else value
        wanted: list[str] = []
        for name in reversed(common):
            if re.search(rf"\b{name}\b", text):
                wanted.insert(0, name)
                text += common[name]
        for name in wanted:
            key = (step.family, step.inputs, step.parameters, name)
            if key not in self.common:
                place = f"{name}_{len(self.common)}"
                body = self.state(step, f" {place} = {common[name]};")
                self.lines.append(f"real {place}; {{ {body} }}")
                self.common[key] = place

    def dual(self, step: Instruction, i: int) -> str:
        value, _ = codes_of(step)
        if step.is_pair:
            return self.state(step, f" real Dn, An; {value} D{i} = Dn; A{i} = An;", behind=True)
        return self.state(step, f" real kdot; {value} v{i} = kdot;")

    def do_points(self, step: Instruction, i: int) -> str:
        """Write what ``_pair_points.state_of_points`` does for one pair; the norms are sums of two columns."""
        d, norms = step.inputs[0], self.norms(step.columns[0], "r1", "r2")
        if d == 1:
            return f"{norms} D{i} = r1 - r2; A{i} = (({self.x})[0] < 0) != (({self.y})[0] < 0) ? 2 * r1 * r2 : real(0);"
        x, y = self.x, self.y
        return f"""{norms}
const real n = r1 * r2;
const real D = ((({x})[{d}] - ({y})[{d}]) + (({x})[{d + 1}] - ({y})[{d + 1}])) * inv0(r1 + r2);
real sq = 0;
for (int k = 0; k < {d}; ++k) {{ const real z = ({x})[k] - ({y})[k]; sq += z * z; }}
const real dist = sqrt(sq), size = fabs(D);
real A = within((dist - size) * ((dist + size) / 2), n);
// Nearly collinear points: their angle from unit vectors.
if (A / dist * 128 < dist / n * dist * dist) {{
    const real i1 = inv0(r1), i2 = inv0(r2);
    sq = 0;
    for (int k = 0; k < {d}; ++k) {{ const real z = ({x})[k] * i1 - ({y})[k] * i2; sq += z * z; }}
    A = sq * n / 2;
}}
D{i} = D; A{i} = A;"""

    def do_scaled(self, step: Instruction, i: int) -> str:
        (j,), (root, w) = step.inputs, map(self.parameter, step.parameters)
        return f"D{i} = D{j} * {root}; A{i} = A{j} * {w};"

    def do_affine(self, step: Instruction, i: int) -> str:
        (j,), (w, b) = step.inputs, map(self.parameter, step.parameters)
        before, behind = step.columns
        return f"""{self.norms(before, "r1", "r2")} {self.norms(behind, "s1", "s2")}
const real w = {w}, b = {b};
D{i} = D{j} * (r1 + r2) * inv0(s1 + s2) * w;
A{i} = w * A{j} + D{j} * D{j} * inv0(s1 * s2 + (w * (r1 * r2) + b)) * (w * b);"""

    def do_plus(self, step: Instruction, i: int) -> str:
        (j, k), (one, two, behind) = step.inputs, step.columns
        return f"""{self.norms(one, "a1", "a2")} {self.norms(two, "b1", "b2")} {self.norms(behind, "s1", "s2")}
const real cross = (D{j} * (b1 + b2) - D{k} * (a1 + a2)) / 2;
D{i} = (D{j} * (a1 + a2) + D{k} * (b1 + b2)) * inv0(s1 + s2);
A{i} = A{j} + A{k} + cross * cross * inv0(s1 * s2 + a1 * a2 + b1 * b2);"""

    def do_normalise(self, step: Instruction, i: int) -> str:
        (j,), (before, inverse, behind) = step.inputs, step.columns
        return f"""{self.norms(before, "r1", "r2")} {self.norms(inverse, "i1", "i2")} {self.norms(behind, "s1", "s2")}
D{i} = {self.parameter(step.parameters[0])} * (D{j} * (r1 + r2)) * (i1 * i2) * (i1 * i2) * inv0(s1 + s2);
A{i} = A{j} * (i1 * i2);"""

    def do_value(self, step: Instruction, i: int) -> str:
        return f"{self.norms(step.columns[0], 'r1', 'r2')} v{i} = r1 * r2 - A{step.inputs[0]};"

    def do_add(self, step: Instruction, i: int) -> str:
        return "v{} = v{} + v{};".format(i, *step.inputs)

    def do_times(self, step: Instruction, i: int) -> str:
        return "v{} = v{} * v{};".format(i, *step.inputs)

    def do_multiple(self, step: Instruction, i: int) -> str:
        return f"v{i} = {self.parameter(step.parameters[0])} * v{step.inputs[0]};"

    def do_outer(self, step: Instruction, i: int) -> str:
        return f"{self.norms(step.columns[0], 'i1', 'i2')} v{i} = i1 * i2;"

    def backward(self, g: str, out: str, size: int, which: int) -> None:
        """Write the sweep back; b3 is the adjoint of the number v3, or of the covariance of pair 3."""
        self.lines.append(f"for (int k = 0; k < {size}; ++k) ({out})[k] = 0;")
        self.lines.append("real " + ", ".join(f"b{i} = 0" for i in range(len(self.program))) + ";")
        self.lines.append(f"b{len(self.program) - 1} = *({g});")
        for i, step in reversed(list(enumerate(self.program))):
            if step.family in SNIPPETS:
                body = self.pull_dual(step, i, out, which)
            else:
                body = getattr(self, f"undo_{step.name}", self.undo_sum)(step, i, out, which)
            self.lines.append("{ " + body + " }")

    def pull_dual(self, step: Instruction, i: int, out: str, which: int) -> str:
        _, pull = codes_of(step)
        norm = f" ({out})[{step.columns[0]}] += b{i} * by_r{which + 1};" if which < 2 else ""
        code = f" real by_k, by_r1, by_r2; {pull} b{step.inputs[0]} += b{i} * by_k;{norm}"
        return self.state(step, code, behind=True)

    def covariance(self, step: Instruction) -> str:
        return f"{self.norms(step.columns[0], 'r1', 'r2')} const real k = r1 * r2 - A{step.inputs[0]};"

    def undo_points(self, step: Instruction, i: int, out: str, which: int) -> str:
        if which == 2:
            return ""
        other = (self.y, self.x)[which]
        return f"for (int k = 0; k < {step.inputs[0]}; ++k) ({out})[k] += b{i} * ({other})[k];"

    def undo_affine(self, step: Instruction, i: int, out: str, which: int) -> str:
        (j,), (w, b) = step.inputs, step.parameters
        line = f"b{j} += {self.parameter(w)} * b{i};"
        if which == 2:
            line += f" {self.covariance(step)} ({out})[{w}] += b{i} * k; ({out})[{b}] += b{i};"
        return line

    def undo_scaled(self, step: Instruction, i: int, out: str, which: int) -> str:
        w = step.parameters[1]
        line = f"b{step.inputs[0]} += {self.parameter(w)} * b{i};"
        return line + (f" {self.covariance(step)} ({out})[{w}] += b{i} * k;" if which == 2 else "")

    def undo_normalise(self, step: Instruction, i: int, out: str, which: int) -> str:
        inverse = step.columns[1]
        line = f"{self.norms(inverse, 'i1', 'i2')} b{step.inputs[0]} += b{i} * (i1 * i2);"
        if which == 2:
            return line
        return f"{line} {self.covariance(step)} ({out})[{inverse}] += b{i} * k * i{2 - which};"

    def undo_sum(self, step: Instruction, i: int, out: str, which: int) -> str:
        """Pull back through plus, value and add: the adjoint goes on as it is."""
        return " ".join(f"b{j} += b{i};" for j in step.inputs)

    def undo_times(self, step: Instruction, i: int, out: str, which: int) -> str:
        j, k = step.inputs
        return f"b{j} += b{i} * v{k}; b{k} += b{i} * v{j};"

    def undo_multiple(self, step: Instruction, i: int, out: str, which: int) -> str:
        (j,), (w,) = step.inputs, step.parameters
        line = f"b{j} += {self.parameter(w)} * b{i};"
        return line + (f" ({out})[{w}] += b{i} * v{j};" if which == 2 else "")

    def undo_outer(self, step: Instruction, i: int, out: str, which: int) -> str:
        if which == 2:
            return ""
        (column,), other = step.columns, (self.y, self.x)[which]
        return f"({out})[{column}] += b{i} * ({other})[{column}];"
