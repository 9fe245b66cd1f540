"""Write the captioned pictures that the teacher is trained on: each emoji on every background, its caption whole or shortened.

    python -m scripts.assets.pairs [--output outputs/assets/pairs] [--groups food-drink ...]
    python -m scripts.assets.pairs --ship

Writes train.parquet and held_out.parquet with columns image, caption, name, style, background, which `data: {name: captions}`
reads. --ship writes assets/emoji/captioned_32.parquet instead: each training picture on two backgrounds, which the students'
recipes read. Which captions leave out style or background, and those two, follow from a hash: the same files on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipelines import emoji
from pipelines.common.launch import user_errors
from pipelines.common.options import path
from pipelines.data.images import to_pixels

WITHOUT_STYLE, WITHOUT_BACKGROUND = 60, 60  # percent of captions
SHIPPED = Path("assets/emoji/captioned_32.parquet")


def shortened(name: str, style: str, background: str) -> str:
    """The caption, its style or background left out in some, by a hash of the three."""
    digest = hashlib.sha256(f"{name}|{style}|{background}".encode()).digest()
    says_style, says_background = digest[0] * 100 >= WITHOUT_STYLE * 256, digest[1] * 100 >= WITHOUT_BACKGROUND * 256
    return emoji.caption(name, style if says_style else None, background if says_background else None)


def write(pictures: emoji.Pictures, file: Path, backgrounds: int) -> None:
    """Each picture on so many backgrounds, from one on that a hash of its name and style chooses."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {key: [] for key in ("image", "caption", "name", "style", "background")}
    palette, names = emoji.palette(), list(emoji.BACKGROUNDS)
    for i in tqdm(range(len(pictures)), desc=file.stem, mininterval=5):
        name, style = pictures.names[i], pictures.styles[i]
        first = hashlib.sha256(f"{name}|{style}".encode()).digest()[0]
        chosen = [(first + turn) % len(names) for turn in range(backgrounds)]
        pixels = to_pixels(emoji.on_background(pictures.rgba[i].expand(len(chosen), -1, -1, -1), palette[chosen]))
        for image, background in zip(pixels, (names[b] for b in chosen), strict=True):
            stream = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "WEBP", lossless=True)
            values = ({"bytes": stream.getvalue(), "path": None}, shortened(name, style, background), name, style, background)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    strings = {key: {"dtype": "string", "_type": "Value"} for key in columns if key != "image"}
    info = {"info": {"features": {"image": {"_type": "Image"}} | strings}}
    columns["image"] = pa.array(columns["image"], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=path, default=Path("outputs/assets/pairs"))
    place.add_argument("--ship", action="store_true", help="write assets/emoji/captioned_32.parquet instead")
    parser.add_argument("--groups", nargs="+", default=list(emoji.GROUPS))
    args = parser.parse_args(argv)
    with user_errors():
        pictures = emoji.load()
        if args.ship:
            write(pictures.part(held_out=False, groups=tuple(args.groups)), SHIPPED, backgrounds=2)
            return
        for name, held_out in (("train", False), ("held_out", True)):
            write(pictures.part(held_out, tuple(args.groups)), args.output / f"{name}.parquet", len(emoji.BACKGROUNDS))


if __name__ == "__main__":
    main()
