"""Networks for the metrics, made from configurations with random weights, in the formats of the published files.

For measuring and testing where nothing can be downloaded: the numbers they give mean something only against other libraries on
the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.networks.extractors import SIDE, inception_blocks


def weights(size: int) -> Tensor:
    """(299, size): each row the two pixels that a pixel of the output lies between, and their shares."""
    position = torch.arange(299, dtype=torch.float32) * (size / 299)
    low = position.long()
    found = torch.zeros(299, size)
    found.scatter_(1, low[:, None], (1 - (position - low.float()))[:, None])
    return found.scatter_add(1, (low + 1).clamp(max=size - 1)[:, None], (position - low.float())[:, None])


class TorchScriptInception(nn.Module):
    """The interface of inception-2015-12-05.pt around `layers`, normalised 299-pixel images -> features (b, dim)."""

    def __init__(self, layers: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(dim, classes)

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False) -> Tensor:
        # TensorFlow 1's resize: pixel i of the output reads position i * scale, without a half-pixel shift
        rows, columns = weights(img.shape[2]).to(img.device), weights(img.shape[3]).to(img.device)
        features = self.layers((rows @ img.to(torch.float32) @ columns.T - 128) / 128)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(1)


def small_layers(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 32, 5, stride=3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, dim),
        nn.SiLU(),  # else 2,048 features would span 512 dimensions
    )


def inception(
    file: Path, calibration: Tensor, dim: int = 2048, full: bool = False, classes: int = 1008
) -> tuple[Path, Path | None]:
    """A TorchScript file, and for the full network the same weights as pytorch-fid's .pth.

    calibration: uint8 (b, 3, h, w); batch norms take their statistics from them, else random features would hardly vary.
    """
    torch.manual_seed(0)
    net, layers = inception_blocks() if full else (None, small_layers(dim))
    for norm in (m for m in layers.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    x = F.interpolate(calibration.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
    with torch.no_grad():
        layers.train()((x - 128) / 128)
        wrapped = TorchScriptInception(layers, 2048 if full else dim, classes)
        if full:  # torchvision's blocks are for tracing
            net.fc.weight.copy_(wrapped.output.weight)
            net.fc.bias.copy_(wrapped.output.bias)
            wrapped.layers = torch.jit.trace(layers.eval(), torch.zeros(2, 3, SIDE, SIDE))
        torch.jit.script(wrapped.eval()).save(str(file))
    if not full:
        return file, None
    torch.save(net.state_dict(), file.with_suffix(".pth"))
    return file, file.with_suffix(".pth")


def tokenizer(folder: Path, length: int = 77) -> Any:
    """A CLIP tokenizer in which every printable ASCII character is a token, with or without the end of a word."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(c) for c in range(33, 127)]
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def clip(folder: Path, size: int = 32, width: int = 64, projection: int = 48, layers: int = 2, patch: int = 8) -> Path:
    """A transformers CLIP model with its tokenizer and processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(1)
    words = tokenizer(folder)
    words.save_pretrained(folder)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = {**shape, **ends, "vocab_size": len(words)}
    vision = {**shape, "image_size": size, "patch_size": patch}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=28)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def aesthetic(file: Path) -> Path:
    from eval.networks.extractors import Aesthetic

    torch.manual_seed(3)
    torch.save(Aesthetic().state_dict(), file)
    return file
