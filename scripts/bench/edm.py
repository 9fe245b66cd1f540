"""The CIFAR-10 network (DDPM++, 55.7M) against NVlabs' own code: conversion, and time of forward and backward passes.

    git clone https://github.com/NVlabs/edm    # not part of this project; CC BY-NC-SA
    python -m scripts.bench.edm --nvlabs edm [--batch 16] [--repeats 10] [--output outputs/bench]

Their class makes the network with random weights and writes the snapshot; scripts.convert_edm converts it, in its own process.
Then both networks run in turn on the same input, in float32, here. Writes <output>/edm.json.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.common.launch import user_errors
from pipelines.common.options import path, whole
from pipelines.common.provenance import git_commit, versions
from pipelines.edm import EDMPipeline

NETWORK = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "augment_dim": 9, "channel_mult": [2, 2, 2]}


def snapshot(nvlabs: Path, file: Path) -> torch.nn.Module:
    """Their network with random weights, also as a file."""
    sys.path.insert(0, str(nvlabs))
    from training.networks import EDMPrecond

    torch.manual_seed(0)
    net = EDMPrecond(**NETWORK).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # no branch of it is near zero
    with file.open("wb") as stream:
        pickle.dump({"ema": net}, stream)
    return net


def conversion(file: Path, folder: Path) -> dict[str, float]:
    """Seconds of the whole process, and its largest resident memory, python included, over the size of the file (Linux)."""
    # not getrusage: its maximum goes back to before exec, to this process
    code = "import sys; from scripts.convert_edm import main; main(sys.argv[1:]); "
    code += "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(file), str(folder)], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory_over_file": int(done.stdout.split()[-2]) * 1024 / file.stat().st_size}


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvlabs", type=path, required=True, help="a checkout of NVlabs/edm")
    parser.add_argument("--batch", type=whole(1), default=16)
    parser.add_argument("--repeats", type=whole(1), default=10)
    parser.add_argument("--threads", type=whole(1))
    parser.add_argument("--output", type=path, default=Path("outputs/bench"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as made:
        file, folder = Path(made) / "net.pkl", Path(made) / "converted"
        theirs = snapshot(args.nvlabs, file)
        numbers: dict[str, Any] = {"conversion": conversion(file, folder)}
        ours = EDMPipeline.from_pretrained(folder).unet
    x, time_ = torch.randn(args.batch, 3, 32, 32), torch.randn(args.batch)

    def their_pass() -> Tensor:
        return theirs.model(x, time_, None)

    def our_pass() -> Tensor:
        return ours(x, time_).sample

    def with_backward(network: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def both() -> None:
            network.zero_grad()
            forward().square().mean().backward()

        return both

    with torch.no_grad():
        numbers["relative_difference"] = float((our_pass() - their_pass()).norm() / their_pass().norm())
        passes = {"forward": timed({"theirs": their_pass, "ours": our_pass}, args.repeats)}
    for network in (theirs, ours):
        network.requires_grad_(True).eval()
    both = {"theirs": with_backward(theirs, their_pass), "ours": with_backward(ours, our_pass)}
    passes["forward_backward"] = timed(both, max(3, args.repeats // 2))
    for name, seconds in passes.items():
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        numbers[name] = {key: {"median": statistics.median(v), "min": min(v)} for key, v in seconds.items()}
        numbers[name]["ours_over_theirs"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    facts = {
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "versions": versions(("torch",)),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "edm.json").write_text(json.dumps(numbers | facts, indent=1))
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    with user_errors():
        main()
