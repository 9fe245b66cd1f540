"""Put autoencoder, text tower and U-Net together to a folder that StableDiffusionPipeline.from_pretrained loads.

    python -m scripts.assets.assemble [--vae DIR] [--clip DIR] [--unet DIR] [--output outputs/assets/start]
    python -m scripts.assets.assemble --ship [--vae DIR] [--clip DIR] [--unet DIR]

Without --unet the U-Net is new: the pipeline that trainers.train_teacher starts from. --ship writes assets/emoji_sd and
assets/emoji_clip in float16 and the sums of all files to assets/manifest.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from pipelines.assets import sum_of
from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.options import path

ASSETS = Path("assets")
READ_FROM = ("_name_or_path", "is_local", "local_files_only")


def new_unet(latents: int, text_width: int) -> UNet2DConditionModel:
    """Stable Diffusion's blocks on two levels, 8x8 and 4x4. Attention is at 4x4 only: at 8x8 it takes half as much time again."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads, as in SD1.5's configuration
        norm_num_groups=16,
    )


def scheduler() -> PNDMScheduler:
    """SD1.5's. Its file says clip_sample, which PNDM does not know: DDIM made from it would else clip latents to [-1, 1]."""
    made = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    made.register_to_config(clip_sample=False)
    return made


def load_clip(folder: str) -> CLIPModel:
    return CLIPModel.from_pretrained(folder, dtype=torch.float32)


def pipeline(vae: str, clip: str, unet: str | None) -> StableDiffusionPipeline:
    model, autoencoder = load_clip(clip), AutoencoderKL.from_pretrained(vae)
    text = CLIPTextModel(model.config.text_config)
    text.load_state_dict(model.text_model.state_dict())
    width = model.config.text_config.hidden_size
    network = UNet2DConditionModel.from_pretrained(unet) if unet else new_unet(autoencoder.config.latent_channels, width)
    if (network.config.in_channels, network.config.cross_attention_dim) != (autoencoder.config.latent_channels, width):
        raise UserError(
            f"{unet!r} takes {network.config.in_channels} latents and text of width {network.config.cross_attention_dim}; "
            f"{vae!r} and {clip!r} give {autoencoder.config.latent_channels} and {width}; use those it was trained with"
        )
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    parts = (autoencoder, text.eval(), tokenizer, network, scheduler(), None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def sums(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of every file but the manifest itself, what was measured of them, and texts for readers."""
    left_out = ("manifest.json", "measured.json", "measured_one_step.json", "README.md")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in left_out)
    return {f.relative_to(folder).as_posix(): sum_of(f) for f in files}


def ship(vae: str, clip: str, unet: str | None) -> None:
    pipe = pipeline(vae, clip, unet).to(dtype=torch.float16)
    model, processor = load_clip(clip).half(), CLIPProcessor.from_pretrained(clip)
    # all is loaded: what is replaced may be what was read
    for name, parts in (("emoji_sd", (pipe,)), ("emoji_clip", (model, processor))):
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        for part in parts:
            part.save_pretrained(ASSETS / name)
    for folder in ("emoji_sd/text_encoder", "emoji_clip"):
        # transformers loads what the configuration says: in float16 the text encoder would not fit the pipeline's float32 U-Net
        file = ASSETS / folder / "config.json"
        config = json.loads(file.read_text())
        parts = [config, *(config[key] for key in ("text_config", "vision_config") if key in config)]
        for part in parts:
            part["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    for name in (
        "emoji_sd/unet/config",
        "emoji_sd/vae/config",
        "emoji_sd/tokenizer/tokenizer_config",
        "emoji_clip/tokenizer_config",
    ):
        file = ASSETS / f"{name}.json"  # where they were read from is nobody's business
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in READ_FROM}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    (ASSETS / "manifest.json").write_text(json.dumps(sums(ASSETS), indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", default="outputs/assets/vae/vae")
    parser.add_argument("--clip", default="outputs/assets/clip/clip")
    parser.add_argument("--unet", help="a trained UNet2DConditionModel; without it a new one")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=path, default=Path("outputs/assets/start"))
    place.add_argument("--ship", action="store_true", help="write assets/ instead")
    args = parser.parse_args(argv)
    with user_errors():
        for folder in filter(None, (args.vae, args.clip, args.unet)):
            if not (Path(folder) / "config.json").is_file():
                raise UserError(f"{folder!r} holds no model (config.json); train it first: make assets")
        if args.ship:
            ship(args.vae, args.clip, args.unet)
        else:
            pipeline(args.vae, args.clip, args.unet).save_pretrained(args.output)


if __name__ == "__main__":
    main()
