"""Runs the C++ of pair formulas over all pairs, compiled by itself: a tenth of the time of a KeOps formula."""

import ctypes
import subprocess

import torch

from stochproc.kernels._keops_program import gradient_code, value_code

C_TYPES = {torch.float32: "float", torch.float64: "double"}


def function(name, value, dtype):
    """C++ of a function that fills the matrix of a KeopsValue, and the gradients of its weighted sum."""
    t = C_TYPES[dtype]
    sizes = [v.shape[-1] for v in value.variables()]
    arrays = ("(X + i * {})", "(Y + j * {})")
    x, y = (a.format(s) for a, s in zip(arrays, sizes, strict=False))
    body = value_code(value.program, t, (x, y, "P"), "(&v)")
    pulls, sums = [], []
    for which, (target, row) in enumerate((("GX", "i"), ("GY", "j"), ("GP", "0"))):
        size = sizes[which]
        code = gradient_code(value.program, t, (x, y, "P"), "(W + i * m + j)", "part", size, which)
        pulls.append(f"{{ {t} part[{size}]; {code} for (int c = 0; c < {size}; ++c) ")
        sums.append(f"{target}[{row} * {size} + c] += part[c]; }}")
    swept = "\n".join(a + b for a, b in zip(pulls, sums, strict=True))
    return f"""
extern "C" void {name}(long n, long m, const {t}* X, const {t}* Y, const {t}* P, {t}* V) {{
    for (long i = 0; i < n; ++i) for (long j = 0; j < m; ++j) {{ {t} v; {body} V[i * m + j] = v; }}
}}
extern "C" void pull_{name}(long n, long m, const {t}* X, const {t}* Y, const {t}* P, const {t}* W,
                            {t}* GX, {t}* GY, {t}* GP) {{
    for (long i = 0; i < n; ++i) for (long j = 0; j < m; ++j) {{ {swept} }}
}}
"""


def compiled(sources, folder):
    """Load the functions of a list of sources."""
    path = folder / "pairs.cpp"
    path.write_text("#include <cmath>\n" + "".join(sources))
    library = folder / "pairs.so"
    subprocess.run(["g++", "-O0", "-std=c++11", "-shared", "-fPIC", str(path), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Matrix(torch.autograd.Function):
    """The matrix of a compiled function of the three variables of a KeopsValue."""

    @staticmethod
    def forward(ctx, library, name, rows, cols, numbers):
        ctx.save_for_backward(rows, cols, numbers)
        ctx.library, ctx.name = library, name
        out = rows.new_empty(rows.shape[0], cols.shape[0])
        call(library[name], rows, cols, numbers, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = [torch.zeros_like(t) for t in ctx.saved_tensors]
        call(ctx.library[f"pull_{ctx.name}"], *ctx.saved_tensors, grad.contiguous(), *grads)
        return None, None, *grads


def call(entry, rows, cols, *tensors):
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (rows, cols, *tensors))
    entry(ctypes.c_long(rows.shape[0]), ctypes.c_long(cols.shape[0]), *pointers)


def matrix(library, name, value):
    """Evaluate a KeopsValue; differentiable."""
    return Matrix.apply(library, name, *(v.contiguous() for v in value.variables()))
