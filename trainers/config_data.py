"""The `data` sections of configurations: image sets for pixel models; prompts, captioned images and samples for text-to-image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DigitsData(Strict):
    """The 8x8 digits that ship with scikit-learn, enlarged bilinearly to image_size."""

    name: Literal["digits"]
    image_size: Annotated[int, Field(ge=8)] = 8
    labels: bool = False


class ColumnsData(Strict):
    image_size: PositiveInt
    channels: Literal[1, 3] = 3
    image_column: str = "image"
    label_column: str | None = None


class ParquetData(ColumnsData):
    name: Literal["parquet"]
    files: Annotated[list[str], Field(min_length=1)]


class HubData(ColumnsData):
    name: Literal["hub"]
    id: str
    split: str = "train"


class FolderData(Strict):
    name: Literal["folder"]
    path: str
    image_size: PositiveInt
    channels: Literal[1, 3] = 3
    labels: bool = False


class TextData(Strict):
    """What Stable Diffusion is distilled on. It is encoded once, into `cache`: a folder that several runs may share, and that
    another model or another image size may not use (default: <output_dir>/cache)."""

    cache: str | None = None
    image_size: PositiveInt | None = None  # side of the square images in pixels; None: the teacher's own


class Prompts(TextData):
    """A .txt with a prompt a line, or a column of a .csv, .jsonl or .parquet; a list of captions counts as that many prompts."""

    name: Literal["prompts"]
    file: str
    column: str = "caption"


class Captions(TextData):
    """Images with captions. paths: parquet files, webdataset .tar files, one image folder with metadata.csv or metadata.jsonl
    (file_name, caption), or the hub id of a data set."""

    name: Literal["captions"]
    source: Literal["parquet", "webdataset", "imagefolder", "hub"]
    paths: Annotated[list[str], Field(min_length=1)]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "caption"


class TeacherSamples(TextData):
    """Images that the teacher makes for prompts, with its own scheduler: data for those who have none."""

    name: Literal["teacher_samples"]
    file: str
    column: str = "caption"
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 7.5
    images_per_prompt: PositiveInt = 1


TEXT_DATA = (Prompts, Captions, TeacherSamples)
Data = Annotated[
    DigitsData | ParquetData | HubData | FolderData | Prompts | Captions | TeacherSamples, Field(discriminator="name")
]
