"""Snapshots as NVlabs' EDM code writes them, with a network to compare with, written down a second time from its definition.

`Reference` shares no code with pipelines.edm: it walks the architecture once, in float64, with the plainest operations there are,
and makes up a random tensor for every name that it meets; so it defines the file's names and shapes as well as D(x, sigma).
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# NVlabs' keyword arguments, for all preconditioners and architectures, 8x8 to 64x64; the keys: preconditioner, architecture.
SONG = {"model_type": "SongUNet", "model_channels": 16, "num_blocks": 1}
NCSN = SONG | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
ADM = {"model_type": "DhariwalUNet", "num_blocks": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "edm_ddpmpp": (
        "EDMPrecond",
        SONG | {"img_resolution": 16, "channel_mult": [2, 2, 2], "attn_resolutions": [8], "augment_dim": 9, "dropout": 0.13},
    ),
    "edm_ncsnpp": (
        "EDMPrecond",
        NCSN
        | {"img_resolution": 16, "label_dim": 7, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [16, 8]}
        | {"augment_dim": 9},
    ),
    "vp_ddpmpp": ("VPPrecond", SONG | {"img_resolution": 8, "label_dim": 5, "channel_mult": [1, 3], "attn_resolutions": [4]}),
    "ve_ncsnpp": ("VEPrecond", NCSN | {"img_resolution": 32, "channel_mult": [1, 2, 2], "attn_resolutions": []}),
    "edm_adm": (
        "EDMPrecond",
        ADM | {"img_resolution": 16, "label_dim": 3, "model_channels": 32, "channel_mult": [1, 2, 4], "augment_dim": 9}
        | {"attn_resolutions": [16, 8, 4], "use_fp16": True},
    ),
    "iddpm_adm": (
        "iDDPMPrecond",
        ADM | {"img_resolution": 64, "model_channels": 32, "channel_mult": [1, 2], "attn_resolutions": []},
    ),
    "edm_skip": (
        "EDMPrecond",
        SONG | {"img_resolution": 8, "img_channels": 1, "channel_mult": [1, 2], "encoder_type": "skip", "attn_resolutions": [8]}
        | {"resample_filter": [1, 3, 3, 1]},
    ),
}  # fmt: skip
DEFAULTS = {"img_channels": 3, "label_dim": 0, "augment_dim": 0, "channel_mult_noise": 1, "embedding_type": "positional"}
DEFAULTS |= {"encoder_type": "standard", "resample_filter": [1, 1], "dropout": 0.1, "channel_mult_emb": 4}
# of the preconditioners: NVlabs' defaults; limits of VP and iDDPM follow from them
SETTINGS = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}


class Reference:
    """tensors: every parameter and buffer by NVlabs' names; objects: class and attributes of every module by name."""

    def __init__(self, precond: str, kwargs: dict[str, Any], seed: int = 3) -> None:
        self.precond, self.kwargs, self.k = precond, dict(kwargs), DEFAULTS | SETTINGS[precond] | kwargs
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.objects: dict[str, tuple[str, dict[str, Any]]] = {"model": (self.k["model_type"], {})}
        self.song = self.k["model_type"] == "SongUNet"
        c, s = self.k["img_channels"], self.k["img_resolution"]
        self(torch.zeros(1, c, s, s, dtype=torch.float64), torch.ones(1, dtype=torch.float64))  # makes the tensors

    def tensor(self, name: str, *shape: int, scale: float | None = None) -> Tensor:
        """float32 numbers, as files hold them, in float64."""
        if name not in self.tensors:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
            self.tensors[name] = torch.randn(shape, generator=self.generator) * (scale or 1 / math.sqrt(fan_in))
            if ".norm" in name and name.endswith("weight"):
                self.tensors[name] += 1
        return self.tensors[name].double()

    # D(x; sigma) ----------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """sigma (b,); labels (b, label_dim); all float64, the noise embedding's input rounded where NVlabs' is."""
        s = sigma.view(-1, 1, 1, 1)
        if self.precond == "EDMPrecond":
            d = self.k["sigma_data"]
            out = self.network(x / (d**2 + s**2).sqrt(), sigma.log() / 4, labels, augment)
            return d**2 / (s**2 + d**2) * x + d * s / (s**2 + d**2).sqrt() * out
        if self.precond == "VEPrecond":
            return x + s * self.network(x, (sigma / 2).log(), labels, augment)
        if self.precond == "VPPrecond":
            slope, least, steps = self.k["beta_d"], self.k["beta_min"], self.k["M"] - 1
            t = ((least**2 + 2 * slope * (1 + sigma**2).log()).sqrt() - least) / slope
            return x - s * self.network(x / (s**2 + 1).sqrt(), steps * t, labels, augment)
        levels = self.iddpm_levels()
        nearest = (sigma[:, None] - levels.double()).abs().argmin(1)
        out = self.network(x / (s**2 + 1).sqrt(), (self.k["M"] - 1 - nearest).double(), labels, augment)
        return x - s * out[:, : x.shape[1]]

    def iddpm_levels(self) -> Tensor:
        if "u" not in self.tensors:
            one, least, m = np.float32(1), np.float32(self.k["C_1"]), self.k["M"]  # in single precision, as theirs
            bar = np.sin(np.arange(m + 1, dtype=np.float32) * np.float32(0.5 * math.pi / m / (1 + self.k["C_2"]))) ** 2
            u = np.zeros(m + 1, np.float32)
            for j in range(m, 0, -1):
                u[j - 1] = np.sqrt((u[j] ** 2 + one) / max(bar[j - 1] / bar[j], least) - one)
            self.tensors["u"] = torch.from_numpy(u)
        return self.tensors["u"]

    # The network ----------------------------------------------------------------------------------------------------------

    def network(self, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        k, width = self.k, self.k["model_channels"]
        n, emb = width * k["channel_mult_noise"], width * k["channel_mult_emb"]
        half = n // 2
        if k["embedding_type"] == "fourier":
            freqs = 2 * math.pi * self.tensor("map_noise.freqs", half, scale=2.0)
            self.objects["model.map_noise"] = ("FourierEmbedding", {})
        else:
            freqs = ((1 / 10000) ** (torch.arange(half, dtype=torch.float32) / (half - (1 if self.song else 0)))).double()
            attributes = {"num_channels": n, "max_positions": 10000, "endpoint": self.song}
            self.objects["model.map_noise"] = ("PositionalEmbedding", attributes)
        waves = [(noise[:, None] * freqs).cos(), (noise[:, None] * freqs).sin()]
        e = torch.cat(waves[::-1] if self.song else waves, 1)
        dim = k["label_dim"]
        labels = torch.zeros(len(x), dim, dtype=x.dtype) if labels is None else labels
        if dim and self.song:
            e = e + self.linear("map_label", labels * math.sqrt(dim), n)
        if k["augment_dim"]:
            zero = torch.zeros(len(x), k["augment_dim"], dtype=x.dtype)
            e = e + self.linear("map_augment", zero if augment is None else augment, n, bias=False)
        e = self.linear("map_layer1", silu(self.linear("map_layer0", e, emb)), emb)
        if dim and not self.song:
            e = e + self.linear("map_label", labels, emb, bias=False)
        e = silu(e)

        sizes = [k["img_resolution"] >> i for i in range(len(k["channel_mult"]))]
        skips, aux, h = [], x, x
        for level, size in enumerate(sizes):
            name, c = f"enc.{size}x{size}_", h.shape[1]
            if level == 0:
                h = self.conv(f"{name}conv", h, width * (1 if self.song else k["channel_mult"][0]))
                skips.append(h)
            else:
                h = self.block(f"{name}down", h, e, c, down=True)
                skips.append(h)
                if k["encoder_type"] == "skip":
                    aux = self.resample(f"{name}aux_down", aux, down=True)
                    h = skips[-1] = h + self.conv(f"{name}aux_skip", aux, c, kernel=1)
                if k["encoder_type"] == "residual":
                    aux = self.conv(f"{name}aux_residual", aux, c, filtered=True)
                    h = skips[-1] = aux = (h + aux) / math.sqrt(2)
            for i in range(k["num_blocks"]):
                h = self.block(f"{name}block{i}", h, e, width * k["channel_mult"][level], size in k["attn_resolutions"])
                skips.append(h)
        for level, size in reversed(list(enumerate(sizes))):
            name, c = f"dec.{size}x{size}_", h.shape[1]
            if level == len(sizes) - 1:
                h = self.block(f"{name}in1", self.block(f"{name}in0", h, e, c, True), e, c)
            else:
                h = self.block(f"{name}up", h, e, c, up=True)
            for i in range(k["num_blocks"] + 1):
                attends = size in k["attn_resolutions"] and (i == k["num_blocks"] or not self.song)
                h = torch.cat([h, skips.pop()], 1)
                h = self.block(f"{name}block{i}", h, e, width * k["channel_mult"][level], attends)
        norm, conv = (f"{name}aux_norm", f"{name}aux_conv") if self.song else ("out_norm", "out_conv")
        out_channels = k["img_channels"] * (2 if self.precond == "iDDPMPrecond" else 1)
        return self.conv(conv, silu(self.norm(norm, h, 1e-6 if self.song else 1e-5)), out_channels)

    def block(self, name: str, x: Tensor, e: Tensor, c: int, attention: bool = False, up=False, down=False) -> Tensor:
        eps, scale = (1e-6, np.sqrt(0.5)) if self.song else (1e-5, 1)
        heads = 0 if not attention else 1 if self.song else c // 64
        attributes = {"num_heads": heads, "skip_scale": scale, "adaptive_scale": not self.song, "dropout": self.k["dropout"]}
        self.objects[f"model.{name}"] = ("UNetBlock", attributes)
        h = silu(self.norm(f"{name}.norm0", x, eps))
        h = self.conv(f"{name}.conv0", self.resample(f"{name}.conv0", h, up, down), c)
        params = self.linear(f"{name}.affine", e, c * (1 if self.song else 2))[:, :, None, None]
        if self.song:
            h = silu(self.norm(f"{name}.norm1", h + params, eps))
        else:
            h = silu(params[:, c:] + self.norm(f"{name}.norm1", h, eps) * (params[:, :c] + 1))
        h = self.conv(f"{name}.conv1", h, c)
        short = self.resample(f"{name}.skip", x, up, down)
        if x.shape[1] != c or ((up or down) and self.song):
            short = self.conv(f"{name}.skip", short, c, kernel=1)
        h = (h + short) * float(scale)
        if not heads:
            return h
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", h, eps), 3 * c, kernel=1)
        q, k, v = qkv.reshape(len(h), heads, c // heads, 3, -1).unbind(3)
        w = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(c // heads)).softmax(3)
        a = torch.einsum("bhqk,bhck->bhcq", w, v).reshape(h.shape)
        return (self.conv(f"{name}.proj", a, c, kernel=1) + h) * float(scale)

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        self.objects.setdefault(f"model.{name}", ("Linear", {}))
        y = x @ self.tensor(f"{name}.weight", out, x.shape[1]).T
        return y + self.tensor(f"{name}.bias", out) if bias else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        b, c = x.shape[:2]
        groups = min(32, c // 4)
        self.objects.setdefault(f"model.{name}", ("GroupNorm", {"num_groups": groups, "eps": eps}))
        g = x.reshape(b, groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + eps).sqrt()
        weight, bias = self.tensor(f"{name}.weight", c), self.tensor(f"{name}.bias", c)
        return g.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, filtered: bool = False) -> Tensor:
        """filtered: convolved on a border as wide as the filter needs, then filtered and every second number kept."""
        self.objects.setdefault(f"model.{name}", ("Conv2d", {}))
        w, b = self.tensor(f"{name}.weight", out, x.shape[1], kernel, kernel), self.tensor(f"{name}.bias", out)
        border = (len(self.k["resample_filter"]) - 1) // 2 if filtered else 0
        y = torch.nn.functional.conv2d(x, w, b, padding=kernel // 2 + border)
        if not filtered:
            return y
        self.tensors.setdefault(f"{name}.resample_filter", self.kernel())
        return self.sliding(y)[:, :, ::2, ::2]

    def kernel(self) -> Tensor:
        f = torch.tensor(self.k["resample_filter"], dtype=torch.float32)
        return (f[:, None] * f / f.sum() ** 2)[None, None]

    def sliding(self, x: Tensor, mirrored: bool = False) -> Tensor:
        """All complete windows of x times the filter, as a sum of shifted images."""
        f, n = self.kernel()[0, 0].double(), len(self.k["resample_filter"])
        f = f.flip(0, 1) if mirrored else f
        h, w = x.shape[2] - n + 1, x.shape[3] - n + 1
        return sum(f[i, j] * x[:, :, i : i + h, j : j + w] for i in range(n) for j in range(n))

    def resample(self, name: str, x: Tensor, up: bool = False, down: bool = False) -> Tensor:
        if not up and not down:
            return x
        self.objects.setdefault(f"model.{name}", ("Conv2d", {"up": up, "down": down}))
        self.tensors.setdefault(f"{name}.resample_filter", self.kernel())
        border = (len(self.k["resample_filter"]) - 1) // 2
        if down:
            return self.sliding(torch.nn.functional.pad(x, [border] * 4))[:, :, ::2, ::2]
        b, c, h, w = x.shape
        spread = x.new_zeros(b, c, 2 * h - 1, 2 * w - 1)
        spread[:, :, ::2, ::2] = x
        # each number of x spreads the filter over its surroundings: seen from there it is mirrored
        return 4 * self.sliding(torch.nn.functional.pad(spread, [len(self.k["resample_filter"]) - 1 - border] * 4), True)

    # The file -------------------------------------------------------------------------------------------------------------

    def tree(self, convert: Callable[[Tensor], Any]) -> Any:
        """The network as the module objects that a snapshot holds."""
        buffers = ("freqs", "resample_filter", "u")
        top = {key: self.k[key] for key in SETTINGS[self.precond]}
        if self.precond == "VPPrecond":  # sigma(t), Table 1, in single precision
            t = np.array([self.k["epsilon_t"], 1], np.float32)
            low, high = np.sqrt(np.exp(np.float32(0.5 * self.k["beta_d"]) * t**2 + np.float32(self.k["beta_min"]) * t) - 1)
            top |= {"sigma_min": float(low), "sigma_max": float(high)}
        if self.precond == "iDDPMPrecond":
            u = self.iddpm_levels()
            top |= {"sigma_min": float(u[-2]), "sigma_max": float(u[0])}
        given = {"img_channels": 3, "label_dim": 0} | self.kwargs
        shell = {
            "img_resolution": given["img_resolution"],
            "use_fp16": given.get("use_fp16", False),
            "label_dim": given["label_dim"],
        }
        root = Persistent(self.precond, module_state(shell | top | {"_init_args": (), "_init_kwargs": given}))
        made = {"": root}

        def node(name: str) -> Any:
            if name not in made:
                parent, _, leaf = name.rpartition(".")
                if name in ("model.enc", "model.dec"):
                    made[name] = torch.nn.ModuleDict()
                else:
                    kind, attributes = self.objects[name]
                    made[name] = Persistent(kind, module_state(attributes | {"_init_args": (), "_init_kwargs": {}}))
                holder = node(parent)
                modules = holder._modules if isinstance(holder, torch.nn.Module) else holder.state["_modules"]
                modules[leaf] = made[name]
            return made[name]

        for name in self.objects:
            node(name)
        for name, tensor in self.tensors.items():
            parent, _, leaf = (name if name == "u" else f"model.{name}").rpartition(".")
            kind = "_buffers" if leaf in buffers else "_parameters"
            node(parent).state[kind][leaf] = convert(tensor)
        return root

    def dump(self, **more: Any) -> bytes:
        """As NVlabs' training loop writes it: {"ema": network, ...}."""
        network = self.tree(lambda t: torch.nn.Parameter(t, requires_grad=False))
        loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}})
        return dump({"ema": network, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}} | more)

    def state_dict(self) -> dict[str, Tensor]:
        """As FastGen stores it."""
        return OrderedDict((name if name == "u" else f"model.{name}", t) for name, t in self.tensors.items())


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def module_state(attributes: dict[str, Any]) -> dict[str, Any]:
    """What torch.nn.Module keeps in its __dict__."""
    hooks = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    state = {"training": False, "_parameters": OrderedDict(), "_buffers": OrderedDict(), "_non_persistent_buffers_set": set()}
    return state | {hook: OrderedDict() for hook in hooks} | {"_modules": OrderedDict()} | attributes


class Persistent:
    """Pickled as an object of NVlabs' torch_utils.persistence."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple:
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('never run')", "class_name": self.class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta | {"state": self.state},)


def dump(value: Any) -> bytes:
    """pickle.dumps, where NVlabs' module has its name."""
    persistence = ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: dict) -> None:
        raise AssertionError("a snapshot was executed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    names = {"torch_utils": ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    sys.modules.update(names)
    try:
        return pickle.dumps(value, protocol=4)
    finally:
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="session", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """reference(case): made once for each case."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(*CASES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def new_reference() -> type[Reference]:
    return Reference


@pytest.fixture(scope="session")
def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    return CASES


@pytest.fixture(scope="session")
def dump_pickle() -> Callable[[Any], bytes]:
    return dump


@pytest.fixture(scope="session")
def persistent() -> type[Persistent]:
    return Persistent


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="session")
def converted(folders, reference) -> Callable[[str], Path]:
    """converted(case): the folder of the converted snapshot."""
    from pipelines.edm.conversion.convert import convert

    def get(name: str) -> Path:
        if not (folders / name).exists():
            file = folders / f"{name}.pkl"
            file.write_bytes(reference(name).dump())
            convert(file, folders / name)
        return folders / name

    return get
