"""The evaluation against the libraries it replaces, on the same weights: exactness and time of the Frechet distance, one pass
against one library after the other, and agreement of every number.

    python -m scripts.bench.evaluation [--images 256] [--cifar DIR]

Networks are made here with random weights (parts/random_networks.py), in the published files' formats. --cifar: a folder with
train.parquet and test.parquet; without it images are random. Writes outputs/bench/eval.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.images.files import ImageFiles
from eval.metrics.distances import kernel_distance, precision_recall
from eval.metrics.frechet import GaussianStats, frechet_from_moments
from eval.metrics.one_pass import one_pass
from eval.networks.extractors import Clip, Inception
from eval.networks.weights import Found
from eval.protocols import PROTOCOLS
from pipelines.common.launch import user_errors
from pipelines.common.options import path, whole

from .parts import random_networks

DIM = 2048


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def exact_frechet(x: Tensor, y: Tensor) -> float:
    """From the data themselves, float64: the trace term is the nuclear norm of R_a R_b^T, with A = Q_a R_a the centred data."""
    a, b = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x.double(), y.double()))
    r_a, r_b = (torch.linalg.qr(v, mode="r").R for v in (a, b))
    trace = torch.linalg.svdvals(r_a @ r_b.T).sum()
    return float((x.double().mean(0) - y.double().mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace)


def frechet(n: int) -> dict[str, float]:
    """Two sets of n correlated features, eigenvalues falling as 1/k as Inception's do: seconds and relative errors."""
    from cleanfid.fid import frechet_distance

    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, DIM + 1, dtype=torch.float64) ** -0.5
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    x, y = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) * spectrum @ basis for _ in range(2))
    y = y * 1.05 + 0.01
    truth = exact_frechet(x, y)
    a, b = GaussianStats.of(x), GaussianStats.of(y)
    moments = (a.mean, a.cov, b.mean, b.cov)
    ours, ours_seconds = timed(lambda: frechet_from_moments(*moments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of the argument that clean-fid passes (scipy 1.18 refuses it)
        theirs, their_seconds = timed(lambda: float(np.real(frechet_distance(*(m.numpy() for m in moments)))))
    return {
        "n": n,
        "exact": truth,
        "ours_seconds": ours_seconds,
        "clean_fid_seconds": their_seconds,
        "ours_error": abs(ours - truth) / truth,
        "clean_fid_error": abs(theirs - truth) / truth,
    }


def save_images(source: str | None, count: int, folder: Path, start: int = 0) -> Path:
    """PNG files of CIFAR-10 rows, or of random images: every library can read them."""
    folder.mkdir(parents=True)
    protocol = PROTOCOLS["cifar10-50k"]
    if source is None:
        generator = torch.Generator().manual_seed(start)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        pixels = (torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear") * 255).to(torch.uint8)
    else:
        images = ImageFiles(source, protocol, limit=start + count)
        pixels = torch.stack([images[i]["image"] for i in range(start, start + count)])
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:06d}.png")
    return folder


class Theirs:
    """The same numbers by clean-fid, torch-fidelity and torchmetrics, each reading the folder for itself, as users call them."""

    def __init__(self, script: Path, weights: Path, clip: Path, reference: Path, work: Path) -> None:
        from cleanfid.inception_torchscript import InceptionV3W
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.registry import register_feature_extractor

        shutil.copy(script, work / "inception-2015-12-05.pt")
        self.inception = InceptionV3W(str(work), download=False)
        self.clip, self.reference, self.work = clip, reference, work

        class Compatible(FeatureExtractorInceptionV3):
            def __init__(self, name, features_list, **kwargs):
                super().__init__(name, features_list, feature_extractor_weights_path=str(weights))

        register_feature_extractor("same-weights", Compatible)
        self.reference_features = self.features(reference)
        self.fidelity(reference)  # fills its cache with the reference's features, as ours are kept too

    def features(self, folder: Path) -> np.ndarray:
        from cleanfid.fid import get_folder_features

        options = {"num_workers": 0, "batch_size": 64, "device": torch.device("cpu"), "verbose": False}
        return get_folder_features(str(folder), self.inception, mode="clean", **options)

    def fid(self, folder: Path) -> float:
        from cleanfid.fid import frechet_distance

        found = self.features(folder)
        moments = [(np.mean(f, axis=0), np.cov(f, rowvar=False)) for f in (found, self.reference_features)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(np.real(frechet_distance(*moments[0], *moments[1])))

    def kid(self, folder: Path) -> float:
        from cleanfid.fid import kernel_distance as theirs

        found = self.features(folder)
        np.random.seed(0)  # noqa: NPY002 clean-fid draws from it
        return theirs(self.reference_features, found, num_subsets=20)

    def fidelity(self, folder: Path) -> dict[str, float]:
        from torch_fidelity import calculate_metrics

        return calculate_metrics(
            input1=str(folder),
            input2=str(self.reference),
            prc=True,
            feature_extractor="same-weights",
            feature_layer_prc="2048",
            cuda=False,
            verbose=False,
            cache_root=str(self.work / "cache"),
            cache_input2_name="reference",
            samples_find_deep=True,
        )

    def clip_score(self, folder: Path, captions: list[str]) -> float:
        from torchmetrics.multimodal import CLIPScore
        from transformers import AutoProcessor, CLIPModel

        class Unwrapped:  # torchmetrics 1.9 expects transformers 4's tensors
            def __init__(self, model: CLIPModel) -> None:
                self.model, self.device, self.config = model, model.device, model.config

            def get_image_features(self, *args, **kwargs):
                return self.model.get_image_features(*args, **kwargs).pooler_output

            def get_text_features(self, *args, **kwargs):
                return self.model.get_text_features(*args, **kwargs).pooler_output

            def to(self, *args):
                return self

            def eval(self):
                return self

        pair = (Unwrapped(CLIPModel.from_pretrained(self.clip).eval()), AutoProcessor.from_pretrained(self.clip))
        metric = CLIPScore(model_name_or_path=lambda: pair)
        images = ImageFiles(str(folder), PROTOCOLS["custom"])
        with torch.no_grad():
            for start in range(0, len(images), 64):
                rows = range(start, min(start + 64, len(images)))
                metric.update([images[i]["image"] for i in rows], [captions[i] for i in rows])
        return metric.compute().item() / 100


def one_against_separate(count: int, cifar: Path | None, work: Path) -> dict[str, Any]:
    source = [None, None] if cifar is None else [str(cifar / "test.parquet"), str(cifar / "train.parquet")]
    generated = save_images(source[0], count, work / "generated")
    reference = save_images(source[1], 2 * count, work / "reference", start=7)
    protocol = replace(PROTOCOLS["custom"], inception="clean")
    calibration = torch.stack([ImageFiles(str(reference), protocol)[i]["image"] for i in range(32)])
    script, weights = random_networks.inception(work / "inception.pt", calibration, full=True)
    clip = random_networks.clip(work / "clip", size=224, width=512, projection=512, layers=8, patch=32)
    captions = [f"a small photo, number {i}" for i in range(count)]
    extractors = {
        "inception": Inception(Found(script, "", False), "clean"),
        "clip": Clip("clip", Found(clip, "", False), ["cosine"]),
    }
    real = one_pass(ImageFiles(str(reference), protocol), {"inception": extractors["inception"]}, ["inception"])
    theirs = Theirs(script, weights, clip, reference, work)

    def ours() -> dict[str, float]:
        found = one_pass(ImageFiles(str(generated), protocol), extractors, ["inception"], captions)
        stats, size = found.stats["inception"], min(1000, count)
        reference_stats = real.stats["inception"]
        precision, recall = precision_recall(found.rows["inception"], real.rows["inception"])
        return {
            "fid": frechet_from_moments(stats.mean, stats.cov, reference_stats.mean, reference_stats.cov),
            "kid": kernel_distance(found.rows["inception"], real.rows["inception"], subsets=20, size=size)[0],
            "precision": precision,
            "recall": recall,
            "clip_score": found.single["cosine"].double().mean().item(),
        }

    numbers, seconds = timed(ours)
    separate, numbers_there = {}, {}
    for name, call in (("fid", theirs.fid), ("kid", theirs.kid), ("precision_recall", theirs.fidelity)):
        numbers_there[name], separate[name] = timed(lambda call=call: call(generated))
    numbers_there["clip_score"], separate["clip_score"] = timed(lambda: theirs.clip_score(generated, captions))
    total = sum(separate.values())
    return {
        "n": count,
        "ours_images_per_s": count / seconds,
        "separate_images_per_s": count / total,
        "ratio": total / seconds,
        "ours_seconds": seconds,
        "separate_seconds": separate,
        "ours": numbers,
        "theirs": numbers_there,
    }


def agreement(cifar: Path, work: Path, output: Path) -> dict[str, Any]:
    """`python -m eval run` on CIFAR-10's test set against its training set, and the libraries on the same files and network."""
    from cleanfid import fid as clean
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor
    from torchmetrics.image import FrechetInceptionDistance

    from eval.__main__ import main as evaluate

    sets = [str(cifar / f"{name}.parquet") for name in ("test", "train")]
    first = ImageFiles(sets[0], PROTOCOLS["cifar10-50k"], limit=64)
    calibration = torch.stack([first[i]["image"] for i in range(len(first))])
    script, _ = random_networks.inception(work / "inception.pt", calibration, dim=DIM)
    metrics = ["fid", "kid", "inception_score", "precision_recall"]
    command = [
        "run",
        "--protocol",
        "cifar10-50k",
        "--images",
        sets[0],
        "--reference",
        sets[1],
        "--num-images",
        "10000",
        "--force",
    ]
    _, seconds = timed(lambda: evaluate([*command, "--metrics", *metrics, "--inception", str(script), "--output", str(output)]))
    found = json.loads((output / "metrics.json").read_text())["metrics"]
    ours = {name: numbers["value"] for name, numbers in found.items()}

    folders = [save_images(source, n, work / f"png{n}") for source, n in zip(sets, (10_000, 50_000), strict=True)]
    net = torch.jit.load(str(script))

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return net(images, return_features=True)

    class Same(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, images):
            values = features(images)
            return tuple({"f": values, "logits": values @ net.output.weight.detach().T}[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "f", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits"}.get(metric, "f")

    class Module(torch.nn.Module):
        num_features = DIM

        def forward(self, images):
            return features(images)

    register_feature_extractor("same-small", Same)
    both = {"input1": str(folders[0]), "input2": str(folders[1]), "samples_find_deep": True}
    what = {"fid": True, "kid": True, "isc": True, "prc": True, "save_cpu_ram": True}
    fidelity = calculate_metrics(**both, **what, feature_extractor="same-small", cuda=False, verbose=False, cache=False)

    options = {"num_workers": 0, "batch_size": 64, "device": torch.device("cpu"), "verbose": False, "mode": "legacy_tensorflow"}
    arrays = [clean.get_folder_features(str(folder), features, **options) for folder in folders]
    narrow, wide = ([m for a in arrays for m in (a.astype(kind).mean(0), np.cov(a, rowvar=False))] for kind in ("f4", "f8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cleans = [float(np.real(clean.frechet_distance(*moments))) for moments in (narrow, wide)]
    torchmetric = FrechetInceptionDistance(feature=Module(), antialias=False)
    for array, real in ((arrays[1], True), (arrays[0], False)):  # its network would give these very features
        torchmetric.inception = torch.nn.Identity()
        for rows in torch.from_numpy(array).split(1000):
            torchmetric.update(rows, real=real)
    return {
        "seconds": seconds,
        "ours": ours,
        "torch_fidelity": dict(fidelity),
        "clean_fid": {"fid_float32_means_as_it_does": cleans[0], "fid_float64_means": cleans[1]},
        "torchmetrics": {"fid": torchmetric.compute().item()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=whole(2), default=256)
    parser.add_argument("--cifar", type=path)
    parser.add_argument("--agreement", action="store_true", help="10,000 against 50,000 CIFAR-10 images, everywhere; 20 minutes")
    parser.add_argument("--output", type=path, default=Path("outputs/bench/eval.json"))
    args = parser.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    found["frechet"] = frechet(10_000)
    print(json.dumps(found["frechet"]), flush=True)
    found["frechet_few"] = frechet(1_000)
    print(json.dumps(found["frechet_few"]), flush=True)
    with tempfile.TemporaryDirectory() as work:
        found["one_pass"] = one_against_separate(args.images, args.cifar, Path(work))
        print(json.dumps(found["one_pass"], indent=1), flush=True)
    if args.agreement:
        with tempfile.TemporaryDirectory() as work:
            found["agreement"] = agreement(args.cifar, Path(work), args.output.parent / "eval_cifar10")
        print(json.dumps(found["agreement"], indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    with user_errors():
        main()
