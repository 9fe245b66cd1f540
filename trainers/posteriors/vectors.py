"""Flows for latents of few dimensions, where every coordinate may depend on all others: neural splines, and planar maps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zuko.flows import NSF

from pipelines.common.errors import UserError

from .density import Covariance, Scale, Shift, Whitening


class NeuralSplines(Covariance):
    """A Gaussian, then autoregressive rational-quadratic splines (Durkan et al. 2019; zuko's), which read features of x_t.

    Maps: c means, c log standard deviations, FEATURES for the splines, averaged over the image. The inverse takes d passes.
    """

    MAX_DIM = 128
    FEATURES = 16

    def __init__(self, shape: tuple[int, int, int], transforms: int = 3, hidden: int = 64, bins: int = 8) -> None:
        super().__init__(shape)
        if self.dim > self.MAX_DIM:
            raise UserError(
                f"objective.posterior.covariance='nsf' inverts {self.dim} dimensions one after the other; it is meant for at "
                f"most {self.MAX_DIM}. Use 'flow', whose couplings take one pass"
            )
        self.num_maps = 2 * shape[0] + self.FEATURES
        # slopes from .1 to 10 at the knots: with zuko's .001 the inverse can be NaN in float32
        self.flow = NSF(self.dim, self.FEATURES, bins, slope=0.1, transforms=transforms, hidden_features=[hidden, hidden])
        for transform in self.flow.transform.transforms:
            nn.init.zeros_(transform.hyper[-1].weight)  # the identity, so that q starts as the prior
            nn.init.zeros_(transform.hyper[-1].bias)

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_std, features = maps.split([self.shape[0], self.shape[0], self.FEATURES], dim=1)
        return [Shift(mean), Scale(log_std), Conditioned(self.flow, features.mean((2, 3)))]


class Conditioned:
    """A zuko flow as a map of z (b, k, d), given its context (b, n)."""

    def __init__(self, flow: NSF, context: Tensor) -> None:
        self.flow, self.context = flow, context

    def _transform(self, k: int):
        return self.flow.transform(self.context[:, None].expand(-1, k, -1))

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(z.shape[1]).call_and_ladj(z)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        transform = self._transform(y.shape[1])
        z = transform.inv(y)
        return z, transform.log_abs_det_jacobian(z, y)


class Planar(Covariance):
    """A Gaussian, then planar maps y = z + u tanh(w.z + b) (Rezende & Mohamed 2015), the same for all x_t: the least of flows.

    Maps: c means, c log standard deviations.
    """

    def __init__(self, shape: tuple[int, int, int], transforms: int = 8) -> None:
        super().__init__(shape)
        self.num_maps = 2 * shape[0]
        self.w = nn.Parameter(torch.randn(transforms, self.dim) / math.sqrt(self.dim))
        self.u, self.b = nn.Parameter(torch.zeros(transforms, self.dim)), nn.Parameter(torch.zeros(transforms))

    def whitening(self, maps: Tensor) -> list[Whitening]:
        mean, log_std = maps.chunk(2, dim=1)
        planes = [Plane(u, w, b) for u, w, b in zip(self.u, self.w, self.b, strict=True)]
        return [Shift(mean), Scale(log_std), *planes]


class Plane:
    """One planar map, u moved along w until w.u > -1, which makes it invertible (App. A.1 there); u = 0 stays the identity."""

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        along = u @ w
        self.slope = F.softplus(along + math.log(math.e - 1)) - 1  # > -1, and 0 at 0
        self.u, self.w, self.b = u + (self.slope - along) * w / w.square().sum(), w, b

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        height = torch.tanh(z @ self.w + self.b)
        return z + height[..., None] * self.u, torch.log1p(self.slope * (1 - height.square()))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """With a = w.z: a + slope tanh(a + b) = w.y, whose left side rises; by bisection, then a Newton step, which has the
        gradient.
        """
        target = y @ self.w
        with torch.no_grad():
            low, high = target - self.slope.abs(), target + self.slope.abs()
            for _ in range(60):
                a = (low + high) / 2
                below = a + self.slope * torch.tanh(a + self.b) < target
                low, high = torch.where(below, a, low), torch.where(below, high, a)
        height = torch.tanh(a + self.b)
        a = a - (a + self.slope * height - target) / (1 + self.slope * (1 - height.square())).detach()
        height = torch.tanh(a + self.b)
        return y - height[..., None] * self.u, torch.log1p(self.slope * (1 - height.square()))
