"""VarDiU's configuration, and what its estimators of the student's gradient are built from: bound, resampled, amortized.py, and
batch_bound.py, which needs no posterior.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.common.strict import PositiveFloat, PositiveInt
from pipelines.noise import Weight

from ..config.level_range import sampler
from ..config.levels import Levels, Use
from ..config.networks import Optimizer
from ..posteriors.section import Posterior
from .amortized import AmortizedScore
from .base import LeastBatch, Need, Objective, ObjectiveConfig, Parts
from .batch_bound import BatchBound
from .bound import VarDiU
from .resampled import ResampledScore

# estimator -> what is built, and which of the keys below have an effect: the others belong to all
ESTIMATORS: dict[str, tuple[type[VarDiU], tuple[str, ...]]] = {
    "bound": (VarDiU, ("control_variate", "antithetic")),
    "multi_sample": (VarDiU, ("proposals", "num_samples", "control_variate", "antithetic")),
    "resampled_score": (ResampledScore, ("num_samples", "target_ess", "moves", "ess_levels", "antithetic")),
    "amortized_score": (
        AmortizedScore,
        ("num_samples", "noise_draws", "regression_weight", "regression_weighting", "pool"),
    ),
}


class Config(ObjectiveConfig):
    built = VarDiU
    name: Literal["vardiu"]
    estimator: Literal["bound", "multi_sample", "resampled_score", "amortized_score"] = "amortized_score"
    proposals: Literal["posterior", "batch"] = "posterior"  # of multi_sample; batch: its other samples, and no posterior
    num_samples: Annotated[int, Field(ge=0)] | None = None  # K; None: 16, for amortized_score 0 (the batch is the pool)
    levels: Levels
    weighting: Weight = "sigma2"
    antithetic: bool = True  # +-eps for each z
    control_variate: bool = True
    target_ess: Annotated[float, Field(ge=1)] | None = None  # temper the weights until so many proposals count
    moves: Annotated[int, Field(ge=0)] = 0  # of z_0 among proposals, num_samples each time, before averaging
    ess_levels: bool = False  # draw levels in proportion to their effective sample size
    pool: Literal["batch", "own"] = "batch"  # what the target averages over; own: nothing but the sample itself
    noise_draws: PositiveInt = 2  # noised copies of each student sample
    regression_weight: PositiveFloat = 80.0  # of the posterior mean against log q, whose trunk it shares
    regression_weighting: Weight = "edm"  # of levels in that regression: edm is the error of v, snr that of the noise
    posterior: Posterior | None = None

    @model_validator(mode="after")
    def _options_fit_the_estimator(self):
        for key in dict.fromkeys(key for _, keys in ESTIMATORS.values() for key in keys):
            estimators = [name for name, (_, keys) in ESTIMATORS.items() if key in keys]
            if getattr(self, key) != type(self).model_fields[key].default and self.estimator not in estimators:
                known = " ".join(estimators)
                raise ValueError(f"{key} has no effect with estimator={self.estimator!r}; remove it (it is for {known})")
        for key in ("num_samples", "control_variate", "antithetic"):
            if self.on_batch and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with proposals=batch, which has pairs +-eps; remove it")
        if self.on_batch != (self.posterior is None):
            wrong = "has no effect with proposals=batch, which needs none; remove it" if self.on_batch else "is missing"
            raise ValueError(f"posterior {wrong}")
        if self.num_samples == 0 and self.estimator in ("multi_sample", "resampled_score"):
            raise ValueError(f"num_samples must be at least 1 for estimator={self.estimator!r}; got 0")
        if self.pool == "own" and self.samples:
            raise ValueError("pool=own and num_samples > 0 exclude each other: proposals are a pool")
        if self.ess_levels and self.samples == 1:
            raise ValueError("ess_levels needs num_samples of at least 2: a single proposal always counts as one")
        if self.target_ess and self.target_ess > self.samples:
            raise ValueError(f"target_ess ({self.target_ess:g}) must not be above num_samples ({self.samples})")
        if self.target_ess and self.moves:
            raise ValueError("target_ess and moves exclude each other: moves are exact for untempered weights only")
        return self

    @property
    def on_batch(self) -> bool:
        return self.proposals == "batch"

    @property
    def least_batch(self) -> LeastBatch:
        return LeastBatch(2, "its proposals are the batch's other samples") if self.on_batch else super().least_batch

    @property
    def samples(self) -> int:
        """K."""
        default = {"bound": 0, "amortized_score": 0}.get(self.estimator, 16)
        return default if self.num_samples is None else self.num_samples

    def uses(self) -> list[Use]:
        weightings = {"objective.weighting": self.weighting}
        if self.estimator == "amortized_score":
            weightings["objective.regression_weighting"] = self.regression_weighting
        return [Use("objective.levels", self.levels, weightings)]

    def few_steps_refusal(self) -> str | None:
        """Of a later step x_t depends on z and on where the step began, s. As I(x_t; z, s) = I(x_t; s) + I(x_t; z | s), with the
        density of z alone the bound on the negative entropy of x_t is loose by I(x_t; s): the more, the more a step makes of its
        input, which it would unlearn. Likewise weights p(z) / q(z | x_t) average over z at one s. The regression of
        amortized_score is on x_t alone: over both.
        """
        if self.estimator == "amortized_score" and not self.samples:
            return None
        if self.on_batch:
            return "objective.proposals: samples of a batch make different steps, and would stand for one another's proposals"
        what = f"estimator={self.estimator!r}" + (f" with num_samples={self.samples}" if self.samples else "")
        return (
            f"objective.estimator: {what} knows the density of a step's noise z, not of what the step begins with, and would "
            "teach later steps to ignore it; use estimator=amortized_score without num_samples"
        )

    def needs(self) -> list[Need]:
        network = None if self.posterior is None else self.posterior.network
        return [
            Need("objective.posterior.network", "posterior", network),
            Need("objective.proposals: batch", "batch_proposals", self.on_batch),
        ]

    def optimizers(self) -> dict[str, Optimizer]:
        return {} if self.posterior is None else {"posterior": self.posterior.optimizer}

    def build(self, parts: Parts, steps: int) -> Objective:
        levels, p = sampler(self.levels, steps, parts.teacher.schedule.t_range), self.posterior
        if p is None:
            return BatchBound(parts.student, parts.teacher, levels, self.weighting)
        kind, keys = ESTIMATORS[self.estimator]
        own: dict[str, Any] = {key: getattr(self, key) for key in keys if key != "proposals"} | {"num_samples": self.samples}
        return kind(
            parts.student,
            parts.teacher,
            parts.posterior(p, with_mean=self.estimator == "amortized_score"),
            levels=levels,
            weighting=self.weighting,
            posterior_updates=p.updates,
            warmup_updates=p.warmup_updates,
            min_information=p.min_information,
            **own,
        )
