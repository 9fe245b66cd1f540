"""A Stable Diffusion student's LoRA for ComfyUI, AUTOMATIC1111 and others that read kohya's key names.

    python -m scripts.export_kohya outputs/sd15_vardiu/student student_kohya.safetensors

The file also loads in diffusers. diffusers' converter writes alpha = rank whatever it was, so alpha / rank is multiplied into the
up-projections first; the result acts exactly as the original.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.common.atomic import new_file
from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.options import path
from pipelines.common.reading import damaged_weights, loading, refuse_single_file
from pipelines.loras import LORA_FILE


def to_kohya(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """'unet.<layer>.lora_A.weight' -> 'lora_unet_<layer>.lora_down.weight', .lora_up.weight and .alpha."""
    folded = {k: v * (alpha / rank) if ".lora_B." in k else v for k, v in weights.items()}
    kohya = convert_state_dict_to_kohya(folded)
    return {k: v.to(torch.float32).contiguous() for k, v in kohya.items()}


def read_lora(file: Path) -> tuple[dict[str, Tensor], int, float]:
    """(weights, rank, alpha) of a student's LoRA file. FileNotFoundError or ValueError say what is wrong with it."""
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA weights {str(file)!r}; give the student/ folder of a run with student.lora")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {key: stored.get_tensor(key) for key in stored.keys()}
    except (SafetensorError, ValueError) as error:
        raise damaged_weights(file, error) from error
    if "transformer.r" in metadata:
        raise UserError(f"{str(file)!r} is for a transformer (SD3, Flux); this export knows U-Nets only")
    if "unet.r" not in metadata:
        raise UserError(f"{str(file)!r} has no rank and alpha in its metadata; it was not written by trainers.distill")
    if metadata.get("unet.rank_pattern") or metadata.get("unet.alpha_pattern"):
        raise UserError(f"{str(file)!r} has layers of different ranks or alphas, which this export does not know")
    return weights, metadata["unet.r"], metadata["unet.lora_alpha"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=path, help="a student/ folder")
    parser.add_argument("output", type=path, help="the .safetensors file to write")
    args = parser.parse_args(argv)
    with user_errors():
        refuse_single_file(args.student, "the student")
        weights, rank, alpha = read_lora(args.student / LORA_FILE)
        with loading(f"{str(args.student / LORA_FILE)!r} has layers that kohya's names do not know"):
            kohya = to_kohya(weights, rank, alpha)
        with new_file(args.output) as partial:
            save_file(kohya, partial, metadata={"ss_network_module": "networks.lora", "ss_network_dim": str(rank)})
    print(f"{args.output}: {len(kohya) // 3} layers of rank {rank}")


if __name__ == "__main__":
    main()
