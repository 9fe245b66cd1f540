"""The noise levels an EDM model is sampled at and its preconditioning, stored beside the weights as scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from ..common.errors import UserError
from ..preconditioning import EDM, IDDPM, PRECONDITIONERS, VE, VP, Preconditioner
from .layout import PRECONDITIONING, check_preconditioning


class EDMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # of their two config_name one is None
    """sigma_data: the data's standard deviation, part of EDM's preconditioning. sigma_min/sigma_max/rho: the grid (Eq. 5).

    sampler "heun": EDM's second-order sampler (Algorithms 1 and 2), for teachers.
    sampler "renoise": x0 = D(x; sigma_i), then x = x0 + sigma_{i+1} eps, for one- and few-step students, whose readout
    level is sigma_max. num_inference_steps is the default number of steps.
    preconditioning: edm, vp, ve or iddpm (Table 1); sample: the network takes x_t and sigma as they are and predicts x0.
    beta_d, beta_min, epsilon_t are vp's, C_1 and C_2 iddpm's, M of both.
    network_sigma_min/max: the levels that an edm or ve network was made for, where they are not those of its preconditioning.
    student_sigmas: of a student of several steps, the levels that it was trained for: no grid takes their place.
    """

    @register_to_config
    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sampler: str = "heun",
        num_inference_steps: int = 18,
        preconditioning: str = "edm",
        beta_d: float = VP.beta_d,
        beta_min: float = VP.beta_min,
        epsilon_t: float = VP.epsilon_t,
        C_1: float = IDDPM.C_1,
        C_2: float = IDDPM.C_2,
        M: int = VP.M,
        network_sigma_min: float | None = None,
        network_sigma_max: float | None = None,
        student_sigmas: Sequence[float] | None = None,
    ) -> None:
        if sampler not in ("heun", "renoise"):
            raise UserError(f"scheduler.sampler is {sampler!r}; expected 'heun' or 'renoise'")
        if preconditioning not in PRECONDITIONERS:
            raise UserError(f"scheduler.preconditioning is {preconditioning!r}; expected one of {', '.join(PRECONDITIONERS)}")
        check_preconditioning(preconditioning, self.config)
        if student_sigmas is not None and (sampler != "renoise" or len(self.given(student_sigmas)) != num_inference_steps):
            raise UserError("scheduler.student_sigmas needs sampler='renoise' and num_inference_steps as many")
        if network_sigma_min is None and network_sigma_max is None:
            return
        if preconditioning not in ("edm", "ve"):
            raise UserError(f"scheduler.network_sigma_min and _max have no effect for {preconditioning}; remove them")
        low, high = self.preconditioner().sigma_range
        if not 0 <= low <= high:
            raise UserError(f"scheduler.network_sigma_min {low:g} is not below network_sigma_max {high:g}")

    def preconditioner(self) -> Preconditioner:
        """What the network is wrapped in, with the levels that it was made for."""
        c = self.config
        made = PRECONDITIONERS[c["preconditioning"]](**{key: c[key] for key in PRECONDITIONING[c["preconditioning"]]})
        low, high = c["network_sigma_min"], c["network_sigma_max"]
        if low is None and high is None:
            return made
        if not isinstance(made, EDM | VE):
            raise UserError(f"scheduler.network_sigma_min and _max have no effect for {c['preconditioning']}; remove them")
        usual = made.sigma_range
        return replace(made, sigma_range=(usual[0] if low is None else low, usual[1] if high is None else high))

    def for_student(self, steps: int | Sequence[float], sigma_init: float) -> EDMScheduler:
        """The sampler of a student that makes so many steps, from sigma_init down this scheduler's grid, or at these levels."""
        if isinstance(steps, int):
            low = min(self.config["sigma_min"], sigma_init)
            grid = {"sigma_min": low, "sigma_max": sigma_init, "sampler": "renoise", "num_inference_steps": steps}
            made = EDMScheduler.from_config(self.config, **grid)
            if steps == 1:
                return made
            levels = made.sigmas(steps).tolist()
        else:
            levels = self.given(steps).tolist()
        shape = {"sigma_min": min(self.config["sigma_min"], levels[-1]), "sigma_max": levels[0], "sampler": "renoise"}
        return EDMScheduler.from_config(
            self.config, **shape, num_inference_steps=len(levels), student_sigmas=levels if len(levels) > 1 else None
        )

    def default_sigmas(self, steps: int | None = None) -> Tensor:
        """(n,) float64: the levels of a call that names none. UserError for another number of steps than a student's own."""
        own = self.config["student_sigmas"]
        if own is None:
            return self.sigmas(self.config["num_inference_steps"] if steps is None else steps)
        if steps not in (None, len(own)):
            raise UserError(f"this student makes {len(own)} steps, at sigma {', '.join(f'{s:g}' for s in own)}; got {steps}")
        return self.given(own)

    def sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float | None = None,
    ) -> Tensor:
        """(n,) float64 descending from sigma_max; to sigma_min when n > 1 (Karras et al. 2022, Eq. 5), each moved to the nearest
        level that the network knows. "renoise" stops before sigma_min, where a call would change nothing. None: the scheduler's
        own. ValueError outside the network's range.
        """
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        c, known = self.config, self.preconditioner()
        given = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
        low, high, rho = (c[key] if value is None else value for key, value in given.items())
        if not (math.isfinite(rho) and rho > 0):
            raise UserError(f"rho must be positive and finite, got {rho:g}")
        if not (low <= high < math.inf and self._knows(low) and self._knows(high)):
            raise UserError(
                f"sigma_min={low:g}, sigma_max={high:g} must be in order and within what {c['preconditioning']} knows, "
                f"{known.sigma_range[0]:g} to {known.sigma_range[1]:g}, and finite"
            )
        points = num_inference_steps + (c["sampler"] == "renoise")
        ramp = torch.linspace(0, 1, points, dtype=torch.float64)[:num_inference_steps]
        first, last = high ** (1 / rho), low ** (1 / rho)
        grid = known.nearest((first + ramp * (last - first)) ** rho)
        if not bool((grid > 0).all()):
            raise UserError(f"sigma_min={low:g}: no step starts from sigma 0, which the last one reaches by itself; give more")
        return grid

    def given(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        """(n,) float64: the noise levels that a caller lists, each moved to the nearest that the network knows.

        UserError unless they are finite, positive, descending and within the network's range.
        """
        grid = torch.as_tensor(sigmas, dtype=torch.float64)
        low, high = self.preconditioner().sigma_range
        shown = grid.tolist()
        if grid.ndim != 1 or not len(grid):
            raise UserError(f"sigmas must be a list of at least one noise level, got {shown}")
        if shown[-1] == 0:
            raise UserError(f"sigmas end with 0, which the last step reaches by itself; leave it out: {shown[:-1]}")
        if not bool((grid.isfinite() & (grid > 0)).all()):
            raise UserError(f"sigmas must be positive and finite, got {shown}")
        if not bool((grid.diff() < 0).all()):
            raise UserError(f"sigmas must descend, from the most noise to the least; got {shown}")
        if not (self._knows(shown[0]) and self._knows(shown[-1])):
            raise UserError(
                f"sigmas must be within what {self.config['preconditioning']} knows, {low:g} to {high:g}; got {shown}"
            )
        return self.preconditioner().nearest(grid)

    def _knows(self, sigma: float) -> bool:
        low, high = self.preconditioner().sigma_range
        slack = 1 + 1e-4  # a bound that was read from a file may be rounded otherwise than here
        return low / slack <= sigma <= high * slack
