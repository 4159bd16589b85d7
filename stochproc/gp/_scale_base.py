"""What every prior of the scale s = sigma² can do; a new one needs nothing but its log density."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.gp._scale_quadrature import find_range, log_integral, sample_log_scale

__all__ = ["ClosedFormPrior", "PositiveNumber", "ScalePrior", "plain_number"]


class PositiveNumber:
    """A positive number of a prior, kept as its logarithm in the float64 parameter ``log_<name>``.

    Parameters
    ----------
    learned : bool
        Whether fits adjust it; the scale parameter of a prior is learned, its shape parameters are kept.
    doc : str
        What the number means.
    """

    def __init__(self, *, learned: bool, doc: str) -> None:
        self.learned = learned
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, prior: Any, owner: "type | None" = None) -> Any:
        return self if prior is None else getattr(prior, f"log_{self.name}").exp()

    def __set__(self, prior: Any, value: Any) -> None:
        number = plain_number(self.name, value)
        check_positive(self.name, number)
        stored = prior._parameters.get(f"log_{self.name}")
        if stored is None:
            log_value = torch.tensor(math.log(number), dtype=torch.float64)
            prior.register_parameter(f"log_{self.name}", torch.nn.Parameter(log_value, requires_grad=self.learned))
        else:
            with torch.no_grad():
                stored.fill_(math.log(number))


def plain_number(name: str, value: Any) -> float:
    """Return a number or a tensor of one entry as a float, or raise TypeError naming it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().item()
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}.")
    return float(value)


class ScalePrior(torch.nn.Module):
    r"""A prior of the scale s = sigma², which multiplies the whole covariance of a process.

    A new prior subclasses this and writes :meth:`log_prob`; sampling, the mean, the tail index, evidence and
    predictions follow by quadrature in log s. Numbers that fits shall learn are ``torch.nn.Parameter``.

    Attributes
    ----------
    scale_name : str or None
        Name of the attribute t such that s / t^(1/scale_power) has a fixed law; None where there is none. Its
        optimum is then one-dimensional and independent of kernel and noise; see ``fit_scale``.
    scale_power : float
        The power: if s has this prior with t, then c s has it with c^scale_power t. 1 unless t scales sigma
        (1/2).
    search_ranges : dict
        Ranges in which fits move shape parameters that are not frozen, by the name of the parameter; of a logarithm,
        those of the number itself. A value given outside widens them.

    Notes
    -----
    ``log_prob`` must be normalised, take a float64 tensor of any shape with entries between 1e-304 and 1e304,
    work entry by entry, and return -inf where the density is zero. It may be unbounded towards s = 0 only. A
    class that writes ``log_prob`` inherits nothing about the law from its parent: it states ``scale_name``,
    ``tail_index`` and the like itself, or leaves them to be computed.

    Examples
    --------
    >>> import math, torch
    >>> from stochproc.gp import ScalePrior
    >>> class LogNormal(ScalePrior):
    ...     def log_prob(self, s):
    ...         return -0.5 * s.log().square() - s.log() - 0.5 * math.log(2 * math.pi)
    >>> prior = LogNormal()
    >>> round(prior.mean, 6), prior.tail_index
    (1.648721, inf)
    """

    scale_name: ClassVar["str | None"] = None
    scale_power: ClassVar["float | int"] = 1

    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {}

    # How the posterior is formed: "point", "inverse_gamma" and "gig" in closed form, "mixture" from its
    # components, None by quadrature.
    _conjugate: ClassVar["str | None"] = None
    _derived: ClassVar[tuple[str, ...]] = (
        "_conjugate",
        "_log_prob_u",
        "_ranges",
        "_reach",
        "mean",
        "sample",
        "scale_name",
        "scale_power",
        "tail_index",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "log_prob" in cls.__dict__:
            # A subclass that rewrites the density must not inherit closed forms that belong to its parent's.
            for name in ScalePrior._derived:
                if name not in cls.__dict__:
                    setattr(cls, name, ScalePrior.__dict__[name])

    def log_prob(self, s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log p(s), -inf outside (0, inf).

        Parameters
        ----------
        s : Tensor of any shape
            Scales, in squared units of the process.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(s).")

    def _log_prob_u(self, u: Tensor) -> Tensor:
        """Log density of u = log s."""
        value: Any = self.log_prob(u.exp())
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(self).__name__}.log_prob must return a tensor; got {type(value).__name__}.")
        if value.shape != u.shape:
            raise ValueError(
                f"{type(self).__name__}.log_prob must return one value an entry; got shape {tuple(value.shape)} "
                f"for {tuple(u.shape)}."
            )
        return value + u

    @property
    def _reach(self) -> "float | int":
        """Largest |log s| at which the density can be evaluated."""
        return 700.0

    def _ranges(self, depth: float) -> list[tuple[float, float]]:
        """Ranges of log s that hold the prior's mass: its density there is within ``depth`` nats of its maximum."""
        zero = self._zero().reshape(1)
        low, _, high = find_range(self, 0.0, zero, depth)
        return [(low.item(), high.item())]

    @property
    def tail_index(self) -> "float | int":
        """The exponent in p(s) ~ s^-(tail_index + 1) as s grows; inf where p falls faster than any power.

        Where a subclass does not say, it is read off the density at s = 1e40 and 1e80.
        """
        with torch.no_grad():
            u = math.log(10) * torch.tensor([38.0, 40.0, 78.0, 80.0], dtype=torch.float64, device=self._device())
            value = self._log_prob_u(u)
            if bool(value.isnan().any()):
                raise ValueError(f"{type(self).__name__}.log_prob must not be NaN; it is beyond s = 1e38.")
            if not bool(value.isfinite().all()):
                return math.inf
            near, far = (-(value[1::2] - value[::2]) / (u[1] - u[0])).tolist()
        # A power law has the same exponent at both; a lighter tail a growing one.
        return math.inf if far > 1.05 * max(near, 0.0) + 1e-6 else far

    @property
    def mean(self) -> "float | int":
        """E[s], inf where it does not exist."""
        if self.tail_index <= 1 + 1e-9:
            return math.inf
        with torch.no_grad():
            return log_integral(self, -1.0, self._zero()).exp().item()

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Draw independent scales.

        Parameters
        ----------
        shape : int or tuple of int, default=()
            Shape of the result.
        generator : torch.Generator or None, default=None
            Source of randomness, on the device of the prior's parameters; None is torch's default one.

        Returns
        -------
        Tensor of the given shape, float64
        """
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        return sample_log_scale(self, 0.0, self._zero(), math.prod(size), generator).exp().reshape(size)

    @property
    def has_scale(self) -> bool:
        """Whether the prior has a scale parameter that fits may learn."""
        if self.scale_name is None:
            return False
        stored = getattr(self, f"log_{self.scale_name}", getattr(self, self.scale_name))
        return not isinstance(stored, torch.nn.Parameter) or stored.requires_grad

    def rescale(self, factor: "float | int") -> None:
        """Change the scale parameter in place so that the prior becomes that of ``factor * s``.

        Raises
        ------
        TypeError
            If the prior declares no scale parameter.
        ValueError
            If ``factor`` is not positive.
        """
        check_positive("factor", factor)
        if self.scale_name is None:
            raise TypeError(f"{type(self).__name__} declares no scale parameter; set the class attribute scale_name.")
        new = plain_number(self.scale_name, getattr(self, self.scale_name)) * factor**self.scale_power
        check_positive(self.scale_name, new)
        stored = self._parameters.get(self.scale_name)
        if stored is None:
            setattr(self, self.scale_name, new)
        else:
            with torch.no_grad():
                stored.fill_(new)

    def config(self) -> dict[str, Any]:
        """Return the prior as names and numbers, from which ``scale_prior_from_config`` rebuilds it.

        Raises
        ------
        TypeError
            If the prior is not one of this library: code cannot be saved as numbers.
        """
        from stochproc.gp._scale_priors import LIBRARY_CLASSES

        if type(self) not in LIBRARY_CLASSES:
            raise TypeError(f"{type(self).__name__} is not a prior of this library, so it cannot be saved as numbers.")
        return {"class": type(self).__name__, **self._numbers()}

    @classmethod
    def _from_numbers(cls, numbers: dict[str, Any]) -> "ScalePrior":
        """Undo ``config``; TypeError for a name or number that is not the prior's own."""
        return cls(**{key: plain_number(key, value) for key, value in numbers.items()})

    def _numbers(self) -> dict[str, float]:
        names = [n for c in reversed(type(self).__mro__) for n, v in vars(c).items() if isinstance(v, PositiveNumber)]
        return {n: getattr(self, n).detach().item() for n in names}

    def extra_repr(self) -> str:
        """Return the numbers of the prior for ``repr``."""
        return ", ".join(f"{name}={value:.6g}" for name, value in self._numbers().items())

    def _device(self) -> torch.device:
        return next((t.device for t in self.parameters()), torch.device("cpu"))

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device())


class ClosedFormPrior(ScalePrior):
    """A prior that defines ``_log_prob_u`` and ``_ppf``: exact also where exp(u) would overflow."""

    @property
    def _reach(self) -> "float | int":
        return math.inf

    def _log_prob_u(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _ppf(self, uniform: Tensor) -> Tensor:
        """Quantile function at 1 - uniform: the upper tail is resolved down to uniform = 1e-16."""
        raise NotImplementedError

    def log_prob(self, s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log p(s), -inf outside (0, inf); see :meth:`ScalePrior.log_prob`."""
        positive = s > 0
        u = torch.where(positive, s, torch.ones_like(s)).log()
        return torch.where(positive, self._log_prob_u(u) - u, torch.full_like(s, -math.inf))

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Draw by inversion of the distribution function; see :meth:`ScalePrior.sample`."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        uniform = torch.rand(size, dtype=torch.float64, device=self._device(), generator=generator)
        with torch.no_grad():
            return self._ppf(uniform.clamp(min=2.0**-54))

    def _number(self, name: str, like: Tensor) -> Tensor:
        """Logarithm of a number in the dtype and on the device of ``like``."""
        return getattr(self, f"log_{name}").to(like)
