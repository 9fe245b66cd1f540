"""Measure the embedded teacher and draw a grid of it.

    python -m scripts.assets.look [--pipeline assets/emoji_sd] [--clip assets/emoji_clip] [--images 256] [--steps 50]

Draws captions of training pictures with DDIM and guidance. Writes <output>/measured.json: how often CLIP finds a picture's own
caption among 32, drawn pictures beside real ones; the Frechet distance of CLIP's image features (here "FD-CLIP-mini", not FID)
of drawn pictures to real ones, beside that of held-out to training pictures; seconds a call of the U-Net. And grid.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import CLIPTokenizer

from eval.metrics.frechet import GaussianStats, frechet_distance
from pipelines import emoji
from pipelines.common.launch import user_errors
from pipelines.common.options import path, typed, whole
from pipelines.common.strict import StockGuidance
from pipelines.text_to_image import load_pipeline

from .assemble import load_clip
from .clip import embed, plain_pairs, retrieval

NAMES = (
    "grinning face, crying face, red heart, cat face, pile of poo, skull, ghost, robot, red apple, banana, pizza, hamburger, "
    "strawberry, birthday cake, dog face, frog, tropical fish, octopus, lady beetle, sunflower, cactus, deciduous tree, "
    "rabbit face, panda, penguin, watermelon, carrot, doughnut, rose, pig face, cherries, butterfly"
).split(", ")


def draw(pipe, captions: list[str], steps: int, guidance: float, batch_size: int = 64) -> Tensor:
    """(n, 3, 32, 32) in [-1, 1], from fixed noise."""
    drawn, generator = [], torch.Generator().manual_seed(0)
    for start in tqdm(range(0, len(captions), batch_size), desc="drawing", mininterval=5):
        prompts, options = captions[start : start + batch_size], {"num_inference_steps": steps, "guidance_scale": guidance}
        drawn.append(pipe(prompts, generator=generator, output_type="pt", **options).images)
    return torch.cat(drawn) * 2 - 1


def spread(pictures: emoji.Pictures, count: int) -> emoji.Pictures:
    """`count` of them, evenly over the file and so over the styles."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:count]
    return pictures.only(sorted(order.tolist()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="assets/emoji_sd")
    parser.add_argument("--clip", default="assets/emoji_clip")
    parser.add_argument("--output", type=path, default=Path("outputs/assets/look"))
    parser.add_argument("--images", type=whole(2), default=256)
    parser.add_argument("--steps", type=whole(1), default=50)
    parser.add_argument("--guidance", type=typed(StockGuidance), default=2.0)
    args = parser.parse_args(argv)
    with user_errors():
        pipe, model = load_pipeline(args.pipeline), load_clip(args.clip).eval()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        tokenizer = CLIPTokenizer.from_pretrained(args.clip)
        args.output.mkdir(parents=True, exist_ok=True)
        styles, backgrounds = emoji.STYLES, list(emoji.BACKGROUNDS)
        captions = [emoji.caption(n, styles[i % 4], backgrounds[i % 6]) for i, n in enumerate(NAMES)]
        drawn = draw(pipe, captions, args.steps, args.guidance)
        save_image(drawn, args.output / "grid.png", nrow=8, normalize=True, value_range=(-1, 1))
        numbers = measure(pipe, model, tokenizer, args.images, args.steps, args.guidance)
        (args.output / "measured.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(json.dumps(numbers, indent=1))


def measure(pipe, model, tokenizer: CLIPTokenizer, images: int, steps: int, guidance: float) -> dict[str, float]:
    pictures = emoji.load()
    train, kept = (pictures.part(held_out, emoji.GROUPS) for held_out in (False, True))
    asked = spread(train, images)
    real, captions = plain_pairs(asked)
    start = time.perf_counter()
    drawn = draw(pipe, captions, steps, guidance)
    seconds = time.perf_counter() - start
    drawn_features, texts = embed(model, tokenizer, drawn, captions)
    real_features = embed(model, tokenizer, real, captions)[0]
    others, other_captions = plain_pairs(spread(train.only([i for i in range(len(train)) if i % 2]), 1500))
    reference = GaussianStats.of(embed(model, tokenizer, others, other_captions)[0])
    held_out, held_out_captions = plain_pairs(kept)
    held_out_features = embed(model, tokenizer, held_out, held_out_captions)[0]
    return {
        "images": images,
        "steps": steps,
        "guidance": guidance,
        "retrieval_of_32_drawn": retrieval(drawn_features, texts, asked.names),
        "retrieval_of_32_real": retrieval(real_features, texts, asked.names),
        "clip_score_drawn": float((drawn_features * texts).sum(1).mean()) * 100,
        "clip_score_real": float((real_features * texts).sum(1).mean()) * 100,
        "fd_drawn_to_train": frechet_distance(GaussianStats.of(drawn_features), reference),
        "fd_real_to_train": frechet_distance(GaussianStats.of(real_features), reference),
        "fd_held_out_to_train": frechet_distance(GaussianStats.of(held_out_features), reference),
        "seconds_an_image": seconds / images,
        "unet_seconds_of_64": call_seconds(pipe),
    }


@torch.no_grad()
def call_seconds(pipe, batch: int = 64) -> float:
    """Of one call of the U-Net, the least of five."""
    config = pipe.unet.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(batch, pipe.tokenizer.model_max_length, config.cross_attention_dim)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        pipe.unet(x, torch.full((batch,), 500), text)
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
