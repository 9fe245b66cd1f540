"""Encode text-to-image data once: `accelerate launch -m trainers.cache --config configs/X.yaml [a.b=value ...]`.

Takes the configuration of a distillation or of a Stable Diffusion teacher and makes the cache that it needs (data.cache), shared
out over all processes; stopped and started again, it goes on. The training commands do it themselves where it is not done.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipelines.common.config import read_raw
from pipelines.common.errors import UserError, shown
from pipelines.common.launch import user_errors
from pipelines.data.images import summary_of
from pipelines.data.walk import say
from pipelines.denoiser import Condition

from . import command
from .config.data import TEXT_DATA
from .config.run import DistillConfig, TeacherConfig
from .data import shards
from .data.sources import CaptionRows, PromptRows
from .families import family_for


class Encoder(Protocol):
    """What a family encodes rows with: called with row numbers it gives what the cache keeps of them, key -> (n, ...).

    shape (c, h, w) of the latents of images of image_size^2 pixels; overlong: prompts of more than most_tokens, which are cut;
    identity: what encoded rows depend on besides the prompts and images themselves.
    """

    shape: tuple[int, int, int]
    image_size: int
    most_tokens: int
    overlong: list[int]
    identity: dict[str, Any]

    def __call__(self, index: range) -> dict[str, Tensor]: ...

    def null(self) -> Condition:
        """What guidance leads away from, unbatched."""


class Encoded:
    """Rows behind a cache, and the null condition: all that text encoders and VAE are needed for.

    The cache in `folder` holds what they put out, so that the encoder can be freed when this is made.
    """

    def __init__(self, rows: PromptRows, encoder: Encoder, folder: Path, accelerator: Accelerator) -> None:
        self.shape, self.image_size, self.overlong = encoder.shape, encoder.image_size, encoder.overlong
        if self.overlong and accelerator.is_main_process:
            first, most = shown(rows.prompts[self.overlong[0]], 200), encoder.most_tokens
            print(f"{len(self.overlong)} of {len(rows)} prompts have more than {most} tokens and were cut; the first: {first}")
        shards.build(folder, rows.identity | encoder.identity, len(rows), encoder, accelerator)
        if isinstance(rows, CaptionRows):
            notes = Counter[str]()
            for own in gather_object([dict(rows.notes)]):  # of all processes
                notes.update(own)
            say(summary_of(notes, "data"))
        self.prompts = rows.prompts
        self.examples = shards.Cached(folder)
        self.null = encoder.null()


def kind_of(argv: list[str] | None) -> type[DistillConfig] | type[TeacherConfig]:
    """A teacher's configuration is one that names a pipeline to train further."""
    return TeacherConfig if read_raw(*command.arguments(__doc__, argv)).get("pipeline") is not None else DistillConfig


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        config = command.parse(kind_of(argv), __doc__, argv)
        if not isinstance(config.data, TEXT_DATA):
            raise UserError("data: only prompts, captions and teacher_samples are encoded; this configuration has none of them")
        accelerator = command.make_accelerator(config)
        encoded = family_for(config).encoded(config, accelerator)
        if accelerator.is_main_process:
            print(f"{len(encoded.examples)} rows in {config.data.cache or f'{config.output_dir}/cache'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
