"""One pass over an image set: every image is decoded once, every network sees it once, every metric takes what it needs.

Images are read in blocks of one size in one order, block k by process k mod W; the main process takes the rows in that order.
So the numbers depend neither on the number of processes nor on who was faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pipelines.common.errors import UserError

from ..images.files import Images, same_sizes
from ..networks.extractors import Extractor
from .distances import InceptionScore
from .frechet import GaussianStats

if TYPE_CHECKING:
    from accelerate import Accelerator

Rows = dict[str, dict[str, Tensor]]  # extractor -> output -> (b, columns) on the CPU


class Gathered:
    """What a set of n images leaves: statistics and, where wanted, all rows, by extractor.

    keep: extractors whose feature rows are kept (float32 (n, d) each). stats: Gaussian statistics of "features"; scores: means of
    the one-column outputs with each image's own value.
    """

    def __init__(self, n: int, extractors: Mapping[str, Extractor], keep: Sequence[str] = ()) -> None:
        self.n, self.seen = n, 0
        outputs = {(key, name): size for key, e in extractors.items() for name, size in e.outputs.items()}
        self.stats = {key: GaussianStats(size) for (key, name), size in outputs.items() if name == "features"}
        self.rows = {key: torch.empty(n, extractors[key].outputs["features"]) for key in keep}
        self.single = {name: torch.empty(n) for (_, name), size in outputs.items() if name in ("cosine", "aesthetic")}
        self.inception = {key: InceptionScore(n, size) for (key, name), size in outputs.items() if name == "logits"}

    def update(self, rows: Rows) -> None:
        """rows: extractor -> output -> (b, columns) of the next b images. UserError names the first image whose features are not
        finite.
        """
        b = 0
        for key, outputs in rows.items():
            for name, values in outputs.items():
                b = len(values)
                bad = ~torch.isfinite(values).all(1)
                if bool(bad.any()):
                    first = self.seen + int(bad.nonzero()[0])
                    raise UserError(
                        f"{name} of {key} are NaN or infinite for {int(bad.sum())} images, the first is image {first}"
                    )
                if name == "features":
                    self.stats[key].update(values)
                    if key in self.rows:
                        self.rows[key][self.seen : self.seen + b] = values
                elif name == "logits":
                    self.inception[key].update(values)
                else:
                    self.single[name][self.seen : self.seen + b] = values[:, 0]
        self.seen += b


def one_pass(
    images: Images,
    extractors: Mapping[str, Extractor],
    keep: Sequence[str] = (),
    captions: Sequence[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: str | None = None,
    start_method: str | None = None,
) -> Gathered:
    """All images through all extractors. images: items {view: uint8 (3, h, w)}; captions: one an image where they are needed.

    On processes other than the main one the result stays empty. start_method: of the workers (fork, spawn, forkserver).
    UserError: an image that cannot be read, or features that are not finite.
    """
    main = accelerator is None or accelerator.is_main_process
    gathered = Gathered(len(images), extractors, keep if main else ())
    for rows in _rounds(images, extractors, captions, batch_size, workers, accelerator, progress, start_method):
        gathered.update(rows)
    return gathered


def _rounds(
    images: Images,
    extractors: Mapping[str, Extractor],
    captions: Sequence[str] | None,
    batch_size: int,
    workers: int,
    accelerator: Accelerator | None,
    progress: str | None,
    start_method: str | None,
) -> Iterator[Rows]:
    """Rows in the order of the images; on the main process only."""
    n = len(images)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    blocks = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    mine = [list(block) for block in blocks[rank::world]]
    context = start_method if workers else None
    loader = iter(
        DataLoader(images, batch_sampler=mine, num_workers=workers, collate_fn=same_sizes, multiprocessing_context=context)
    )
    sizes = [(key, name, size) for key, e in extractors.items() for name, size in e.outputs.items()]
    bar = tqdm(total=n, desc=progress, unit="image", disable=progress is None or rank != 0)
    for first in range(0, len(blocks), world):
        block = blocks[first + rank] if first + rank < len(blocks) else range(0)
        rows = _extract(next(loader), block, extractors, captions) if len(block) else None
        if accelerator is None or world == 1:
            if rows is not None:
                yield rows
        else:  # every process sends a tensor of one shape; what is missing from the last round is cut off again
            sent = torch.zeros(batch_size, sum(size for *_, size in sizes), device=accelerator.device)
            if rows is not None:
                flat = torch.cat([rows[key][name] for key, name, _ in sizes], dim=1)
                sent[: len(flat)] = flat.to(sent.device)
            received = accelerator.gather(sent).cpu().split(batch_size)
            if rank == 0:
                for taken, values in zip(blocks[first : first + world], received, strict=False):
                    parts = values[: len(taken)].split([size for *_, size in sizes], dim=1)
                    found: Rows = {}
                    for (key, name, _), part in zip(sizes, parts, strict=True):
                        found.setdefault(key, {})[name] = part
                    yield found
        bar.update(sum(len(b) for b in blocks[first : first + world]))
    bar.close()


def _extract(
    stacks: list[dict[str, Tensor]], block: range, extractors: Mapping[str, Extractor], captions: Sequence[str] | None
) -> Rows:
    found: dict[str, dict[str, list[Tensor]]] = {}
    start = block.start
    for stack in stacks:
        b = len(next(iter(stack.values())))
        texts = captions[start : start + b] if captions is not None else None
        start += b
        for key, extractor in extractors.items():
            for name, values in extractor(stack[extractor.view], texts).items():
                found.setdefault(key, {}).setdefault(name, []).append(values.float().cpu())
    return {key: {name: torch.cat(parts) for name, parts in outputs.items()} for key, outputs in found.items()}
