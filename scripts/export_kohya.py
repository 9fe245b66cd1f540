"""A student's LoRA for ComfyUI and others that are not diffusers.

    python -m scripts.export_kohya outputs/sd15_vardiu/student student_kohya.safetensors

Of Stable Diffusion 1.x, 2.x and XL with kohya's key names, which AUTOMATIC1111 reads too. Of SD3, SD3.5 and Flux with diffusers'
names (transformer.<layer>.lora_A.weight), which ComfyUI reads as they are. Other readers than diffusers know no alpha but one
beside each layer, so alpha / rank is multiplied into the up-projections: the result acts exactly as the original, in diffusers
too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.common.atomic import new_file
from pipelines.common.errors import UserError
from pipelines.common.launch import user_errors
from pipelines.common.options import path
from pipelines.common.reading import damaged_weights, loading, refuse_single_file
from pipelines.loras import LORA_FILE, PEFT_FILE


def folded(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """The same LoRA with alpha = rank."""
    return {k: v.float() * (alpha / rank) if ".lora_B." in k else v.float() for k, v in weights.items()}


def to_kohya(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """'unet.<layer>.lora_A.weight' -> 'lora_unet_<layer>.lora_down.weight', .lora_up.weight and .alpha."""
    return convert_state_dict_to_kohya(folded(weights, rank, alpha))


def read_lora(file: Path) -> tuple[dict[str, Tensor], str, int, float]:
    """(weights, "unet" or "transformer", rank, alpha) of a student's LoRA file. FileNotFoundError or ValueError say what is wrong
    with it.
    """
    if not file.is_file():
        if file.with_name(PEFT_FILE).is_file():
            raise UserError(f"{str(file.parent)!r} is a student of a DiT, for which those programs have no LoRA")
        raise FileNotFoundError(f"no LoRA weights {str(file)!r}; give the student/ folder of a run with student.lora")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {key: stored.get_tensor(key) for key in stored.keys()}
    except (SafetensorError, ValueError) as error:
        raise damaged_weights(file, error) from error
    component = next((name for name in ("unet", "transformer") if f"{name}.r" in metadata), None)
    if component is None:
        raise UserError(f"{str(file)!r} has no rank and alpha in its metadata; it was not written by trainers.distill")
    if metadata.get(f"{component}.rank_pattern") or metadata.get(f"{component}.alpha_pattern"):
        raise UserError(f"{str(file)!r} has layers of different ranks or alphas, which this export does not know")
    return weights, component, metadata[f"{component}.r"], metadata[f"{component}.lora_alpha"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=path, help="a student/ folder")
    parser.add_argument("output", type=path, help="the .safetensors file to write")
    args = parser.parse_args(argv)
    with user_errors():
        refuse_single_file(args.student, "the student")
        weights, component, rank, alpha = read_lora(args.student / LORA_FILE)
        metadata = {"format": "pt"}
        if component == "unet":
            metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
            with loading(f"{str(args.student / LORA_FILE)!r} has layers that kohya's names do not know"):
                made = to_kohya(weights, rank, alpha)
        else:
            made = folded(weights, rank, alpha)
        with new_file(args.output) as partial:
            save_file({k: v.contiguous() for k, v in made.items()}, partial, metadata=metadata)
    print(f"{args.output}: {sum('.lora_A.' in key for key in weights)} layers of rank {rank}")


if __name__ == "__main__":
    main()
