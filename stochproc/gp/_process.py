"""What the models of a process with a random scale share: their hyperparameters and the checks of data."""

import math
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_choice, check_finite, check_integer, check_positive, check_same_kind
from stochproc.gp._scale_base import ScalePrior, plain_number
from stochproc.gp._scale_priors import as_scale_prior

__all__ = ["ScaleMixtureProcess"]


class ScaleMixtureProcess(torch.nn.Module):
    """Kernel, prior of the scale, noise and constant mean of a process; the parameters are those of the subclasses."""

    def __init__(
        self,
        kernel: torch.nn.Module,
        scale_prior: "ScalePrior | str" = "inverse_gamma",
        *,
        noise: "float | int" = 0.1,
        mean: str = "constant",
        n_outputs: int = 1,
    ) -> None:
        super().__init__()
        check_choice("mean", mean, ("constant", "zero"))
        check_integer("n_outputs", n_outputs, 1)
        self.kernel = kernel
        self.scale_prior = as_scale_prior(scale_prior)
        self.n_outputs = n_outputs
        self.log_noise = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.noise = noise
        constant = torch.zeros(n_outputs, dtype=torch.float64)
        self.constant_mean = torch.nn.Parameter(constant) if mean == "constant" else None

    @property
    def noise(self) -> Tensor:
        """Noise, a variance, 0-dim; setting it to zero also stops it from being learned."""
        return self.log_noise.exp()

    @noise.setter
    def noise(self, value: Any) -> None:
        number = plain_number("noise", value)
        check_positive("noise", number, zero=True)
        with torch.no_grad():
            self.log_noise.fill_(math.log(number) if number > 0 else -math.inf)
        if number == 0:
            self.log_noise.requires_grad_(False)

    def _learns_mean(self) -> bool:
        return self.constant_mean is not None and self.constant_mean.requires_grad

    def _check_data(self, X: Tensor, y: Tensor) -> Tensor:
        """Return y with an axis for the outputs."""
        check_same_kind(X=X, y=y)
        if X.ndim != 2 or not len(X):
            raise ValueError(f"X must have shape (n, d) with n >= 1; got {tuple(X.shape)}.")
        expected = [(len(X), self.n_outputs), (len(X),)][: 1 + (self.n_outputs == 1)]
        if tuple(y.shape) not in expected:
            raise ValueError(f"y must have shape {' or '.join(map(str, expected))}; got {tuple(y.shape)}.")
        check_finite("X", X)
        check_finite("y", y)
        return y.reshape(len(X), self.n_outputs)

    def _residual(self, targets: Tensor) -> Tensor:
        return targets if self.constant_mean is None else targets - self.constant_mean.to(targets)
