"""What a run shows of itself at each sample step: a grid of pictures, three numbers of them, the teacher's beside them, a page.

The numbers go to pictures.jsonl, a line a sample step; those of the teacher to samples/teacher.json. They are functions of the
weights and the seed alone, so that the file of a resumed run is, byte for byte, that of one that was never stopped.

Cost: at each sample step PICTURES more calls of the student; at the first one of each start PICTURES_OF_TEACHER * TEACHER_STEPS
calls of the teacher (twice as many with guidance), never more than PICTURES of them in one batch. No draw of the training is
touched, since every generator here has a seed of its own; nor are the calls counted that student.json reports.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image

from pipelines.common import atomic
from pipelines.common.launch import on_main
from pipelines.denoiser import Condition, Denoiser
from pipelines.noise import EDMSchedule, Schedule, add_noise, karras_t, to_eps

from ..families.base import Family
from .draws import derive_seed
from .ema import Ema
from .log import RunLog

PICTURES = 8
PICTURES_OF_TEACHER = 2 * PICTURES  # as many under different conditions as under one
TEACHER_STEPS = 20


def picture_numbers(pictures: Tensor, alike: Tensor) -> dict[str, float]:
    """Of pictures (n, c, h, w) in [0, 1]: how far their values spread, how many are clipped, how different they are.

    spread: standard deviation of all values. saturation: share of the values that are black (0) or full (255) in 8 bits.
    diversity: of `alike`, pictures (m, c, h, w) under one condition, the mean over all pairs of the root mean square difference.
    """
    values = (pictures.double() * 255).round()
    rows = alike.double().flatten(1)
    distances = torch.pdist(rows) / rows.shape[1] ** 0.5
    return {
        "spread": float(pictures.double().std()),
        "saturation": float(((values <= 0) | (values >= 255)).double().mean()),
        "diversity": float(distances.mean()),
    }


@torch.no_grad()
def sample_teacher(teacher: Denoiser, z: Tensor, condition: Condition, times: Tensor) -> Tensor:
    """x0 (b, c, h, w) from unit noise z by DDIM (Song et al. 2021, Eq. 12, sigma = 0) at descending `times`."""
    levels = [teacher.schedule.level(t.expand(len(z)).to(z.device)) for t in teacher.schedule.nearest(times)]
    x_t = teacher.schedule.initial_noise(z, levels[0])
    for level, following in pairwise(levels):
        x0 = teacher(x_t, level, condition)
        x_t = add_noise(x0, to_eps(x0, x_t, level), following)
    return teacher(x_t, levels[-1], condition)


def sampling_times(schedule: Schedule, low: float, high: float, steps: int = TEACHER_STEPS) -> Tensor:
    """Descending times (steps,): EDM's own grid from high to low (Karras et al. 2022, Eq. 5), else equal steps down from `high`,
    as diffusers' "trailing" spacing has them.
    """
    if isinstance(schedule, EDMSchedule):
        return karras_t(torch.linspace(1, 0, steps), low, high)
    return high - torch.arange(steps) * (high - low) / steps


class Watch:
    """The numbers of a student's pictures and, for comparison, of its teacher's: the same conditions, the same number."""

    def __init__(self, models: Family, seed: int, device: torch.device) -> None:
        self.models, self.device = models, device
        generator = torch.Generator().manual_seed(derive_seed(seed, "pictures"))
        self.z = torch.randn(models.student.steps, PICTURES, *models.latent_shape, generator=generator)

    def student(self, preview: Tensor) -> dict[str, float]:
        """preview: its pictures (n, c, h, w) in [0, 1]; the averaged weights are in place."""
        with torch.no_grad():
            drawn = self.models.student.sample(self.z.to(self.device), self._condition(torch.zeros(PICTURES).long()))
            alike = self.models.decode(drawn)
        return picture_numbers(preview[:PICTURES].cpu(), alike.cpu())

    def teacher(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """(its pictures of the first PICTURES of the `count` conditions that a run shows; their numbers)."""
        shown = self.models.shown(count)[:PICTURES]
        pictures, alike = (self._of_teacher(rows) for rows in (shown, torch.zeros(PICTURES).long()))
        return pictures, picture_numbers(pictures, alike)

    def _of_teacher(self, rows: Tensor) -> Tensor:
        teacher, drawn = self.models.teacher, []
        times = sampling_times(teacher.schedule, *self.models.sampling_range)
        chunk = PICTURES // teacher.calls_per_sample  # so that guidance takes no more memory than the student's pictures
        for index, z in zip(rows.split(chunk), self.z[0, : len(rows)].split(chunk), strict=True):
            x0 = sample_teacher(teacher, z.to(self.device), self._condition(index), times)
            with torch.no_grad():
                drawn.append(self.models.decode(x0).cpu())
        return torch.cat(drawn)

    def _condition(self, rows: Tensor) -> Condition:
        condition = self.models.condition(rows)
        return None if condition is None else {k: v.to(self.device) for k, v in condition.items()}


class Pictures:
    """Called on every process, since where weights are sharded none can run a network alone; written by the main one.

    preview() gives pictures (n, c, h, w) in [0, 1]. page(state, step), where given, draws the run's page; state: what
    the run is doing.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        log: RunLog,
        ema: Ema,
        preview: Callable[[], Tensor],
        watch: Watch | None,
        page: Callable[[str, int], None] | None,
    ) -> None:
        self.accelerator, self.folder, self.log, self.ema = accelerator, folder, log, ema
        self.preview, self.watch, self.page = preview, watch, page
        self._teacher_drawn = False
        self._said: set[str] = set()

    def draw(self, step: int) -> None:
        """samples/step_<step>.png, a line of pictures.jsonl; the first time the teacher's pictures too, where there is one."""
        with self.ema.swapped():
            drawn = self.preview()
            numbers = self.watch.student(drawn) if self.watch else {}
        compared = self.watch is not None and self.watch.models.has_teacher and not self._teacher_drawn
        teacher = self.watch.teacher(len(drawn)) if self.watch and compared else None
        self._teacher_drawn = True
        samples = self.folder / "samples"

        def write() -> None:
            save_grid(samples / f"step_{step:08d}.png", drawn)
            if teacher:
                save_grid(samples / "teacher.png", enlarged(teacher[0]))
                atomic.write_text(samples / "teacher.json", json.dumps({"steps": TEACHER_STEPS} | teacher[1]) + "\n")
            if numbers:
                self.log.write_pictures(step, numbers)

        on_main(self.accelerator, write)

    def draw_page(self, state: str, step: int) -> None:
        """Whatever goes wrong with the page is said, once for each cause: a training of days is worth more than a look at it.

        Ctrl-C and SystemExit pass. A full disk, too, is only said: the run's own next file will end it, with its last checkpoint
        named, if there is no room by then.
        """
        if self.page is None or not self.accelerator.is_main_process:
            return
        try:
            self.page(state, step)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
            if cause not in self._said:
                self._said.add(cause)
                self.log.warn(f"report.html could not be drawn, the training goes on: {cause}")


def enlarged(pictures: Tensor) -> Tensor:
    """Small pictures (n, c, h, w) by a whole factor, so that a person sees them."""
    scale = max(1, 32 // pictures.shape[-1])
    return pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def save_grid(file: Path, pictures: Tensor) -> None:
    """pictures (n, c, h, w) in [0, 1] in about as many rows as columns."""
    with atomic.new_file(file) as partial:
        save_image(pictures, partial, nrow=max(1, round(len(pictures) ** 0.5)))
