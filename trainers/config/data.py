"""The `data` sections of configurations: image sets and points; prompts, captioned images and samples for text-to-image."""

from __future__ import annotations

import typing
from collections.abc import Callable
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipelines.common.paths import user_path

UserPath = Annotated[str, AfterValidator(user_path)]  # of a file or folder, or what may stand in its place (a hub id)
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]  # what a tensor's shape can hold


class Idle(NamedTuple):
    """A key (a.b within its section) that has an effect only where acts(section); needs: what that is, in words."""

    key: str
    needs: str
    acts: Callable[[Any], Any]


def _holds_truth(value: Any) -> bool:
    """Itself or in a list; not deeper: what YAML's anchors make may have no end."""
    return isinstance(value, bool) or (isinstance(value, list) and any(isinstance(v, bool) for v in value))


def _of_numbers(annotation: Any) -> bool:
    """Whether a field takes numbers and no truth values."""
    leaves = _leaves(annotation)
    return bool(leaves & {int, float}) and bool not in leaves


def _leaves(annotation: Any) -> set[type]:
    """The types that an annotation is made of; of a Literal those of its values."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {annotation}
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return set().union(*map(_leaves, typing.get_args(annotation)))


class Strict(BaseModel):
    """idle: keys that other settings can make void. There they must have their defaults: what would have no effect is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    idle: ClassVar[tuple[Idle, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, section: Any) -> Any:
        """pydantic takes true for 1: one step, a rate of 1.0."""
        for key, value in section.items() if isinstance(section, dict) else ():
            if _holds_truth(value) and key in cls.model_fields and _of_numbers(cls.model_fields[key].annotation):
                truth = str(value).lower()
                raise ValueError(f"{key} is {truth}, expected a number (YAML makes true and false of yes, no, on and off too)")
        return section

    @model_validator(mode="after")
    def _nothing_idle(self):
        for rule in self.idle:
            *parents, name = rule.key.split(".")
            section = attrgetter(".".join(parents))(self) if parents else self
            field = getattr(type(section), "model_fields", {}).get(name)  # None: this kind of section has no such key
            if field is None or getattr(section, name) == field.get_default(call_default_factory=True) or rule.acts(self):
                continue
            default = "" if field.is_required() or field.default is None else f", or set it to its default, {field.default}"
            raise ValueError(f"{rule.key} has no effect without {rule.needs}; remove it{default}")
        return self


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
    """What Stable Diffusion is distilled on. It is encoded once, into `cache`: a folder that several runs may share, and that
    another model or another image size may not use (default: <output_dir>/cache)."""

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
    guidance_scale: float = 7.5
    images_per_prompt: PositiveInt = 1


TEXT_DATA = (Prompts, Captions, TeacherSamples)
Data = Annotated[
    DigitsData | ParquetData | HubData | FolderData | MixtureData | Prompts | Captions | TeacherSamples,
    Field(discriminator="name"),
]
