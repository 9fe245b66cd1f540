"""Train CLIP on the emoji and their captions: the teacher's text encoder, and what its pictures are measured with.

    python -m scripts.assets.clip [--output outputs/assets/clip] [--steps N] [--start assets/emoji_clip]

A byte-level BPE vocabulary is learned from names and keywords first. Writes <output>/clip, which transformers' CLIPModel and
CLIPProcessor load. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torchvision.utils import save_image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from pipelines import emoji
from pipelines.common.launch import user_errors
from pipelines.common.options import path, typed, whole
from pipelines.common.strict import PositiveFloat
from trainers.config.networks import Optimizer

from .fitting import draws, fit

WIDTH, TOKENS, MERGES = 128, 77, 3072
CANDIDATES = 32  # captions that a picture is matched with when retrieval is measured


def vocabulary(pictures: emoji.Pictures) -> CLIPTokenizer:
    """CLIP's own layout: 256 bytes, the same as ends of words, merges, two special tokens; so every text has tokens."""
    counts = Counter(word for name in pictures.names for word in name.split())
    counts.update(word for words in pictures.keywords for word in words)
    counts.update({word: 1000 for parts in (emoji.STYLES, emoji.BACKGROUNDS) for text in parts for word in text.split()})
    counts.update({"style": 1000, "on": 1000})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    plain = CLIPTokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=512 + MERGES, end_of_word_suffix="</w>", initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((word for word in sorted(counts) for _ in range(counts[word])), trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]][:MERGES]
    letters = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)])
    tokens = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=TOKENS)


def new(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    shape |= {"hidden_act": "gelu"}  # one kernel where CLIP's first, quick_gelu, is three
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "num_hidden_layers": 3} | shape | ids
    vision = {"image_size": emoji.SIZE, "patch_size": 4, "num_hidden_layers": 4} | shape
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Of 32x32 pictures, to [-1, 1]."""
    half, side = [0.5] * 3, emoji.SIZE
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    return CLIPProcessor(images, tokenizer)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt"))


@dataclass(frozen=True)
class Pairs:
    """pixels (b, 3, 32, 32) in [-1, 1]; captions; fits[i, j]: caption i is true of picture j."""

    pixels: Tensor
    captions: list[str]
    fits: Tensor


def choose(options: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(options, (size,), generator=generator)


def pairs(pictures: emoji.Pictures, by_code: list[list[int]], size: int, generator: torch.Generator) -> Pairs:
    """Two pictures of each of size / 2 emoji, so that style and background have to be told apart as well as names."""
    codes = torch.randperm(len(by_code), generator=generator)[: size // 2].tolist()
    rows = [by_code[c][i % len(by_code[c])] for c in codes for i in choose(12, 2, generator).tolist()]
    backgrounds = choose(len(emoji.BACKGROUNDS), size, generator)
    mirror, shift = choose(2, size, generator).bool(), torch.randint(-2, 3, (size, 2), generator=generator)
    rgba = emoji.moved(pictures.rgba[rows], mirror, shift)
    says = torch.rand(size, 3, generator=generator) < torch.tensor([0.7, 0.7, 0.15])
    names, captions = list(emoji.BACKGROUNDS), []
    for i, row in enumerate(rows):
        name, words = pictures.names[row], pictures.keywords[row]
        if says[i, 2] and words:
            name = ", ".join(words[j] for j in torch.randperm(len(words), generator=generator)[:3])
        style = pictures.styles[row] if says[i, 0] else None
        captions.append(emoji.caption(name, style, names[backgrounds[i]] if says[i, 1] else None))
    code = torch.tensor(codes).repeat_interleave(2)
    style = torch.tensor([emoji.STYLES.index(pictures.styles[row]) for row in rows])
    fits = code[:, None] == code
    fits &= (style[:, None] == style) | ~says[:, :1]
    fits &= (backgrounds[:, None] == backgrounds) | ~says[:, 1:2]
    return Pairs(emoji.on_background(rgba, emoji.palette()[backgrounds]), captions, fits)


def contrast(logits: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy from captions to pictures and back; the share of all that fit is what is raised. logits, fits (b, b)."""
    right = logits.masked_fill(~fits, -math.inf)
    there = logits.logsumexp(1) - right.logsumexp(1)
    back = logits.logsumexp(0) - right.logsumexp(0)
    return 0.5 * (there.mean() + back.mean())


@torch.no_grad()
def embed(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures and of captions, each (n, d)."""
    images = [model.get_image_features(pixel_values=p).pooler_output for p in pixels.split(256)]
    texts = []
    for start in range(0, len(captions), 256):
        given = tokens(tokenizer, captions[start : start + 256])
        texts.append(model.get_text_features(**given).pooler_output)
    return tuple(torch.nn.functional.normalize(torch.cat(v).float(), dim=1) for v in (images, texts))


def retrieval(images: Tensor, texts: Tensor, names: list[str], seed: int = 0, repeats: int = 8) -> float:
    """How often a picture's own caption is the nearest of 32, the others drawn from captions of other names. (n, d) each."""
    generator, n = torch.Generator().manual_seed(seed), len(names)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    label = torch.tensor([number[name] for name in names])
    right = []
    for _ in range(repeats):
        others = torch.randint(n, (n, CANDIDATES - 1), generator=generator)
        similar = torch.einsum("nd,nkd->nk", images, texts[others]).masked_fill(label[others] == label[:, None], -1)
        right.append((similar.amax(1) < (images * texts).sum(1)).float().mean())
    return float(torch.stack(right).mean())


def plain_pairs(pictures: emoji.Pictures) -> tuple[Tensor, list[str]]:
    """Each picture once, backgrounds in turn, with its whole caption."""
    index = torch.arange(len(pictures)) % len(emoji.BACKGROUNDS)
    names = list(emoji.BACKGROUNDS)
    captions = [emoji.caption(n, s, names[b]) for n, s, b in zip(pictures.names, pictures.styles, index.tolist(), strict=True)]
    return emoji.on_background(pictures.rgba, emoji.palette()[index]), captions


def measure(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: emoji.Pictures) -> float:
    pixels, captions = plain_pairs(pictures)
    return retrieval(*embed(model, tokenizer, pixels, captions), pictures.names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=path, default=Path("outputs/assets/clip"))
    parser.add_argument("--steps", type=whole(1), default=6_000)
    parser.add_argument("--batch-size", type=whole(1), default=128)
    parser.add_argument("--lr", type=typed(PositiveFloat), default=1.5e-3)
    parser.add_argument("--start", help="a CLIP folder to start from; its vocabulary is kept")
    parser.add_argument(
        "--vision-only", action="store_true", help="leave the text tower, which a teacher may depend on, as it is"
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic: for processors without it")
    args = parser.parse_args(argv)
    with user_errors():
        pictures = emoji.load()
        train, kept = pictures.part(held_out=False), pictures.part(held_out=True)
        tokenizer = CLIPTokenizer.from_pretrained(args.start) if args.start else vocabulary(pictures)
        model = (CLIPModel.from_pretrained(args.start, dtype=torch.float32) if args.start else new(tokenizer)).train()
        if args.vision_only:
            model.text_model.requires_grad_(False)
            model.text_projection.requires_grad_(False)
        model.set_attn_implementation("eager")  # on CPUs the fused attention takes twice the time to differentiate
        rows = {}
        for i, code in enumerate(train.codes):
            rows.setdefault(code, []).append(i)
        by_code = list(rows.values())

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            drawn = pairs(train, by_code, args.batch_size, draws(1, step))
            given = tokens(tokenizer, drawn.captions)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                out = model(pixel_values=drawn.pixels, **given)
            scale = model.logit_scale.clamp(max=math.log(100)).exp()
            logits = scale * out.text_embeds.float() @ out.image_embeds.float().T
            best = drawn.fits.gather(1, logits.argmax(1, keepdim=True)).float().mean()
            return contrast(logits, drawn.fits), {"right": float(best)}

        def picture(file: Path) -> None:
            """Held-out pictures, each above the nearest training picture of its caption; and the numbers so far."""
            shown = kept.only(list(range(0, len(kept), max(1, len(kept) // 32)))[:32])
            pixels, captions = plain_pairs(shown)
            other, others = plain_pairs(train.only(list(range(0, len(train), 3))))
            near = embed(model, tokenizer, pixels, captions)[1] @ embed(model, tokenizer, other, others)[0].T
            grid = [torch.cat(p) for p in zip(pixels.split(16), other[near.argmax(1)].split(16), strict=True)]
            save_image(torch.cat(grid), file, nrow=16, normalize=True, value_range=(-1, 1))
            part = train.only(list(range(0, len(train), 8)))
            print(
                f"\n{file.stem}: of 32 captions train {measure(model, tokenizer, part):.3f}, "
                f"held out {measure(model, tokenizer, kept):.3f}",
                flush=True,
            )

        optimizer = Optimizer(
            lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, clip=1.0, warmup_steps=100, schedule="cosine", final_ratio=0.02
        )
        task = {"vision_only": args.vision_only}
        ema = fit(model, loss, args.output, optimizer, args.steps, picture, ema_decay=0.995, picture_every=100, task=task)
        with ema.swapped():
            model.eval().save_pretrained(args.output / "clip")
            processor(tokenizer).save_pretrained(args.output / "clip")
            numbers = {"train": measure(model, tokenizer, train), "held_out": measure(model, tokenizer, kept)}
        (args.output / "measured.json").write_text(json.dumps({"retrieval_of_32": numbers}, indent=1) + "\n")
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
