"""Evaluation protocols by name: everything that a published number depends on besides the model. Imports nothing heavy.

Sources: EDM, github.com/NVlabs/edm (fid.py, README); DMD2, github.com/tianweiy/DMD2 (COCO evaluation of SD 1.5 and SDXL).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.common.errors import UserError

# What a metric reads: extractor -> its metrics. precision_recall gives two numbers.
METRICS = {
    "fid": "inception",
    "kid": "inception",
    "inception_score": "inception",
    "precision_recall": "inception",
    "patch_fid": "inception_patch",
    "fd_dinov2": "dinov2",
    "cmmd": "clip_336",
    "clip_score": "clip",
    "aesthetic": "clip_aesthetic",
}
AGAINST_REFERENCE = ("fid", "kid", "precision_recall", "patch_fid", "fd_dinov2", "cmmd")
RAW_FEATURES = ("kid", "precision_recall", "cmmd")  # these compare images one by one, so a mean and a covariance are not enough
# images a side without which a metric says nothing: a covariance, pairs, a third neighbour, ten parts
LEAST_IMAGES = {"fid": 2, "kid": 2, "patch_fid": 2, "fd_dinov2": 2, "precision_recall": 4, "inception_score": 10}
LOWER_IS_BETTER = {"fid": True, "kid": True, "patch_fid": True, "fd_dinov2": True, "cmmd": True} | dict.fromkeys(
    ("inception_score", "precision", "recall", "clip_score", "aesthetic"), False
)
# studies of their own (eval/studies/) with --teacher and --student, of images and networks that are made here
STUDIES = DIGITS, EMOJI = ("digits-10k", "emoji-2k")
InceptionMode = Literal["clean", "legacy_tensorflow", "legacy_pytorch"]


@dataclass(frozen=True)
class Protocol:
    """num_images images of each of `draws` sets of seeds, prepared and compared in one way.

    size: the side that images must have as they come; crop_to: instead, the largest square from the middle, then Lanczos to
    this side (both for generated and for real images). grayscale: whether photos without colour are taken, as grey RGB.
    inception: how images reach its 299 pixels. report: what of several draws
    is the value, "min" or "mean". captions: the prompts are captions, one an image; None: no text.
    clip_model, clip_prefix: of the CLIP score, the raw cosine; clip_crop: its images are cropped and resized to this side first
    (None: the images that the other metrics see). reference, reference_images: what the real images should be,
    and how many.
    """

    name: str
    num_images: int
    source: str
    metrics: tuple[str, ...]
    reference: str
    reference_images: int | None = None
    inception: str = "clean"
    size: int | None = None
    crop_to: int | None = None
    draws: int = 1
    report: str = "mean"
    captions: str | None = None
    clip_model: str = "openai/clip-vit-large-patch14"
    clip_prefix: str = ""
    clip_crop: int | None = None
    grayscale: bool = False

    @property
    def processing(self) -> dict[str, object]:
        """What statistics of a reference depend on besides its images and the extractor."""
        return {"size": self.size, "crop_to": self.crop_to, "grayscale": self.grayscale}

    def require_images(self, n: int, what: str, metrics: tuple[str, ...] | None = None) -> None:
        """UserError if a metric (of `metrics`, default: all) needs more images than n. what: whose number that is."""
        for metric in self.metrics if metrics is None else metrics:
            if n < (least := LEAST_IMAGES.get(metric, 1)):
                raise UserError(
                    f"{what}: {n:,} image{'s' * (n != 1)}, {metric} needs at least {least}; add images or leave it out"
                )

    def departures(self, reference_images: int | None = None) -> list[str]:
        """How an evaluation differs from the protocol of its name; [] if it does not. reference_images: None where unknown."""
        standard, said = PROTOCOLS[self.name], list[str]()
        if self.name == "custom":
            return said
        if self.num_images != standard.num_images:
            said.append(f"{self.num_images:,} images instead of {standard.num_images:,}")
        if self.draws != standard.draws:
            said.append(f"{self.draws} of {standard.draws} draws")
        if reference_images not in (None, self.reference_images):
            said.append(f"a reference of {reference_images:,} images instead of {self.reference_images:,}")
        return said

    def adjusted(self, num_images: int | None, draws: int | None, metrics: list[str] | None, force: bool) -> Protocol:
        """With other numbers. UserError: another number of images without force, impossible numbers, unknown metrics."""
        n = self.num_images if num_images is None else num_images
        if num_images is not None:
            check_number(n, n if self.name == "custom" else self.num_images, self.name, force)
        for metric in metrics or ():
            if metric not in METRICS:
                raise UserError(f"--metrics: unknown {metric!r}{_near(metric, METRICS)}")
        chosen = self.metrics if metrics is None else tuple(m for m in METRICS if m in metrics)
        return replace(self, num_images=n, draws=self.draws if draws is None else draws, metrics=chosen)


EDM = "Karras et al. 2022, NVlabs/edm: one seed an image from 0, legacy TensorFlow resize, the least of three draws"
DMD2 = "Yin et al. 2024, tianweiy/DMD2: largest centred square, Lanczos, clean-fid; CLIP ViT-g-14 on 'A photo depicts ...'"
# DMD2 seeds its noise by batch of 10 and truncates to 8 bits; here every image has a seed and is rounded
VIT_G = "open_clip:ViT-g-14:laion2b_s12b_b42k"

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "cifar10-50k",
            50_000,
            EDM,
            ("fid",),
            "the 50,000 training images (EDM's cifar10-32x32.npz)",
            reference_images=50_000,
            inception="legacy_tensorflow",
            size=32,
            draws=3,
            report="min",
        ),
        Protocol(
            "imagenet64-50k",
            50_000,
            EDM,
            ("fid",),
            "the 1,281,167 training images (EDM's imagenet-64x64.npz)",
            reference_images=1_281_167,
            inception="legacy_tensorflow",
            size=64,
            draws=3,
            report="min",
        ),
        Protocol(
            "coco-30k",
            30_000,
            DMD2,
            ("fid", "clip_score"),
            "all 40,504 images of val2014",
            reference_images=40_504,
            crop_to=256,
            captions="30,000 captions of val2014 (DMD2 and GigaGAN: captions_coco14_test)",
            clip_model=VIT_G,
            clip_prefix="A photo depicts ",
            grayscale=True,
        ),
        Protocol(
            "coco-10k-512",
            10_000,
            DMD2,
            ("fid", "patch_fid", "clip_score"),
            "the 10,000 images of DMD2's coco10k",
            reference_images=10_000,
            crop_to=512,
            captions="the 10,000 prompts of DMD2's coco10k",
            clip_model=VIT_G,
            clip_prefix="A photo depicts ",
            clip_crop=256,
            grayscale=True,
        ),
        Protocol(
            "coco-5k",
            5_000,
            "this project: the first caption of each image, by image id (no canonical choice is published)",
            ("fid", "clip_score"),
            "the 5,000 images of val2017",
            reference_images=5_000,
            crop_to=256,
            captions="the first caption of each image of val2017, by image id",
            clip_model=VIT_G,
            grayscale=True,
        ),
        Protocol("custom", 0, "chosen by the user", ("fid",), "chosen by the user"),
    )
}


def check_number(n: int, standard: int, protocol: str, force: bool) -> None:
    """UserError for too few images, or for another number than the protocol's without force."""
    if n < 2:
        raise UserError(f"--num-images is {n}; statistics need at least 2 images")
    if n != standard and not force:
        raise UserError(
            f"--num-images is {n:,} but protocol {protocol} has {standard:,}, and these numbers depend on it; "
            "add --force to do it anyway (every report will say so)"
        )


def get_protocol(name: str) -> Protocol:
    """The protocol of this name. UserError for an unknown name, with the nearest known one, and for that of a study."""
    if name in STUDIES:
        raise UserError(f"protocol {name} is for `python -m eval run` with --teacher and --student")
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{_near(name, (*PROTOCOLS, *STUDIES))}")
    return PROTOCOLS[name]


def _near(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"
