"""One safetensors file for a fitted estimator: tensors, and names and numbers as JSON; nothing is unpickled."""

import dataclasses
import importlib
import json
import numbers
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stochproc

__all__ = ["decode", "encode", "read", "write"]

# Which public function rebuilds an object from its config, by the tag in the file. Only these are ever called.
_BUILDERS = {
    "kernel": "stochproc.kernels:kernel_from_config",
    "network": "stochproc.gp.arch:from_config",
    "scale_prior": "stochproc.gp:scale_prior_from_config",
    "lbfgs": "stochproc.solvers:LBFGS",
    "cg": "stochproc.solvers:CG",
    "mode": "stochproc.tensor:Mode",
    "kernel_pair": "stochproc.gp:KernelPair",
}
# Class of an object that can be written as names and numbers, by tag.
_CLASSES = {
    "kernel": "stochproc.kernels:Kernel",
    "network": "stochproc.gp.arch:Layer",
    "scale_prior": "stochproc.gp:ScalePrior",
    "lbfgs": "stochproc.solvers:LBFGS",
    "cg": "stochproc.solvers:CG",
    "mode": "stochproc.tensor:Mode",
    "kernel_pair": "stochproc.gp:KernelPair",
}
# Kernel classes outside the kernel layer: importing the module lets that layer know them.
_KERNEL_MODULES = {"NetworkKernel": "stochproc.gp.arch"}
_KEY = "stochproc"


def _find(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def encode(name: str, value: Any) -> Any:
    """Return ``value`` as nested names and numbers, or raise TypeError naming the parameter."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [encode(name, v) for v in value]
    if isinstance(value, dict):
        # As pairs, since keys of JSON are strings and those of class weights are labels.
        return {"__tag__": "dict", "items": [encode(name, pair) for pair in value.items()]}
    for tag, path in _CLASSES.items():
        if isinstance(value, _find(path)):
            try:
                config = value.config() if hasattr(value, "config") else _plain_fields(name, value)
            except TypeError as error:
                raise TypeError(f"{name} cannot be saved: {error}") from None
            record = {"__tag__": tag, "config": config}
            return {**record, "frozen": _frozen(name, value)} if isinstance(value, torch.nn.Module) else record
    raise TypeError(
        f"{name} cannot be saved: {type(value).__name__} is not made of names and numbers of this library. "
        "Kernels, priors and solvers of stochproc can be saved; functions, other kernels and generators cannot."
    )


def _plain_fields(name: str, options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of options as names and numbers, or raise TypeError."""
    return {f.name: encode(f"{name}.{f.name}", getattr(options, f.name)) for f in dataclasses.fields(options)}


def _frozen(name: str, module: torch.nn.Module) -> list[str]:
    """Names of the parameters that fits keep; TypeError if two parts share one and their config cannot say so."""
    # Configs of networks refer to a layer that is used again; named_modules gives the outermost of them first.
    says_so = [path for path, part in module.named_modules() if getattr(part, "config_says_sharing", False)]

    def network_of(path: str) -> str | None:
        return next((p for p in says_so if not p or path.startswith(f"{p}.")), None)

    names: dict[int, str] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), path)
        if first != path and (network_of(path) is None or network_of(path) != network_of(first)):
            raise TypeError(f"{name} cannot be saved: {first} and {path} are one parameter; give each part its own.")
    return [path for path, parameter in module.named_parameters() if not parameter.requires_grad]


def _import_kernels(config: Any) -> None:
    """Import the modules of kernel classes that a config names and that are defined outside the kernel layer."""
    if isinstance(config, dict):
        module = _KERNEL_MODULES.get(str(config.get("class")))
        if module is not None:
            importlib.import_module(module)
    parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for part in parts:
        _import_kernels(part)


def decode(value: Any) -> Any:
    """Rebuild what :func:`encode` wrote."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("__tag__") == "dict":
        return dict(decode(value["items"]))
    if value.get("__tag__") not in _BUILDERS:
        raise ValueError(f"unknown kind of object {value.get('__tag__')!r} in the file; valid: {', '.join(_BUILDERS)}.")
    build = _find(_BUILDERS[value["__tag__"]])
    config = value["config"]
    if value["__tag__"] in ("lbfgs", "cg", "mode", "kernel_pair"):
        return build(**{k: decode(v) for k, v in config.items()})
    _import_kernels(config)
    module = build(config)
    if "frozen" in value:
        for path, parameter in module.named_parameters():
            parameter.requires_grad_(path not in value["frozen"])
    return module


def write(path: Any, cls: type, parameters: Mapping[str, Any], state: Mapping[str, Any], tensors: Any) -> None:
    """Write a fitted estimator to one file, whole or not at all.

    A new file has the permissions that the umask leaves, a replaced one those it had.
    """
    from safetensors.torch import save_file

    header = {
        "class": cls.__name__,
        "version": stochproc.__version__,
        "parameters": {k: encode(k, v) for k, v in parameters.items()},
        "state": {k: encode(k, v) for k, v in state.items()},
    }
    target = Path(path)
    # A temporary file beside the target, then a rename: an interruption leaves the old file as it was.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
    # Made by us, since safetensors and tempfile choose permissions of their own.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = stat.S_IMODE(os.stat(target if target.exists() else temporary).st_mode)
        # Copies: layers that share a parameter give it twice, and safetensors refuses tensors that share memory.
        apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        save_file(apart, temporary, {_KEY: json.dumps(header)})
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path: Any, cls: type) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return parameters, state and tensors of a file that ``cls`` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the path is a directory, or the file is not one of this library or holds another class.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory, not a file that save() wrote.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: sums of tensors that lie anywhere in memory round in another way than those of torch's own.
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a file that save() wrote: {error}") from None
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not one that save() of stochproc wrote.")
    header = json.loads(metadata[_KEY])
    if header["class"] != cls.__name__:
        raise ValueError(
            f"{path} holds a {header['class']}; load it by {header['class']}.load, not {cls.__name__}.load."
        )
    parameters = {k: decode(v) for k, v in header["parameters"].items()}
    return parameters, {k: decode(v) for k, v in header["state"].items()}, tensors


def as_tensor(value: Any, dtype: torch.dtype, device: Any) -> Tensor:
    """Copy an array to a tensor; copies, since a view of a read-only array warns."""
    return torch.tensor(np.asarray(value), dtype=dtype, device=device)
