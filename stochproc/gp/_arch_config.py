"""Networks as nested names and numbers, with layers that appear at several places written once."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from stochproc.gp._arch_base import Layer

__all__ = ["config_of", "from_config"]

_ACTIVATIONS = ["Abs", "ABRelu", "Cos", "Erf", "Exp", "Gelu", "LeakyRelu", "Rbf", "Relu", "Sign", "Sin"]
_PLAIN = ["Dense", "Dropout", "Identity", "LayerNorm", "Scale"]

#: File of each layer that can be written as names and numbers. Only these are ever made from a config.
_FILES: dict[str, str] = {
    **dict.fromkeys(_ACTIVATIONS, "_arch_activations"),
    **dict.fromkeys(_PLAIN, "_arch_layers"),
    **dict.fromkeys(("Serial", "Branches"), "_arch_compose"),
    **dict.fromkeys(("AvgPool", "Flatten", "GlobalAvgPool", "Image"), "_arch_images"),
    "Conv": "_arch_conv",
}


def _class_of(name: Any) -> type[Layer]:
    if name not in _FILES:
        raise ValueError(f"unknown layer class {name!r}; valid: {', '.join(sorted(_FILES))}.")
    found: type[Layer] = getattr(importlib.import_module(f"stochproc.gp.{_FILES[name]}"), name)
    return found


def config_of(layer: Layer) -> dict[str, Any]:
    """Return a network as nested names and numbers; TypeError if a part is not of this library."""
    seen: dict[int, int] = {}

    def write(part: Layer) -> dict[str, Any]:
        if id(part) in seen:
            return {"again": seen[id(part)]}
        name = type(part).__name__
        if name == "Numeric" or name not in _FILES or _class_of(name) is not type(part):
            raise TypeError(f"{part.name} is not made of names and numbers of this library, so it cannot be saved.")
        # Numbered from the inside out, as they are rebuilt.
        out = {"class": name, **part.own_config(write)}
        seen[id(part)] = len(seen)
        return out

    return write(layer)


def from_config(config: Mapping[str, Any]) -> Layer:
    """Rebuild a network from :meth:`Layer.config`.

    Parameters
    ----------
    config : mapping
        Nested names and numbers.

    Returns
    -------
    Layer

    Raises
    ------
    ValueError
        If a class is not a layer of this library, or an entry not one that a config has.

    Examples
    --------
    >>> from stochproc.gp import arch
    >>> net = arch.mlp(2, "erf")
    >>> arch.from_config(net.config()).config() == net.config()
    True
    """
    made: list[Layer] = []

    def read(part: Mapping[str, Any]) -> Layer:
        if not isinstance(part, Mapping):
            raise ValueError(f"config must be what config() of a layer returned; got {part!r}.")
        if "again" in part:
            return _earlier(made, part["again"])
        options = dict(part)
        cls = _class_of(options.pop("class", None))
        unknown = options.keys() - inspect.signature(cls).parameters.keys()
        if unknown:
            raise ValueError(f"config of {cls.__name__} has entries that are not its own: {sorted(unknown)}.")
        if "layers" in options:
            if not isinstance(options["layers"], Sequence):
                raise ValueError(f"config must be what config() of a layer returned; got {options['layers']!r}.")
            options["layers"] = [read(p) for p in options["layers"]]
        layer = cls(**options)
        made.append(layer)
        return layer

    return read(config)


def _earlier(made: list[Layer], number: Any) -> Layer:
    if not (isinstance(number, int) and 0 <= number < len(made)):
        raise ValueError(f"config refers to layer {number!r} of {len(made)} before it.")
    return made[number]
