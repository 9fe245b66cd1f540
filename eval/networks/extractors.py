"""The networks behind the metrics: uint8 images (b, 3, h, w) -> float32 rows, each with an identity that goes into every report.

Inception comes as the TorchScript file of StyleGAN2-ADA and clean-fid, or as pytorch-fid's weights; CLIP and DINOv2 through
transformers or open_clip. All run in float32 without TF32, so that numbers do not depend on the GPU's generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.common.errors import UserError
from pipelines.common.identity import config_settings, processor_settings, tokenizer_sha256
from pipelines.common.reading import BY_FILES, loading

from ..content import ExtractorFacts
from .weights import OPEN_CLIP, Found

SIDE = 299  # what Inception sees
COPY = "copy or download it again"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
INPUTS = {
    "clean": "bicubic with antialiasing to 299, not rounded (clean-fid)",
    "legacy_tensorflow": "TensorFlow 1's bilinear resize inside the network (EDM, StyleGAN)",
    "legacy_pytorch": "bilinear without antialiasing to 299 (pytorch-fid)",
}


class Extractor(Protocol):
    """outputs: name -> columns of what a call returns; view: which view of an image it sees (images.files.VIEWS).

    Needs captions where "cosine" is among the outputs.
    """

    outputs: dict[str, int]
    view: str

    def __call__(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """uint8 (b, 3, h, w), b captions -> float32 (b, columns) for each output."""

    def describe(self) -> ExtractorFacts:
        """What identifies these features: file, sha256, input, and settings where the weights do not say all."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32, then as before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def clean_resize(images: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (b, 3, h, w) -> float32 (b, 3, side, side) in [0, 255]: clean-fid's Pillow resize, in a batch, to 0.004."""
    if images.shape[-2:] == (side, side):
        return images.float()
    return F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)


class Inception:
    """2048 (or as many as the file has) features, and logits without bias where asked for. mode: a key of INPUTS.

    UserError for a file that is not TorchScript in this format: `layers` from normalised 299-pixel images to features, and
    forward(images, return_features=, no_output_bias=) with the resize inside.
    """

    def __init__(
        self, weights: Found, mode: str, device: torch.device | str = "cpu", logits: bool = False, view: str = "image"
    ) -> None:
        self.weights, self.mode, self.device, self.view = weights, mode, torch.device(device), view
        if mode == "legacy_pytorch":
            net, self.layers = inception_blocks()  # filled with tensors alone: nothing is unpickled
            with loading(f"{weights.path} does not fit pytorch-fid's Inception", COPY):
                net.load_state_dict(_tensors(weights))
            self.layers = self.layers.to(self.device).eval().requires_grad_(False)
        else:
            try:
                self.base = torch.jit.load(str(weights.path), map_location=self.device).eval()
                self.layers = self.base.layers
            except BY_FILES as error:
                raise UserError(
                    f"{weights.path} is no TorchScript Inception in the format of inception-2015-12-05.pt: "
                    f"{str(error).strip().splitlines()[-1]}; copy or download it again"
                ) from error
            self.output = self._output_weight() if logits else torch.empty(0)  # (classes, d)
        with loading(f"{weights.path} is no Inception in the format of inception-2015-12-05.pt", COPY):
            dim = self._features(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=self.device)).shape[1]
        self.outputs = {"features": dim} | ({"logits": len(self.output)} if logits else {})

    def __call__(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        with torch.inference_mode(), full_float32():
            features = self._features(images.to(self.device))
            return {"features": features} | ({"logits": features @ self.output.T} if "logits" in self.outputs else {})

    def describe(self) -> ExtractorFacts:
        """What identifies its features: the file, how images reach 299 pixels, and which view of them."""
        return {"network": "inception", "input": f"{INPUTS[self.mode]} of the {self.view}", **self.weights.describe()}

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        if self.mode == "legacy_tensorflow":
            return self.base(images, return_features=True).flatten(1)
        if self.mode == "clean":
            x = (clean_resize(images) - 128) / 128
        else:
            x = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False).clamp(0, 255) / 255 * 2 - 1
        return self.layers(x.contiguous(memory_format=torch.channels_last)).flatten(1)  # twice as fast on a CPU

    @torch.inference_mode()
    def _output_weight(self) -> Tensor:
        """(classes, d) of the last layer, found by its shape and checked against the network's own probabilities."""
        image = torch.randint(256, (1, 3, SIDE, SIDE), dtype=torch.uint8, device=self.device)
        features = self.base(image, return_features=True).flatten(1)
        expected = self.base(image, no_output_bias=True).flatten(1)
        for name, weight in (*self.base.named_parameters(), *self.base.named_buffers()):
            if weight.ndim == 2 and features.shape[1] in weight.shape and not name.startswith("layers."):
                weight = weight if weight.shape[1] == features.shape[1] else weight.T
                if weight.shape[0] == expected.shape[1] and torch.allclose((features @ weight.T).softmax(1), expected, atol=1e-5):
                    return weight.float()
        raise UserError(f"{self.weights.path} has no output layer that gives its own class probabilities; the score needs one")


def inception_blocks() -> tuple[nn.Module, nn.Sequential]:
    """The network of pytorch-fid's weights (1008 classes), from blocks of torchvision and clean-fid: whole, and as far as its
    features, (b, 3, 299, 299) in [-1, 1] -> (b, 2048).
    """
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, kind, options in (
        ("Mixed_5b", blocks.FIDInceptionA, {"in_channels": 192, "pool_features": 32}),
        ("Mixed_5c", blocks.FIDInceptionA, {"in_channels": 256, "pool_features": 64}),
        ("Mixed_5d", blocks.FIDInceptionA, {"in_channels": 288, "pool_features": 64}),
        ("Mixed_6b", blocks.FIDInceptionC, {"in_channels": 768, "channels_7x7": 128}),
        ("Mixed_6c", blocks.FIDInceptionC, {"in_channels": 768, "channels_7x7": 160}),
        ("Mixed_6d", blocks.FIDInceptionC, {"in_channels": 768, "channels_7x7": 160}),
        ("Mixed_6e", blocks.FIDInceptionC, {"in_channels": 768, "channels_7x7": 192}),
        ("Mixed_7b", blocks.FIDInceptionE_1, {"in_channels": 1280}),
        ("Mixed_7c", blocks.FIDInceptionE_2, {"in_channels": 2048}),
    ):
        setattr(net, name, kind(**options))
    features = (child for name, child in net.named_children() if name not in ("AuxLogits", "dropout", "fc"))
    return net, nn.Sequential(*features, nn.Flatten())


def _tensors(weights: Found) -> dict[str, Tensor]:
    try:
        return torch.load(weights.path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in the unpickler, the zip reader or torch itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{weights.path} cannot be read as tensors ({reason}); copy or download it again") from error


class DinoV2:
    """The class token of DINOv2 (1024 columns for ViT-L/14), images resized to 224 by antialiased bicubic (FD-DINOv2). UserError
    for weights that do not fit.
    """

    view = "image"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: Found, device: torch.device | str = "cpu") -> None:
        from transformers import Dinov2Model

        self.weights, self.device = weights, torch.device(device)
        with loading(f"{weights.path} is no whole DINOv2 model", COPY):
            net = Dinov2Model.from_pretrained(weights.path, use_safetensors=True)
        self.net = net.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # transformers' wrapper hides arguments
        self.outputs = {"features": self.net.config.hidden_size}

    @torch.inference_mode()
    def __call__(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        x = clean_resize(images.to(self.device), 224).round() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        with full_float32():
            return {"features": self.net((x - mean) / std).pooler_output}

    def describe(self) -> ExtractorFacts:
        """What identifies its features: the file, the resize, the network's configuration."""
        return {
            "network": "dinov2",
            "input": "bicubic with antialiasing to 224, rounded",
            **self.weights.describe(),
            "settings": config_settings(self.net.config),
        }


class Aesthetic(nn.Module):
    """improved-aesthetic-predictor: unit CLIP ViT-L/14 embeddings (b, 768) -> scores (b, 1), about 1 to 10."""

    def __init__(self) -> None:
        super().__init__()
        sizes, dropout = (768, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(a, b), *([nn.Dropout(dropout[i])] if i < len(dropout) else [])]
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Unit embeddings (b, 768) -> scores (b, 1)."""
        return self.layers(embeddings)

    @classmethod
    def load(cls, weights: Found) -> Aesthetic:
        """With the weights of a file, in evaluation mode, without gradients. UserError for a file of something else."""
        net = cls()
        with loading(f"{weights.path} is no aesthetic predictor of this kind", COPY):
            net.load_state_dict(_tensors(weights))
        return net.eval().requires_grad_(False)


class Clip:
    """CLIP with what is wanted of it: "features" (unit image embeddings), "cosine" (with the captions), "aesthetic".

    name: a hub id (through transformers) or open_clip:model:tag. Captions longer than the text encoder takes are cut before their
    end token, which stays: its position is where the text embedding is read. UserError for weights that do not fit, and for an
    aesthetic head on another network than ViT-L/14; ValueError where the head's weights are missing.
    """

    def __init__(
        self,
        name: str,
        weights: Found,
        wanted: Sequence[str],
        device: torch.device | str = "cpu",
        prefix: str = "",
        aesthetic: Found | None = None,
        view: str = "image",
    ) -> None:
        self.name, self.weights, self.prefix, self.device, self.view = name, weights, prefix, torch.device(device), view
        self.net = (_OpenClip if name.startswith(OPEN_CLIP) else _Transformers)(name, weights, self.device)
        self.aesthetic_weights = aesthetic
        if "aesthetic" in wanted and aesthetic is None:
            raise ValueError("the aesthetic score needs the weights of its head")
        self.head = Aesthetic.load(aesthetic).to(device) if aesthetic is not None and "aesthetic" in wanted else None
        if self.head is not None and self.net.dim != 768:
            raise UserError(f"the aesthetic predictor reads 768 columns, {weights.path} gives {self.net.dim}; it needs ViT-L/14")
        self.outputs = {"features": self.net.dim, "cosine": 1, "aesthetic": 1}
        self.outputs = {key: size for key, size in self.outputs.items() if key in wanted}

    def __call__(self, images: Tensor, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        with torch.inference_mode(), full_float32():
            unit = self.of_images(images)
            found = {"features": unit}
            if "cosine" in self.outputs:
                if captions is None:
                    raise ValueError("the cosine of images and captions needs captions")
                found["cosine"] = (unit * self.of_texts(captions)).sum(1, keepdim=True)
            if self.head is not None:
                found["aesthetic"] = self.head(unit)
            return {key: found[key] for key in self.outputs}

    @torch.inference_mode()
    def of_images(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> unit vectors (b, d)."""
        return F.normalize(self.net.images(images).float(), dim=1)

    @torch.inference_mode()
    def of_texts(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (b, d) of captions, the prefix before each."""
        return F.normalize(self.net.texts([self.prefix + c for c in captions]).float(), dim=1)

    def describe(self) -> ExtractorFacts:
        """What identifies its numbers: the file, the images' way, settings; of texts prefix, longest one and tokenizer."""
        facts: ExtractorFacts = {
            "network": self.name,
            "input": f"{self.net.input} of the {self.view}",
            **self.weights.describe(),
        }
        if settings := self.net.settings():
            facts["settings"] = settings
            facts["published"] = facts["published"] and self.net.as_published
        if "cosine" in self.outputs:
            facts["prefix"], facts["scale"], facts["longest_text"] = self.prefix, 1.0, self.net.longest
            if found := self.net.tokenizer_sha256():
                facts["tokenizer"] = found
        if self.aesthetic_weights is not None:
            facts["aesthetic"] = self.aesthetic_weights.describe()
        return facts


class _Transformers:
    def __init__(self, name: str, weights: Found, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with loading(f"{weights.path} is no whole CLIP model", COPY):
            net = CLIPModel.from_pretrained(weights.path)
            self.tokenizer = AutoTokenizer.from_pretrained(weights.path)
            self.processor = AutoImageProcessor.from_pretrained(weights.path)
        self.net = net.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # as above
        self.input = type(self.processor).__name__
        self.device, self.dim = device, self.net.config.projection_dim
        self.longest = self.net.config.text_config.max_position_embeddings

    @property
    def as_published(self) -> bool:
        """Whether activation and colours are those of OpenAI's models."""
        config, mine = self.net.config, self.processor
        colours = (tuple(mine.image_mean), tuple(mine.image_std)) == (CLIP_MEAN, CLIP_STD)
        return colours and config.text_config.hidden_act == config.vision_config.hidden_act == "quick_gelu"

    def settings(self) -> dict[str, Any]:
        return config_settings(self.net.config) | processor_settings(self.processor)

    def tokenizer_sha256(self) -> str:
        return tokenizer_sha256(self.tokenizer)

    def images(self, images: Tensor) -> Tensor:
        x = self.processor(list(images), return_tensors="pt", device=self.device)["pixel_values"]
        return self.net.get_image_features(pixel_values=x).pooler_output

    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt").to(
            self.device
        )
        return self.net.get_text_features(**tokens).pooler_output


class _OpenClip:
    input = "open_clip's own transform (Pillow bicubic)"
    as_published = True  # by the model's name

    def __init__(self, name: str, weights: Found, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise UserError(f"{name} needs open_clip: pip install 'open_clip_torch>=3.3,<4'") from error
        _, model, tag = (*name.split(":"), "", "")[:3]
        if not model or not tag or name.count(":") != 2:
            raise UserError(f"--clip-model: {name!r}, expected open_clip:model:tag, e.g. open_clip:ViT-B-32:openai")
        # OpenAI's own weights use another GELU, which a local file does not tell
        quick = {"force_quick_gelu": True} if tag == "openai" else {}
        with loading(f"{weights.path} does not fit {name}", COPY):
            self.net, _, self.transform = open_clip.create_model_and_transforms(
                model, pretrained=str(weights.path), device=device, weights_only=True, **quick
            )
        self.net = self.net.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.device, self.longest = device, self.tokenizer.context_length
        self.dim = self.texts([""]).shape[1]

    def settings(self) -> dict[str, Any]:
        return {}  # all by the model's name

    def tokenizer_sha256(self) -> None:
        return None

    def images(self, images: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        return self.net.encode_image(torch.stack([self.transform(to_pil_image(i)) for i in images.cpu()]).to(self.device))

    def texts(self, texts: list[str]) -> Tensor:
        return self.net.encode_text(self.tokenizer(texts).to(self.device))
