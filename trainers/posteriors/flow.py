"""A conditional normalising flow over z (c, h, w): couplings and invertible convolutions at several scales, exact both ways.

Real NVP's couplings and scales (Dinh, Sohl-Dickstein & Bengio 2017), Glow's convolutions between them (Kingma & Dhariwal 2018)
and, if wanted, rational-quadratic splines (Durkan et al. 2019, Neural Spline Flows).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zuko.transforms import MonotonicRQSTransform

from pipelines.common.errors import UserError

from .density import Covariance, Scale, Shift, Whitening
from .invertible_conv import InvertibleConv


class Affine:
    """y = x exp(s) + shift with s = 2 tanh(raw / 2), so that one coupling stretches by at most e^2."""

    PARAMETERS = 2

    def __init__(self, parameters: Tensor) -> None:
        self.shift, raw = parameters.unbind(-1)
        self.log_scale = 2 * torch.tanh(raw / 2)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self.log_scale

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.shift) * torch.exp(-self.log_scale), self.log_scale


class Spline:
    """A monotonic rational-quadratic spline of BINS bins on [-BOUND, BOUND], the identity outside and at parameters 0."""

    BINS = 8
    PARAMETERS = 3 * BINS - 1  # widths and heights of the bins, derivatives at the knots between them
    BOUND = 5.0
    # Derivatives at knots stay in [SLOPE, 1 / SLOPE], slopes between them in about e^-9 to e^4: plenty for one coupling. With
    # 1e-2 the inverse can be NaN in float32.
    SLOPE = 0.1

    def __init__(self, parameters: Tensor) -> None:
        sections = parameters.split([self.BINS, self.BINS, self.BINS - 1], dim=-1)
        self.spline = MonotonicRQSTransform(*sections, bound=self.BOUND, slope=self.SLOPE)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.call_and_ladj(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.spline.inv(y)
        return x, self.spline.log_abs_det_jacobian(x, y)


Transform = Literal["affine", "spline"]
TRANSFORMS: dict[Transform, type[Affine] | type[Spline]] = {"affine": Affine, "spline": Spline}


class Coupling(nn.Module):
    """One half of the channels is transformed elementwise, as a network of the other half and of the features says.

    x (b, k, c, h, w); features (b, FEATURES, h, w), each used for k latents. The network's last layer starts at zero, where both
    transforms are the identity.
    """

    FEATURES = 8

    def __init__(self, channels: int, first_passive: bool, transform: Transform, hidden: int) -> None:
        super().__init__()
        self.sections, self.first_passive = [channels // 2, channels - channels // 2], first_passive
        passive, active = self.sections if first_passive else self.sections[::-1]
        self.transform = TRANSFORMS[transform]
        # Two convolutions instead of one over concatenated channels, so that the features are read once, not k times.
        self.read_passive = nn.Conv2d(passive, hidden, 3, padding=1)
        self.read_features = nn.Conv2d(self.FEATURES, hidden, 3, padding=1, bias=False)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.write = nn.Conv2d(hidden, active * self.transform.PARAMETERS, 3, padding=1)
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """x -> y (b, k, c, h, w) and log |det dy/dx| (b, k)."""
        passive, active = self._halves(x)
        active, log_slope = self._conditioned(passive, features)(active)
        return self._joined(passive, active), log_slope.sum((2, 3, 4))

    def inverse(self, y: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """y -> x (b, k, c, h, w) and log |det dy/dx| (b, k)."""
        passive, active = self._halves(y)
        active, log_slope = self._conditioned(passive, features).inverse(active)
        return self._joined(passive, active), log_slope.sum((2, 3, 4))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.sections, dim=2)
        return (first, second) if self.first_passive else (second, first)

    def _joined(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat([passive, active] if self.first_passive else [active, passive], dim=2)

    def _conditioned(self, passive: Tensor, features: Tensor) -> Affine | Spline:
        read = self.read_passive(passive.flatten(0, 1)).unflatten(0, passive.shape[:2]) + self.read_features(features)[:, None]
        hidden = F.silu(self.mix(F.silu(read.flatten(0, 1))))
        # One channel's parameters stand together: (b, k, active, PARAMETERS, h, w).
        parameters = self.write(hidden).unflatten(1, (-1, self.transform.PARAMETERS)).unflatten(0, passive.shape[:2])
        return self.transform(parameters.movedim(3, -1))


class Step(nn.Module):
    """An invertible convolution, then a coupling; the convolution of a scale's first step is its space-to-depth."""

    def __init__(self, channels: int, block: int, first_passive: bool, transform: Transform, hidden: int) -> None:
        super().__init__()
        self.conv = InvertibleConv(channels, block)
        self.coupling = Coupling(channels * block**2, first_passive, transform, hidden)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.conv(x)
        x, more = self.coupling(x, features)
        return x, log_det + more

    def inverse(self, y: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.coupling.inverse(y, features)
        y, more = self.conv.inverse(y)
        return y, log_det + more


class Flow(Covariance):
    """Independent pixels, then at each scale space-to-depth by 2 and `blocks` steps, after which the second half of the channels
    (at first the high frequencies) is done and the first half goes on. Work is linear in the number of pixels.

    Scales: while both sides are even, at most MAX_SCALES; one without space-to-depth if they are odd from the start.
    Maps: c means, c log standard deviations, Coupling.FEATURES for the couplings, averaged down to each scale's resolution.
    """

    MAX_SCALES = 3  # the third already sees 8x8 pixels as one place, and its 3x3 convolutions 24x24

    def __init__(self, shape: tuple[int, int, int], blocks: int = 4, transform: Transform = "affine", hidden: int = 32) -> None:
        super().__init__(shape)
        c, h, w = shape
        self.num_maps = 2 * c + Coupling.FEATURES
        self.scales = nn.ModuleList()
        self.out_shapes: list[tuple[int, int, int]] = []  # of x after each scale
        self.factors: list[int] = []  # by which it is smaller than the maps there
        factor = 1
        while not self.scales or (h % 2 == w % 2 == 0 and len(self.scales) < self.MAX_SCALES):
            block = 2 if h % 2 == w % 2 == 0 else 1
            if c * block**2 < 2:
                raise UserError(
                    f"objective.posterior.covariance='flow' couples halves of the channels, and {h}x{w} images of one channel "
                    "have none: an odd side rules out space-to-depth. Use images with even sides, or covariance 'dct'"
                )
            mixed, factor, h, w = c * block**2, factor * block, h // block, w // block
            steps = [Step(c, block, True, transform, hidden)]
            steps += [Step(mixed, 1, i % 2 == 0, transform, hidden) for i in range(1, blocks)]
            self.scales.append(nn.ModuleList(steps))
            self.out_shapes.append((mixed, h, w))
            self.factors.append(factor)
            c = mixed // 2

    @property
    def steps(self) -> list[list[Step]]:
        """Of each scale."""
        scales = [scale for scale in self.scales if isinstance(scale, nn.ModuleList)]
        return [[step for step in scale if isinstance(step, Step)] for scale in scales]

    def whitening(self, maps: Tensor) -> list[Whitening]:
        c = self.shape[0]
        mean, log_std, features = maps.tensor_split([c, 2 * c], dim=1)
        return [Shift(mean), Scale(log_std), ConditionedFlow(self, [F.avg_pool2d(features, f) for f in self.factors])]


class ConditionedFlow:
    """The scales of a Flow as a map of z (b, k, d), given the features (b, FEATURES, h, w) at the resolution of each."""

    def __init__(self, flow: Flow, features: list[Tensor]) -> None:
        self.flow, self.features = flow, features

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        going_on, log_det = z.unflatten(2, self.flow.shape), z.new_zeros(z.shape[:2])
        done: list[Tensor] = []
        for steps, features in zip(self.flow.steps, self.features, strict=True):
            for step in steps:
                going_on, more = step(going_on, features)
                log_det = log_det + more
            half = going_on.shape[2] // 2
            going_on, leaving = going_on.tensor_split([half], dim=2)
            done.append(leaving.flatten(2))
        return torch.cat([*done, going_on.flatten(2)], dim=2), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        shapes, log_det = self.flow.out_shapes, y.new_zeros(y.shape[:2])
        sizes = [(c - c // 2) * h * w for c, h, w in shapes]
        *done, coming = y.split([*sizes, y.shape[2] - sum(sizes)], dim=2)
        c, h, w = shapes[-1]
        coming = coming.unflatten(2, (c // 2, h, w))
        for i in reversed(range(len(shapes))):
            coming = torch.cat([coming, done[i].unflatten(2, (-1, *shapes[i][1:]))], dim=2)
            for step in reversed(self.flow.steps[i]):
                coming, more = step.inverse(coming, self.features[i])
                log_det = log_det + more
        return coming.flatten(2), log_det
