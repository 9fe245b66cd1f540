"""The `data` sections of configurations: image sets and points; prompts, captioned images and samples for text-to-image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipelines.common.strict import Idle, PositiveFloat, PositiveInt, StockGuidance, Strict, UserPath


class DigitsData(Strict):
    """The 8x8 digits that come with this project, enlarged bilinearly to image_size."""

    name: Literal["digits"]
    image_size: Annotated[int, Field(ge=8)] = 8
    labels: bool = False


def _colour(name: str) -> str:
    from PIL import ImageColor

    try:
        channels = len(ImageColor.getrgb(name))
    except ValueError:
        channels = 0
    if channels != 3:
        raise ValueError("Input should be a colour, by name or as #rrggbb")
    return name


# What transparent pictures are put on: the colour of a page, by name ("white") or as "#rrggbb". null: they are refused.
Background = Annotated[str, AfterValidator(_colour)] | None


class ColumnsData(Strict):
    image_size: PositiveInt
    channels: Literal[1, 3] = 3
    image_column: str = "image"
    label_column: str | None = None
    background: Background = "white"


class ParquetData(ColumnsData):
    name: Literal["parquet"]
    files: Annotated[list[UserPath], Field(min_length=1)]


class HubData(ColumnsData):
    name: Literal["hub"]
    id: UserPath
    split: str = "train"


class FolderData(Strict):
    """A folder or zip file of pictures. labels: classes by EDM's dataset.json or by the folders directly below it."""

    name: Literal["folder"]
    path: UserPath
    image_size: PositiveInt
    channels: Literal[1, 3] = 3
    labels: bool = False
    background: Background = "white"


class MixtureData(Strict):
    """num_samples points of a Gaussian mixture in d dimensions, images of d channels and one pixel.

    means (k, d), None: the forty modes in the plane on which VarDiU was shown; std and weights: one number or one for each mean.
    """

    name: Literal["mixture"]
    means: Annotated[list[Annotated[list[float], Field(min_length=1)]], Field(min_length=1)] | None = None
    std: PositiveFloat | list[PositiveFloat] | None = None  # None: the forty modes' own; needed with means
    weights: list[PositiveFloat] | None = None  # None: equal
    num_samples: Annotated[int, Field(ge=2)] = 1_000_000
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self):
        if (self.means is None) != (self.std is None):
            raise ValueError("means, std: give both or, for the forty modes, neither")
        if self.means is None and self.weights is not None:
            raise ValueError("weights: the forty modes are equally likely; remove it, or give means and std")
        if self.means is not None:
            k, d = len(self.means), len(self.means[0])
            if any(len(m) != d for m in self.means):
                raise ValueError(f"means must be points of equally many dimensions, as the first, which has {d}")
            for key in ("std", "weights"):
                value = getattr(self, key)
                if isinstance(value, list) and len(value) != k:
                    raise ValueError(f"{key} has {len(value)} numbers for {k} means; give one for each")
        return self


class TextData(Strict):
    """What text-to-image teachers are distilled on. It is encoded once, into `cache`: a folder that several runs may share, and
    that another model or another image size may not use (default: <output_dir>/cache)."""

    cache: UserPath | None = None
    image_size: PositiveInt | None = None  # side of the square images in pixels; None: the teacher's own


COLUMN = Idle("column", "a file with columns (.csv, .jsonl, .parquet)", lambda data: not data.file.lower().endswith(".txt"))


class Prompts(TextData):
    """A .txt with a prompt a line, or a column of a .csv, .jsonl or .parquet; a list of captions counts as that many prompts."""

    idle = (COLUMN,)
    name: Literal["prompts"]
    file: UserPath
    column: str = "caption"


class Captions(TextData):
    """Images with captions. paths: parquet files, webdataset .tar files, one folder (or zip file) of images with metadata.csv,
    .jsonl or .parquet (file_name, caption), or the hub id of a data set."""

    idle = (Idle("split", "source hub", lambda data: data.source == "hub"),)
    name: Literal["captions"]
    source: Literal["parquet", "webdataset", "imagefolder", "hub"]
    paths: Annotated[list[UserPath], Field(min_length=1)]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "caption"
    background: Background = "white"


class TeacherSamples(TextData):
    """Images that the teacher makes for prompts, with its own scheduler: data for those who have none."""

    idle = (COLUMN,)
    name: Literal["teacher_samples"]
    file: UserPath
    column: str = "caption"
    num_inference_steps: PositiveInt = 50
    guidance_scale: StockGuidance = 7.5
    images_per_prompt: PositiveInt = 1


TEXT_DATA = (Prompts, Captions, TeacherSamples)
Data = Annotated[
    DigitsData | ParquetData | HubData | FolderData | MixtureData | Prompts | Captions | TeacherSamples,
    Field(discriminator="name"),
]
