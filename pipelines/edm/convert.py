"""A network of NVlabs' EDM code base -> the folder of an EDMPipeline. Needs numpy and safetensors alone, runs nothing of theirs.

Three containers hold the same tensors under the same names: the pickles of EDM and of SiD (a persistent object with all of its
modules), and FastGen's .pth (torch.save's zip of a state dict). The architecture is read off the tensors' names and shapes, and
everything else that the file says is compared with it. A .pth may also hold a network of points (convert_points.py).
"""

from __future__ import annotations

import json
import math
import mmap
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..atomic import new_folder
from .convert_points import finite, is_point_network, point_network
from .layout import PRECONDITIONING, STYLES, check_layout, decoder_layers, encoder_layers, state_shapes
from .pickles import DAMAGE, Instance, SnapshotError
from .torch_pickles import Array, Storage, read_torch_pickle, storage_key

PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
MODELS = {"SongUNet": "song", "DhariwalUNet": "adm"}
NETWORKS = {"EDMUNet": "pipelines.edm.unet", "PointNet": "pipelines.edm.point_net"}
SAMPLED = (0.002, 80.0)  # where the EDM paper samples, within what a network knows
RESOLUTION = re.compile(r"(\d+)x\1_")


@dataclass
class Snapshot:
    """tensors by NVlabs' names without `model.`; network and model: the objects, where the file has them."""

    tensors: dict[str, Array]
    preconditioning: str
    network: Instance | None = None
    model: Instance | None = None
    objects: dict[str, Instance] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What a folder holds: the configurations of the network and of the scheduler, its size, and what was left out."""

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    parameters: int
    left_out: tuple[str, ...]


def convert(source: str | Path, output: str | Path) -> Converted:
    """Write the EDMPipeline in `source` to the folder `output`, whole or not at all.

    SnapshotError: the file is not such a snapshot (the global, opcode or offset is named). FileExistsError: output is there.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already; name another folder, or remove it")
    if not source.is_file():
        raise FileNotFoundError(f"no such file {str(source)!r}")
    if source.stat().st_size == 0:
        raise SnapshotError(f"{str(source)!r} is empty")
    with source.open("rb") as file:
        # closed with its last view, which an error's traceback may hold
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        snapshot = read_zip(source) if data[:4] == b"PK\x03\x04" else read_snapshot(data)
        if is_point_network(snapshot.tensors):
            name, left_out = "PointNet", ()
            unet, scheduler, weights = point_network(snapshot.tensors)
        else:
            name = "EDMUNet"
            unet, left_out = describe(snapshot)
            tensors, scheduler = renamed(snapshot, unet), describe_scheduler(snapshot, unet)
            weights = arrays(unet, tensors)
    except SnapshotError:
        raise
    except DAMAGE as error:
        raise SnapshotError(f"the file is damaged or holds another network ({type(error).__name__}: {error})") from error
    count = sum(math.prod(w.shape) for key, w in weights.items() if key != "map_noise.freqs")
    with new_folder(output) as partial:
        write(partial, name, unet, scheduler, weights)
    return Converted(unet, scheduler, count, left_out)


# Containers -------------------------------------------------------------------------------------------------------------------


def read_snapshot(data: memoryview) -> Snapshot:
    """A pickle of EDM or SiD: {"ema": the network, ...}, or the network itself."""
    value, end = read_torch_pickle(data)
    if end != len(data):
        raise SnapshotError(f"byte {end}: {len(data) - end} more bytes after the end of the pickle")
    network = value.get("ema") if isinstance(value, dict) else value
    if not isinstance(network, Instance):
        held = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise SnapshotError(f"the file holds {held}; expected a network under 'ema'")
    if network.class_name not in PRECONDITIONERS:
        raise SnapshotError(f"the network is a {network.class_name}; expected one of {', '.join(PRECONDITIONERS)}")
    tensors: dict[str, Array] = {}
    objects: dict[str, Instance] = {}
    collect(network, "", tensors, objects)
    model = objects.get("model.")
    if model is None or model.class_name not in MODELS:
        raise SnapshotError(f"the model is a {model and model.class_name}; expected one of {', '.join(MODELS)}")
    return Snapshot(without_prefix(tensors), PRECONDITIONERS[network.class_name], network, model, without_prefix(objects))


def collect(module: Instance, prefix: str, tensors: dict[str, Array], objects: dict[str, Instance]) -> None:
    """All parameters and buffers below a module, by their dotted names, and all modules by theirs."""
    objects[prefix] = module
    for kind in ("_parameters", "_buffers"):
        for name, tensor in entries(module, kind).items():
            if tensor is not None and not isinstance(tensor, Array):
                raise SnapshotError(f"{prefix}{name} is a {type(tensor).__name__}, not a tensor")
            if tensor is not None:
                tensors[prefix + name] = tensor
    for name, child in entries(module, "_modules").items():
        if child is not None and not isinstance(child, Instance):
            raise SnapshotError(f"{prefix}{name} is a {type(child).__name__}, not a module")
        if child is not None:
            if prefix.count(".") > 50:
                raise SnapshotError("modules within modules without end")
            collect(child, f"{prefix}{name}.", tensors, objects)


def entries(module: Instance, kind: str) -> dict[str, Any]:
    held = module.state.get(kind, {})
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise SnapshotError(f"{module.class_name}.{kind} is not a dictionary of names")
    return held


def without_prefix(values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("model."): value for key, value in values.items()}


def read_zip(file: Path) -> Snapshot:
    """FastGen: a state dict of the network, or a checkpoint {"model": {"ema" or "net": state dict, ...}, ...}."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = set(archive.namelist())
            names = [n for n in members if n.endswith("/data.pkl")]
            if len(names) != 1:
                raise SnapshotError(f"a zip file with {len(names)} data.pkl; expected torch.save's")
            root = names[0].removesuffix("data.pkl")
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise SnapshotError(f"{entry.filename} is compressed, which torch.save does not do")
            if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
                raise SnapshotError("the file was written on a big-endian machine")
            held: dict[str, Storage] = {}

            def storage(key: tuple) -> Storage:
                kind, name, size = storage_key(key)
                if name not in held:
                    if f"{root}data/{name}" not in members:
                        raise SnapshotError(f"storage {name} is missing; the file is damaged or truncated")
                    data = archive.read(f"{root}data/{name}")
                    if len(data) < size * kind.itemsize:
                        raise SnapshotError(f"storage {name} of {size} numbers has {len(data)} bytes; it is truncated")
                    held[name] = Storage(kind, data)
                return held[name]

            value, _ = read_torch_pickle(memoryview(archive.read(names[0])), storage)
    except (zipfile.BadZipFile, EOFError) as error:
        raise SnapshotError(f"the zip file is damaged or truncated ({error})") from error
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"].get("ema", value["model"].get("net"))
    if not isinstance(value, dict) or not value or not all(isinstance(v, Array) for v in value.values()):
        raise SnapshotError("the file holds no state dict; expected tensors by name")
    return Snapshot(without_prefix(value), "edm")


# What it is -------------------------------------------------------------------------------------------------------------------


def describe(snapshot: Snapshot) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(EDMUNet's configuration, what of the file is left out). SnapshotError where the file contradicts itself."""
    tensors = snapshot.tensors
    if any("aux_up" in name for name in (*tensors, *snapshot.objects)):
        raise SnapshotError("decoder_type 'skip' is not supported: no published network has it")

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise SnapshotError(f"the file has no tensor {name!r}, which every such network has")
        return tensors[name].shape

    sizes = sorted({int(m[1]) for name in tensors if (m := RESOLUTION.search(name))}, reverse=True)
    if not sizes:
        raise SnapshotError("no tensor is named after a resolution, as enc.32x32_conv.weight; this is no EDM network")
    size = sizes[0]
    architecture = "adm" if "out_norm.weight" in tensors else "song"
    width, in_channels = shape(f"enc.{size}x{size}_conv.weight")[:2]
    emb, noise = shape("map_layer0.weight")
    blocks = 0
    while f"enc.{size}x{size}_block{blocks}.conv0.weight" in tensors:
        blocks += 1
    last = "out_conv.weight" if architecture == "adm" else f"dec.{size}x{size}_aux_conv.weight"
    unet = {
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": shape(last)[0],
        "num_classes": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "augment_dim": tensors["map_augment.weight"].shape[1] if "map_augment.weight" in tensors else 0,
        "architecture": architecture,
        "model_channels": width,
        "channel_mult": [shape(f"enc.{s}x{s}_block0.conv0.weight")[0] // width for s in sizes],
        "channel_mult_emb": emb // width,
        "channel_mult_noise": noise // width,
        "num_blocks": blocks,
        "attention_resolutions": [s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors],
        "dropout": 0.0,
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "encoder_type": next((t for t in ("skip", "residual") if any(f"aux_{t}" in n for n in tensors)), "standard"),
        "resample_filter": filter_taps(snapshot),
    }
    try:
        check_layout(unet)
    except ValueError as error:
        raise SnapshotError(f"the tensors are those of no EDM network: {error}") from error
    left_out = []
    if snapshot.model is not None:
        unet["dropout"] = compare(snapshot, unet)
        if rate := snapshot.model.state.get("label_dropout", 0):
            left_out.append(f"label_dropout {rate} (of training only)")
    if any(name.startswith("logvar_linear.") for name in tensors):
        left_out.append("logvar_linear (FastGen's uncertainty, of training only)")
    return unet, tuple(left_out)


def filter_taps(snapshot: Snapshot) -> list[int]:
    """The integers whose outer product, divided by the square of their sum, all stored resample filters are."""
    found = {name: tensor.numpy() for name, tensor in snapshot.tensors.items() if name.endswith("resample_filter")}
    for name, kernel in found.items():
        row = kernel.reshape(kernel.shape[-2:])[0] if kernel.ndim == 4 and kernel.shape[-1] else np.zeros(1)
        taps = np.rint(row / row.min()).astype(int) if row.min() > 0 else np.zeros(1, int)
        expected = np.outer(taps, taps) / max(int(taps.sum()) ** 2, 1)
        if kernel.shape != (1, 1, len(taps), len(taps)) or np.abs(kernel[0, 0] - expected).max() > 1e-6:
            raise SnapshotError(f"{name} is not a separable filter of small integers")
        if (first := next(iter(found.values()))).shape != kernel.shape or not np.array_equal(first, kernel):
            raise SnapshotError(f"{name} differs from the other filters")
    return taps.tolist() if found else [1, 1]


def compare(snapshot: Snapshot, unet: dict[str, Any]) -> float:
    """Everything that the objects say of themselves must be what EDMUNet does with these tensors; gives the dropout."""
    style = STYLES[unet["architecture"]]

    def same(name: str, state: dict[str, Any], key: str, expected: Any) -> None:
        held = state.get(key, expected)
        close = isinstance(held, int | float) and isinstance(expected, int | float) and math.isclose(held, expected, rel_tol=1e-7)
        if held != expected and not close:
            raise SnapshotError(f"{name}{key} is {held!r}, where such a network has {expected!r}")

    if MODELS[snapshot.model.class_name] != unet["architecture"]:
        raise SnapshotError(f"a {snapshot.model.class_name} with the tensors of architecture {unet['architecture']!r}")
    given = snapshot.network.state.get("_init_kwargs") or {}
    if snapshot.network.state.get("_init_args"):
        raise SnapshotError("the network was made with positional arguments, which NVlabs' training never does")
    for theirs, ours in (
        ("img_resolution", "sample_size"),
        ("img_channels", "in_channels"),
        ("label_dim", "num_classes"),
        ("augment_dim", "augment_dim"),
        ("model_channels", "model_channels"),
        ("channel_mult", "channel_mult"),
        ("channel_mult_emb", "channel_mult_emb"),
        ("channel_mult_noise", "channel_mult_noise"),
        ("num_blocks", "num_blocks"),
        ("embedding_type", "embedding_type"),
        ("encoder_type", "encoder_type"),
        ("resample_filter", "resample_filter"),
    ):
        same("init_kwargs.", given, theirs, unet[ours])
    dropouts = set()
    layers = [("enc.", layer) for layer in encoder_layers(unet)] + [("dec.", layer) for layer in decoder_layers(unet)]
    for prefix, layer in layers:
        name = f"{prefix}{layer.name}."
        if layer.kind != "block" or name not in snapshot.objects:
            continue  # a missing one is missed with its tensors
        block = snapshot.objects[name].state
        same(name, block, "num_heads", layer.heads)
        same(name, block, "skip_scale", style.skip_scale)
        same(name, block, "adaptive_scale", style.adaptive_scale)
        dropouts.add(block.get("dropout", 0))
    for name, module in snapshot.objects.items():
        if module.class_name == "GroupNorm":
            same(name, module.state, "eps", 1e-6 if name.endswith("aux_norm.") else style.eps)
            same(name, module.state, "num_groups", min(32, module.state["_parameters"]["weight"].shape[0] // 4))
        if module.class_name == "PositionalEmbedding":
            same(name, module.state, "endpoint", unet["architecture"] == "song")
            same(name, module.state, "max_positions", 10000)
    if len(dropouts) != 1 or not all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in dropouts):
        raise SnapshotError(f"blocks with dropout {sorted(map(repr, dropouts))}; expected one rate for all")
    return float(dropouts.pop())


def describe_scheduler(snapshot: Snapshot, unet: dict[str, Any]) -> dict[str, Any]:
    """EDMScheduler's configuration: strict JSON, so that the infinite sigma_max of EDM becomes the paper's."""
    name, state = snapshot.preconditioning, snapshot.network.state if snapshot.network else {}
    settings = {key: state.get(key, default) for key, default in PRECONDITIONING[name].items()}
    limits = [state.get("sigma_min", 0.0), state.get("sigma_max", math.inf)]
    for key, value in {**settings, "sigma_min": limits[0], "sigma_max": limits[1]}.items():
        if not isinstance(value, int | float) or math.isnan(value) or (math.isinf(value) and key != "sigma_max"):
            raise SnapshotError(f"{key} is {value!r}; expected a number")
    if (unet["out_channels"] == 2 * unet["in_channels"]) != (name == "iddpm"):
        raise SnapshotError(f"{unet['in_channels']} channels in, {unet['out_channels']} out, with {name} preconditioning")
    if name == "iddpm":
        check_levels(snapshot, settings)
    low, high = max(SAMPLED[0], limits[0]), min(SAMPLED[1], limits[1])
    return settings | {"preconditioning": name, "sigma_min": low, "sigma_max": high, "sampler": "heun", "num_inference_steps": 18}


def check_levels(snapshot: Snapshot, settings: dict[str, Any]) -> None:
    """The stored table u must be the one that its settings give (preconditioning.IDDPM), to the accuracy of float32."""
    m = settings["M"]
    alpha_bar = np.sin(0.5 * np.pi * np.arange(m + 1) / m / (settings["C_2"] + 1)) ** 2
    u = np.zeros(m + 1)
    for j in range(m, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], settings["C_1"]) - 1)
    stored = snapshot.tensors.get("u")
    if stored is None or stored.shape != (m + 1,) or not np.allclose(stored.numpy(), u, rtol=5e-3, atol=1e-6):
        raise SnapshotError("the table of noise levels, u, is not that of C_1, C_2 and M")


# Writing ----------------------------------------------------------------------------------------------------------------------


def renamed(snapshot: Snapshot, unet: dict[str, Any]) -> dict[str, Array]:
    """EDMUNet's names -> the file's tensors; SnapshotError for one too many, one missing or one of another shape."""
    found: dict[str, Array] = {}
    for name, tensor in snapshot.tensors.items():
        if name.endswith("resample_filter") or name.startswith("logvar_linear.") or name == "u":
            continue
        new = re.sub(r"^(dec\.\d+x\d+_aux_|out_)(norm|conv)\.", r"dec.\2_out.", name)
        new = re.sub(r"^dec\.(\d+x\d+_)", r"dec.blocks.\1", new)
        found[new] = tensor
    expected = state_shapes(unet)
    for name in sorted(found.keys() | expected.keys()):
        shape = found[name].shape if name in found else "missing"
        if shape != expected.get(name):
            raise SnapshotError(f"tensor {name!r} is {shape}; expected {expected.get(name, 'no such tensor')}")
        if found[name].storage.dtype.kind != "f":
            raise SnapshotError(f"tensor {name!r} holds {found[name].storage.dtype}; expected floating point numbers")
    return found


def arrays(unet: dict[str, Any], tensors: dict[str, Array]) -> dict[str, np.ndarray]:
    """EDMUNet's weights."""
    heads = {f"enc.{layer.name}": layer.heads for layer in encoder_layers(unet)}
    heads |= {f"dec.blocks.{layer.name}": layer.heads for layer in decoder_layers(unet)}
    weights = {}
    for name, tensor in tensors.items():
        value = finite(name, tensor)
        if ".qkv." in name:
            value = separated(value, heads[name.split(".qkv.")[0]])
        weights[name] = np.ascontiguousarray(value, np.float32 if value.dtype == np.float16 else value.dtype)
    return weights


def write(folder: Path, name: str, unet: dict[str, Any], scheduler: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The three configurations and the weights of a network of class `name`, as EDMPipeline.save_pretrained lays them out."""
    (folder / "unet").mkdir()
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = {"unet": [NETWORKS[name], name], "scheduler": ["pipelines.edm.scheduler", "EDMScheduler"]}
    for file, held in (
        ("unet/config.json", {"_class_name": name} | unet),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMScheduler"} | scheduler),
        ("model_index.json", {"_class_name": "EDMPipeline"} | index),
    ):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(held, indent=2, allow_nan=False) + "\n")


def separated(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, channel, {q, k, v}) -> ({q, k, v}, head, channel), which attention reads without copying."""
    rows = value.reshape(heads, -1, 3, *value.shape[1:])
    return np.moveaxis(rows, 2, 0).reshape(value.shape)
