"""SiD, score identity distillation (Zhou et al. 2024, arXiv 2404.04057): the Fisher divergence of noised student and teacher.

    E w sigma^2 |s_teacher - s_student|^2,   x_t = alpha_t g(z) + sigma eps,   s = (alpha_t D(x_t) - x_t) / sigma^2

With delta = D_teacher - D_fake at x_t, two estimates of it (their Eqs. 16 and 20): (alpha_t / sigma)^2 w times

    L1 = |delta|^2                     the fake score in place of the student's
    L2 = delta . (D_teacher - x0)      its projection on x0 = g(z): E[delta . (D_student - x0)] = 0

Neither alone, as the fake score lags behind, but (Eq. 23)

    L = L2 - alpha L1

whose gradient passes through x0 and, by x_t, through both networks: that is what a step costs more than Diff-Instruct's, a
backward pass and the activations of each. The fake score learns as Diff-Instruct's does. alpha = 1.2 and their weight, which is
"dmd" here (1 / mean |x0 - D_teacher|), are the published ones.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from pipelines.common.strict import PositiveFloat
from pipelines.noise import Level, Weight, weight

from .base import Draw, LossTerms, dot
from .fake_score import FakeScoreConfig, WithFakeScore


def sid_loss(x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor, level: Level, w: Tensor, alpha: float) -> Tensor:
    """w (alpha_t / sigma)^2 (L2 - alpha L1), (b,): x0 and both estimates of it (b, c, h, w), all with graphs; w (b, 1, 1, 1)."""
    delta = x0_teacher - x0_fake
    return dot(w * (level.alpha / level.sigma).square() * delta, x0_teacher - x0 - alpha * delta)


class SiD(WithFakeScore):
    def __init__(self, *args: Any, alpha: float = 1.2, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha = alpha

    def student_loss(self, draw: Draw, context: None = None) -> LossTerms:
        """(b,), with graphs through teacher and fake score, of whose parameters none gets a gradient."""
        x0, x_t, level = self.noised(draw)
        x0_teacher, features = self.read_teacher(x_t, level, draw.condition)
        x0_fake = self.fake(x_t, level, draw.condition, features)
        w = weight(self.weighting, level, x0, x0_teacher, self.teacher.sigma_data)
        loss = sid_loss(x0, x0_teacher, x0_fake, level, w, self.alpha)
        return LossTerms(loss, self.metrics(x0, x0_teacher, x0_fake))


class Config(FakeScoreConfig):
    built = SiD
    name: Literal["sid"]
    weighting: Weight = "dmd"
    alpha: PositiveFloat = 1.2

    def own(self) -> dict[str, Any]:
        return {"alpha": self.alpha}
