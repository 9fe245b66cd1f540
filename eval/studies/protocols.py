"""Protocols of the studies that need nothing from elsewhere: a teacher and its students beside real images that are here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..protocols import DIGITS, EMOJI, check_number


@dataclass(frozen=True)
class Protocol:
    """num_images generated from `seed` on, compared with the images of `dataset` by the features of `extractor`.

    standard_images is the protocol's own num_images; where they differ the report says so.
    """

    name: str
    dataset: str
    extractor: str
    num_images: int
    seed: int = 0
    batch_size: int = 500

    @property
    def standard_images(self) -> int:
        """How many images the protocol of this name has."""
        return PROTOCOLS[self.name].num_images

    @property
    def is_standard(self) -> bool:
        """Whether as many images are drawn as the protocol has."""
        return self.num_images == self.standard_images

    def adjusted(self, num_images: int | None = None, seed: int | None = None, force: bool = False) -> Protocol:
        """A copy with another seed or number of images; the latter only by force, since FD depends on it (else a UserError)."""
        n = self.num_images if num_images is None else num_images
        check_number(n, self.standard_images, self.name, force)
        return replace(self, num_images=n, seed=self.seed if seed is None else seed)


PROTOCOLS: dict[str, Protocol] = {
    DIGITS: Protocol(DIGITS, dataset="digits", extractor="digits-classifier", num_images=10_000),
    EMOJI: Protocol(EMOJI, dataset="emoji", extractor="emoji_clip", num_images=2_000, batch_size=32),
}
