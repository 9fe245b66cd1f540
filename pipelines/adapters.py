"""One frozen network, many roles: adapters off it is the teacher; "student" and "aux" are LoRA adapters on the same weights.

A role is a network of its own to whoever calls it: its parameters are those of its adapter, and a call runs the shared network
with that adapter alone (peft_layers.py). Its Anatomy says how a kind of network is called and which layer is its last.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from .common.errors import UserError
from .peft_layers import layers_with_adapters, of_adapter, of_adapters, own_layer, own_name, switch

# A condition is flat; SDXL's network wants these two in a dictionary of their own.
ADDED_CONDITIONS = ("text_embeds", "time_ids")


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Inside, a last convolution or matrix product computes in float32 (or wider) whatever the dtype of its weights, and under
    autocast.

    A student of Stable Diffusion reads out noise at t = 999, where alpha is .068: x0 = (x_t - sigma out) / alpha makes of the
    rounding of `out` to bfloat16 an error of .02 latents' standard deviations.
    """
    if not isinstance(layer, nn.Conv2d | nn.Linear) or type(layer) not in (nn.Conv2d, nn.Linear):
        yield  # a network of points has a matrix product of its own
        return

    def forward(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(dtype)
            if isinstance(layer, nn.Linear):
                return F.linear(x.to(dtype), layer.weight.to(dtype), bias)
            return layer._conv_forward(x.to(dtype), layer.weight.to(dtype), bias)

    layer.forward = forward  # type: ignore[method-assign, assignment]  # of this layer alone, until the block ends
    try:
        yield
    finally:
        del layer.forward


class Anatomy(NamedTuple):
    """What roles must know of a kind of network.

    call(network, x, time, condition, **options) -> an object whose .sample is (b, c', h, w), from x (b, c, h, w), time (b,) and a
    flat condition; last(network): the layer that puts out its result, itself, without adapters.

    blocks: names of the classes of blocks that it repeats, where diffusers does not say; apart: of parts of them that it calls
    from outside too, and which are sharded by themselves. Of transformers, whose last layer is linear and puts out tokens:
    side, each stands for side^2 latents of every channel, by_channel(network): that layer, with its outputs in the order
    (channel, row, column), and repeats: the names of its lists of blocks, in the order that they run.
    """

    call: Callable[..., Any]
    last: Callable[[ModelMixin], nn.Module]
    blocks: tuple[str, ...] = ()
    side: int = 1
    by_channel: Callable[[ModelMixin], nn.Module] | None = None
    apart: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()


class SharedNetwork:
    """A frozen diffusers network in eval mode (students and scores are functions of their input: no dropout) and its adapters.

    anatomy: of its kind; None: that of diffusers' U-Nets.
    """

    def __init__(self, network: ModelMixin, anatomy: Anatomy | None = None) -> None:
        self.network, self.anatomy = network.requires_grad_(False).eval(), anatomy or UNET
        name_blocks(network, self.anatomy)
        self.active: str | None = None
        self.sharded = self.checkpointing = False
        self._layers: list[LoraLayer] = []

    def add_adapter(self, name: str, config: LoraConfig) -> Role:
        """A new role, float32 whatever the network's dtype: small updates would be lost in bfloat16. Starts as the teacher.

        UserError names a target that fits no layer.
        """
        check_targets(self.network, config.target_modules or ())
        with warnings.catch_warnings():  # a second adapter is what is wanted here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            if isinstance(self.network, PeftAdapterMixin):
                self.network.add_adapter(config, name)
            else:  # DiT, to which diffusers has given none
                inject_adapter_in_model(config, self.network, name)
        self._layers = list(layers_with_adapters(self.network).values())
        for key, parameter in self.network.named_parameters():
            if of_adapter(key, name):
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        # adding one adapter makes peft freeze the others
        for key, parameter in self.network.named_parameters():
            parameter.requires_grad_(of_adapters(key))
        self._switch(None)
        return Role(self, name)

    def shard(self) -> None:
        """Split the frozen weights over all processes (FSDP2): each holds a share, and gathers a block when it is run.

        To be called on every process after the last `add_adapter`. Adapters stay whole: they are small, and a backward pass for
        the inputs of one role finds nothing behind a shard (gradients would be None). From here on every call is collective.
        """
        adapters = {p for key, p in self.network.named_parameters() if of_adapters(key)}
        units = (*self.network._repeated_blocks, "ResnetBlock2D", *self.anatomy.apart)
        for module in reversed(list(self.network.modules())):  # parts before what they are in
            if type(module).__name__ in units:
                fully_shard(module, ignored_params=adapters)
        fully_shard(self.network, ignored_params=adapters)
        self.sharded = True

    def teacher(self) -> Role:
        return Role(self, None)

    @contextmanager
    def running(self, name: str | None) -> Iterator[ModelMixin]:
        """The network with this adapter alone, or none; afterwards the one that was active before."""
        before = self.active
        self._switch(name)
        try:
            yield self.network
        finally:
            self._switch(before)

    def enable_gradient_checkpointing(self) -> None:
        """Blocks keep their inputs alone and are computed again in backward, for all roles.

        diffusers recomputes what is inside a transformer, but keeps what its projections read, in float32 where they have
        adapters: twice as much as all the rest. A transformer of one block is therefore recomputed as a whole, at the same cost.
        """
        if self.checkpointing:
            return
        self.checkpointing = True
        self.network.enable_gradient_checkpointing(self.checkpointed)
        for module in self.network.modules():
            if isinstance(module, Transformer2DModel) and len(module.transformer_blocks) == 1:
                module.gradient_checkpointing = False
                module.forward = partial(self._recomputed, module.forward)

    def _recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpointed(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    def checkpointed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block recomputed in backward, under the adapter that it ran with: by then another one may be active."""
        name = self.active

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.running(name):
                return function(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def _switch(self, name: str | None) -> None:
        self.active = name
        switch(self._layers, name)


def check_targets(network: nn.Module, targets: Iterable[str]) -> None:
    """UserError names a target that fits no layer: peft complains only if none of them fits any."""
    modules = [n for n, _ in network.named_modules() if not of_adapters(n)]
    for target in targets:
        # once a layer has an adapter its own weights live in .base_layer
        if not any(n == target or n.endswith(f".{target}") for n in modules):
            raise UserError(
                f"lora.targets: {target!r} fits no layer of {type(network).__name__}; names are matched from their end, "
                f"for example {', '.join(example_layers(network))}"
            )


def call(network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """A U-Net of x (b, c, h, w) at time (b,), under a flat condition: (b, c', h, w); all floats in its dtype."""
    return output(network, x, time, condition).sample


def output(network: ModelMixin, x: Tensor, time: Tensor, condition: Mapping[str, Tensor], **options: Any) -> Any:
    """As `call`, but all that the network puts out. options: further arguments."""
    dtype = network.dtype
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}
    added = {k: cast.pop(k) for k in ADDED_CONDITIONS if k in cast}
    return network(x.to(dtype), time, **cast, **({"added_cond_kwargs": added} if added else {}), **options)


class Whole(nn.Module):
    """A diffusers network all of whose weights are this module's: network(x, time, **condition)."""

    def __init__(self, network: ModelMixin, anatomy: Anatomy | None = None) -> None:
        super().__init__()
        self.network, self.anatomy = network, anatomy or UNET
        name_blocks(network, self.anatomy)

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        return self.anatomy.call(self.network, x, time, condition).sample

    def reading_out(self) -> AbstractContextManager[None]:
        """Inside, what the network puts out is not rounded below float32: for a denoiser, which may divide it by alpha."""
        return in_float32(self.anatomy.last(self.network))


class Role(nn.Module):
    """network(x, time, **condition) under one adapter; `name` None is the teacher, which has no parameters here.

    Moves the shared network when it is moved, unless that is sharded: then its weights are where they belong.
    """

    def __init__(self, shared: SharedNetwork, name: str | None) -> None:
        super().__init__()
        self._shared = (shared,)  # in a tuple, so that the network's weights are not counted as this module's
        self.name = name
        if name is not None:
            own = {k: p for k, p in shared.network.named_parameters() if of_adapter(k, name)}
            self.adapter = parameter_tree({k.replace(f".{name}.", "."): p for k, p in own.items()})

    @property
    def shared(self) -> SharedNetwork:
        return self._shared[0]

    def forward(self, x: Tensor, time: Tensor, return_features: Any = False, **condition: Tensor) -> Any:
        """(b, c', h, w); with return_features, which the network's `call` must know, its whole output."""
        with self.shared.running(self.name) as network:
            if return_features:
                return self.shared.anatomy.call(network, x, time, condition, return_features=return_features)
            return self.shared.anatomy.call(network, x, time, condition).sample

    def reading_out(self) -> AbstractContextManager[None]:
        """See Whole.reading_out."""
        return in_float32(self.last)

    @property
    def last(self) -> nn.Module:
        return self.shared.anatomy.last(self.shared.network)

    def features(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        """What the network's last layer reads: of a U-Net (b, channels, h, w), of a transformer tokens (b, n, channels), of which
        those of the image come first.
        """
        seen: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self(x, time, **condition)
        finally:
            handle.remove()
        return seen[0]

    def enable_gradient_checkpointing(self) -> None:
        self.shared.enable_gradient_checkpointing()

    def compile_repeated_blocks(self, **options: Any) -> None:
        self.shared.network.compile_repeated_blocks(**options)

    def _apply(self, fn, recurse: bool = True):
        if self.shared.sharded:
            return super()._apply(fn, recurse)
        self.shared.network._apply(fn, recurse)  # the adapter's parameters are the same objects
        return self


class AdapterHead(nn.Module):
    """A role with a last layer of its own in the place of the network's: (b, out_channels, h, w) in float32, zero at first.

    conv_out: a convolution for U-Nets; for transformers a linear layer on tokens, outputs in the order (channel, row, column).
    """

    def __init__(self, role: Role, out_channels: int) -> None:
        super().__init__()
        self.role, self.out_channels = role, out_channels
        last, self.side = role.last, role.shared.anatomy.side
        self.conv_out: nn.Conv2d | nn.Linear
        if isinstance(last, nn.Conv2d):
            height, width = last.kernel_size
            self.conv_out = nn.Conv2d(last.in_channels, out_channels, (height, width), padding=last.padding)  # type: ignore[arg-type]  # of any length
        elif isinstance(last, nn.Linear):
            self.conv_out = nn.Linear(last.in_features, out_channels * self.side**2)
        else:
            raise ValueError(f"the role's last layer is a {type(last).__name__}; a head takes the place of another kind")
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @property
    def replaced(self) -> nn.Module:
        """The layer in whose place conv_out is, its outputs in the same order."""
        shared = self.role.shared
        return shared.anatomy.by_channel(shared.network) if shared.anatomy.by_channel else self.role.last

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        features = self.role.features(x, time, **condition).to(self.conv_out.weight.dtype)
        if isinstance(self.conv_out, nn.Linear):  # tokens of the image come first; Z-Image's text follows
            features = features[:, : x.shape[2] * x.shape[3] // self.side**2]
        with in_float32(self.conv_out):
            out = self.conv_out(features)
        return out if isinstance(self.conv_out, nn.Conv2d) else from_tokens(out, x.shape[2:], self.side)


def to_tokens(x: Tensor, side: int) -> Tensor:
    """(b, c, h, w) -> (b, n, c side^2): squares of side^2 latents, row by row, each in the order (channel, row, column).

    >>> to_tokens(torch.arange(8.0).reshape(1, 2, 2, 2), 2).tolist()
    [[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]]
    """
    b, c, h, w = x.shape
    return x.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * side**2)


def from_tokens(tokens: Tensor, size: Sequence[int], side: int) -> Tensor:
    """The inverse of to_tokens: (b, n, c side^2) -> (b, c, h, w) of size (h, w)."""
    b, (h, w) = len(tokens), size
    return tokens.reshape(b, h // side, w // side, -1, side, side).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h, w)


def reordered(layer: nn.Linear, order: Tensor) -> nn.Linear:
    """A copy of a layer that puts out these of its outputs, in this order."""
    made = nn.Linear(layer.in_features, len(order), device=layer.weight.device, dtype=layer.weight.dtype)
    made.weight.data, made.bias.data = layer.weight.data[order], layer.bias.data[order]
    return made


def whole_copy(network: ModelMixin) -> ModelMixin:
    """A float32 copy whose weights can be trained, without the adapters that may sit on the original by now."""
    weights = {own_name(k): v for k, v in network.state_dict().items() if not of_adapters(k)}
    clean = type(network).from_config(network.config)  # type: ignore[attr-defined]  # of ConfigMixin, which they all are too
    clean.load_state_dict(weights)
    return clean.float().eval().requires_grad_(True)


def linear(layer: nn.Module) -> nn.Linear:
    """A linear layer itself, also where an adapter sits on it; ValueError for another kind."""
    own = own_layer(layer)
    if not isinstance(own, nn.Linear):
        raise ValueError(f"the last layer of a transformer is linear, and this is a {type(own).__name__}")
    return own


def last_layer(network: ModelMixin) -> nn.Module:
    """A U-Net's own last convolution, also where an adapter sits on it."""
    return own_layer(network.conv_out)


UNET = Anatomy(output, last_layer)


def name_blocks(network: ModelMixin, anatomy: Anatomy) -> None:
    """Tell diffusers which blocks to compile, and `SharedNetwork.shard` which to split, where the network's class does not."""
    if anatomy.blocks and not getattr(network, "_repeated_blocks", None):
        network._repeated_blocks = list(anatomy.blocks)


def block_layers(network: ModelMixin) -> list[str]:
    """The names, within their block, of all linear layers and convolutions in the blocks that a network repeats."""
    blocks = (m for m in network.modules() if type(m).__name__ in network._repeated_blocks)
    children = ((n, own_layer(m)) for block in blocks for n, m in block.named_children())  # adapted or not
    return sorted({n for n, m in children if isinstance(m, nn.Linear | nn.Conv2d)})


def parameter_tree(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Nested modules that hold these parameters under their dotted names."""
    root = nn.Module()
    for key, parameter in parameters.items():
        *path, last = key.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(last, parameter)
    return root


def example_layers(network: nn.Module) -> list[str]:
    """The most frequent endings of names of layers that LoRA can adapt."""
    names = [own_name(n) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    endings = Counter(n.split(".")[-1] for n in names if not of_adapters(n))
    return [e for e, _ in endings.most_common() if not e.isdigit()][:8]
