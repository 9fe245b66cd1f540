"""Train the autoencoder of the embedded teacher: 32x32 pictures <-> 8x8 latents.

    python -m scripts.assets.vae [--output outputs/assets/vae] [--steps N] [--start assets/emoji_sd/vae]

L1 of pixels and of their differences to the neighbours, with a small pull of the latents to a standard normal. Writes
<output>/vae, a diffusers AutoencoderKL whose scaling_factor gives latents variance 1. With --latents-of VAE it learns that one's
latents instead of its own, so that a U-Net which draws them need not learn again. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.utils import save_image

from pipelines import emoji
from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.options import path, typed, whole
from pipelines.common.strict import PositiveFloat
from trainers.config.networks import Optimizer

from .fitting import draws, fit

LATENTS = 8
LOG_STD = 0.1  # the weight of the latents' noise beside their means, where those of another autoencoder are learned
KL = 2e-3  # a weight of .002 leaves each latent a noise of a few percent of its spread


def new(latents: int = LATENTS) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),  # narrow: the decoder is a good part of what a picture of a one-step student costs
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=8,
        sample_size=emoji.SIZE,
    )


def batch(pictures: emoji.Pictures, size: int, generator: torch.Generator) -> Tensor:
    """Random pictures, mirrored, moved and on random backgrounds: (size, 3, 32, 32) in [-1, 1]."""
    rows = torch.randint(len(pictures), (size,), generator=generator)
    mirror = torch.rand(size, generator=generator) < 0.5
    shift = torch.randint(-2, 3, (size, 2), generator=generator)
    colours = emoji.palette()[torch.randint(len(emoji.BACKGROUNDS), (size,), generator=generator)]
    colours = (colours + 6 * torch.randn(size, 3, generator=generator)).clamp(0, 255)
    return emoji.on_background(emoji.moved(pictures.rgba[rows], mirror, shift), colours)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """L1 of pixels plus L1 of horizontal and vertical differences, which keeps edges where they are."""
    error = a - b
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * edges


def moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log of the standard deviation of the latents, each (b, latents, 8, 8)."""
    gaussian = vae.encode(images).latent_dist
    return gaussian.mean.float(), 0.5 * gaussian.logvar.float()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.float() for x in images.split(64)]).clamp(-1, 1)


def held_out(pictures: emoji.Pictures) -> Tensor:
    """Each held-out picture once, backgrounds in turn: (n, 3, 32, 32)."""
    kept = pictures.part(held_out=True)
    return emoji.on_background(kept.rgba, emoji.palette()[torch.arange(len(kept)) % len(emoji.BACKGROUNDS)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=path, default=Path("outputs/assets/vae"))
    parser.add_argument("--steps", type=whole(1), default=12_000)
    parser.add_argument("--batch-size", type=whole(1), default=32)
    parser.add_argument("--lr", type=typed(PositiveFloat), default=2e-3)
    parser.add_argument("--latents", type=whole(1), help=f"channels of a new one (default: {LATENTS})")
    parser.add_argument("--start", help="an AutoencoderKL to start from instead of random weights")
    parser.add_argument("--latents-of", help="an AutoencoderKL whose latents are to be encoded to and decoded from")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic: for processors without it")
    args = parser.parse_args(argv)
    with user_errors():
        if args.start and args.latents:
            raise UserError("--latents has no effect: --start has its own channels; leave one of them out")
        pictures = emoji.load()
        train, kept = pictures.part(held_out=False), held_out(pictures)
        vae = (AutoencoderKL.from_pretrained(args.start) if args.start else new(args.latents or LATENTS)).train()
        vae.to(memory_format=torch.channels_last)
        other = AutoencoderKL.from_pretrained(args.latents_of).requires_grad_(False) if args.latents_of else None
        if other is not None and other.config.latent_channels != vae.config.latent_channels:
            raise UserError(
                f"--latents-of {args.latents_of!r} has {other.config.latent_channels} latent channels, "
                f"this autoencoder {vae.config.latent_channels}"
            )

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            generator = draws(0, step)
            x = batch(train, args.batch_size, generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                mine = moments(vae, x)
                mean, log_std = mine if other is None else moments(other, x)
                z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
                y = vae.decode(z).sample.float()
            if other is None:
                name, pull = "kl", 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean()
            else:
                name, pull = "latents", (mine[0] - mean).square().mean() + LOG_STD * (mine[1] - log_std).square().mean()
            total = difference(y, x) + (KL if other is None else 1.0) * pull
            return total, {"l1": float((y - x).abs().mean().detach()), name: float(pull.detach())}

        def picture(file: Path) -> None:
            shown = kept[:: max(1, len(kept) // 48)][:48]
            save_image(
                torch.cat([torch.cat(p) for p in zip(shown.split(16), reconstruct(vae, shown).split(16), strict=True)]),
                file,
                nrow=16,
                normalize=True,
                value_range=(-1, 1),
            )

        ema = fit(
            vae,
            loss,
            args.output,
            Optimizer(lr=args.lr, betas=(0.9, 0.99), clip=1.0, warmup_steps=100, schedule="cosine", final_ratio=0.02),
            args.steps,
            picture,
            task={"latents_of": args.latents_of},
        )
        with ema.swapped():
            finish(vae.eval(), train, kept, args.output, None if other is None else other.config.scaling_factor)


def finish(vae: AutoencoderKL, train: emoji.Pictures, kept: Tensor, output: Path, scaling_factor: float | None) -> None:
    """Set the scaling factor (None: the one that gives latents variance 1), measure on the held-out pictures, save."""
    with torch.no_grad():
        x = batch(train, 1024, draws(0, -1))
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
        vae.register_to_config(scaling_factor=scaling_factor or float(1 / latents.std()))
    error = reconstruct(vae, kept) - kept
    numbers = {
        "held_out_l1": float(error.abs().mean()),  # of [-1, 1]
        "held_out_psnr": float((10 * (4 / error.square().mean(dim=(1, 2, 3))).log10()).mean()),
        "scaling_factor": vae.config.scaling_factor,
        "latent_mean": latents.mean(dim=(0, 2, 3)).tolist(),
        "latent_std": latents.std(dim=(0, 2, 3)).tolist(),
    }
    vae.save_pretrained(output / "vae")
    (output / "measured.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
