"""One network with adapters against networks of their own: outputs, gradients, bookkeeping.

The reference is always a deep copy with a plain peft adapter of the same weights, which nobody switches.
"""

import copy
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from pipelines.adapters import AdapterHead, Role, SharedNetwork, Whole, call, last_layer
from pipelines.denoiser import Denoiser
from pipelines.noise import VPSchedule, to_x0
from trainers.engine.ema import trained_parameters

B, H, W, TOKENS = 3, 5, 7, 11  # latents have 4 channels
RANK = 2
TARGETS = ["to_q", "to_out.0", "conv1", "time_emb_proj"]
WIDTH = {"sd15": 32, "sdxl": 64}
# same rank, other strength: a switch that is missed keeps every shape, so nothing but the numbers would tell
ALPHA = {"student": 1.0, "aux": 3.0}
every_kind = pytest.mark.parametrize("kind", WIDTH)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tiny):
    """base(kind): the network of a tiny pipeline in float64."""
    return lambda kind="sd15": UNet2DConditionModel.from_pretrained(tiny[kind], subfolder="unet").double().eval()


@pytest.fixture
def inputs(randn):
    """inputs(kind) -> x (b, c, h, w), t (b,), a flat condition."""

    def make(kind: str = "sd15") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        condition = {"encoder_hidden_states": randn(B, TOKENS, WIDTH[kind])}
        if kind == "sdxl":
            condition |= {"text_embeds": randn(B, 32), "time_ids": 10 * randn(B, 6).abs()}
        return randn(B, 4, H, W), torch.tensor([999.0, 500.0, 3.0]), condition

    return make


def config_of(name: str, targets: list[str] = TARGETS) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA[name], target_modules=targets)


def add_role(shared: SharedNetwork, name: str, targets: list[str] = TARGETS) -> Role:
    return shared.add_adapter(name, config_of(name, targets))


def separate(network: nn.Module, role: Role) -> tuple[nn.Module, dict[str, Tensor]]:
    """A deep copy of the stock network with the role's adapter as its only one, and its parameters under the role's names."""
    alone = copy.deepcopy(network).requires_grad_(False)
    alone.add_adapter(config_of(role.name), "own")
    own = {"adapter." + n.replace(".own.", "."): p for n, p in alone.named_parameters() if ".own." in n}
    weights = dict(role.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for n, p in own.items():
            p.data = p.data.double()
            p.copy_(weights[n])
    return alone, own


# What a role computes ------------------------------------------------------------------------------------------------------


@every_kind
def test_teacher_is_the_stock_network(kind, base, inputs, fill):
    """Adapters off, whatever they hold: bit for bit the network that never had any."""
    stock, shared, (x, t, condition) = base(kind), SharedNetwork(base(kind)), inputs(kind)
    expected = call(stock, x, t, condition)
    assert torch.equal(shared.teacher()(x, t, **condition), expected)
    student, aux = fill(add_role(shared, "student")), fill(add_role(shared, "aux"))
    assert torch.equal(shared.teacher()(x, t, **condition), expected)
    student(x, t, **condition)
    assert torch.equal(shared.teacher()(x, t, **condition), expected)
    gaps = [(role(x, t, **condition) - expected).abs().max() for role in (student, aux)]
    assert min(gaps) > 1e-2  # and the adapters do something


@every_kind
def test_fresh_adapter_is_the_teacher(kind, base, inputs, fill):
    """lora_B = 0, also beside an adapter that has learned something."""
    shared, (x, t, condition) = SharedNetwork(base(kind)), inputs(kind)
    fill(add_role(shared, "student"))
    aux = add_role(shared, "aux")
    assert all((p == 0).all() for n, p in aux.named_parameters() if ".lora_B." in n)
    assert torch.equal(aux(x, t, **condition), shared.teacher()(x, t, **condition))


@every_kind
def test_role_is_a_network_of_its_own(kind, base, inputs, fill):
    """Each role's output is that of a separate network with plain peft, in any order of calls."""
    stock, shared, (x, t, condition) = base(kind), SharedNetwork(base(kind)), inputs(kind)
    roles = [fill(add_role(shared, name)) for name in ("student", "aux")]
    expected = [call(separate(stock, role)[0], x, t, condition) for role in roles]
    for i in (0, 1, 1, 0):
        assert torch.equal(roles[i](x, t, **condition), expected[i])
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_sdxl_conditions_are_packed(base, inputs):
    """text_embeds and time_ids arrive flat and reach the network as added_cond_kwargs, from a role and from a whole network."""
    stock, (x, t, condition) = base("sdxl"), inputs("sdxl")
    added = {k: condition[k] for k in ("text_embeds", "time_ids")}
    expected = stock(x, t, condition["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(SharedNetwork(base("sdxl")).teacher()(x, t, **condition), expected)
    assert torch.equal(Whole(stock)(x, t, **condition), expected)
    for key in added:  # each counts
        other = condition | {key: condition[key].flip(0)}
        assert (Whole(stock)(x, t, **other) - expected).abs().max() > 1e-3


# Gradients -----------------------------------------------------------------------------------------------------------------


def student_loss(name: str, x0: Tensor, eps: Tensor, t: Tensor, condition, teacher, aux) -> Tensor:
    """vsd: the scores are numbers. sid: gradients reach x0 through both of them."""
    x_t = 0.6 * x0 + 0.8 * eps
    with torch.set_grad_enabled(name == "sid"):
        real, fake = teacher(x_t, t, **condition), aux(x_t, t, **condition)
    return ((fake - real) * (x0 if name == "vsd" else real - x0)).sum()


@pytest.mark.parametrize(
    ("loss", "checkpointing", "kind"),
    [("vsd", False, "sd15"), ("vsd", True, "sd15"), ("sid", False, "sd15"), ("sid", True, "sd15"), ("sid", True, "sdxl")],
)
@pytest.mark.slow
def test_gradients_are_those_of_separate_networks(loss, checkpointing, kind, base, inputs, fill, randn):
    """Student's and aux's gradients equal those of three deep copies, 1e-9, whichever role runs between forward and backward and
    is active during it; each backward leaves the other's alone."""
    stock, shared, (z, t, condition) = base(kind), SharedNetwork(base(kind)), inputs(kind)
    roles = {name: fill(add_role(shared, name)) for name in ("student", "aux")}
    roles[None] = shared.teacher()
    alone = {name: separate(stock, roles[name]) for name in ("student", "aux")}
    if checkpointing:
        for name in ("student", "aux"):
            roles[name].enable_gradient_checkpointing()
    eps, last = randn(*z.shape), torch.full((B,), 999.0)

    def losses(student, teacher, aux) -> dict[str, Tensor]:
        x0 = student(z, last, **condition)
        denoising = (aux(0.6 * x0.detach() + 0.8 * eps, t, **condition) - eps).square().sum()
        return {"student": student_loss(loss, x0, eps, t, condition, teacher, aux), "aux": denoising}

    wholes = {name: Whole(network) for name, (network, _) in alone.items()}
    expected = {}
    for name, value in losses(wholes["student"], Whole(stock), wholes["aux"]).items():
        own = alone[name][1]
        expected[name] = dict(zip(own, torch.autograd.grad(value, list(own.values()), retain_graph=True), strict=True))
        assert max(g.abs().max() for g in expected[name].values()) > 1e-3

    for active in roles if checkpointing and kind == "sd15" else ["aux"]:
        computed = losses(roles["student"], roles[None], roles["aux"])
        for name, other in (("student", "aux"), ("aux", "student")):
            with torch.no_grad():
                roles[active](z, t, **condition)
            with shared.running(active):
                computed[name].backward(inputs=list(roles[name].parameters()))
            assert shared.active is None
            assert all(p.grad is None for p in roles[other].parameters())
            for n, p in roles[name].named_parameters():
                scale = max(1.0, float(expected[name][n].abs().max()))
                assert_close(p.grad, expected[name][n], rtol=0, atol=1e-9 * scale)
                p.grad = None


def kept_bytes(role: Role, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> int:
    """What a forward pass keeps for backward, besides weights."""
    weights = {p.data_ptr() for p in role.shared.network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = role(x, t, **condition)  # held, so that no address is used twice
    assert out.requires_grad
    return sum(kept.values())


def test_recomputed_blocks_keep_little(base, inputs, fill):
    """A third less than diffusers' own switch leaves, with adapters on every sort of layer; twice on is once on."""
    sizes, calls = [], []
    for way in ("none", "theirs", "ours"):
        shared = SharedNetwork(base())
        original = shared.checkpointed
        shared.checkpointed = lambda *a, original=original, **k: (calls.append(a[0]), original(*a, **k))[1]
        role = fill(add_role(shared, "student", ["to_q", "to_v", "proj_in", "proj_out", "conv1", "conv2", "ff.net.2"]))
        if way == "theirs":
            shared.network.enable_gradient_checkpointing(shared.checkpointed)
        elif way == "ours":
            role.enable_gradient_checkpointing()
            role.enable_gradient_checkpointing()
        sizes.append(kept_bytes(role, *inputs()))
    transformers = [m for m in shared.network.modules() if type(m).__name__ == "Transformer2DModel"]
    assert len(transformers) > 2
    assert sum(getattr(c, "__self__", None) in transformers for c in calls) == len(transformers)
    assert not any(isinstance(c, partial) for c in calls)  # nothing is wrapped twice
    assert sizes[1] < 0.5 * sizes[0]
    assert sizes[2] < 0.7 * sizes[1]


def test_plain_backward_of_numbers_reaches_one_role(base, inputs, fill, randn):
    """Where the scores are numbers, backward without `inputs` fills the student's gradients and nobody else's."""
    shared, (z, t, condition) = SharedNetwork(base()), inputs()
    student, aux = fill(add_role(shared, "student")), fill(add_role(shared, "aux"))
    x0 = student(z, t, **condition)
    student_loss("vsd", x0, randn(*z.shape), t, condition, shared.teacher(), aux).backward()
    own = {id(p) for p in student.parameters()}
    assert all((p.grad is not None) == (id(p) in own) for p in shared.network.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_base(checkpointing, base, inputs):
    """bfloat16 weights below float32 adapters: float32 gradients, and a denoiser's x0 in float32. conv_in, from whose weights
    diffusers reads a network's dtype, is a target too."""
    shared, (z, t, condition) = SharedNetwork(base().bfloat16()), inputs()
    student = add_role(shared, "student", [*TARGETS, "conv_in"])
    if checkpointing:
        student.enable_gradient_checkpointing()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for n, p in shared.network.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    condition = {k: v.float() for k, v in condition.items()}
    assert student(z.float(), t, **condition).dtype == torch.bfloat16
    schedule = VPSchedule(torch.linspace(0.999, 0.005, 1000))
    x0 = Denoiser(student, schedule, "epsilon")(z.float(), schedule.level(t), condition)
    assert x0.dtype == torch.float32
    x0.square().sum().backward()
    for n, p in student.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad.abs().max() > 0) == (".lora_B." in n), n  # A has no gradient while B = 0


# Bookkeeping ---------------------------------------------------------------------------------------------------------------


def test_parameters_are_the_adapters_own(base):
    """A role lists its adapter and nothing else: unique names, the network's own objects, all of them trained."""
    shared = SharedNetwork(base().train())
    student, aux = add_role(shared, "student"), add_role(shared, "aux")
    in_network = dict(shared.network.named_parameters())
    listed = {}
    for role in (student, aux):
        names = [n for n, _ in role.named_parameters(remove_duplicate=False)]
        assert len(names) == len(set(names)) > 0
        expected = {"adapter." + n.replace(f".{role.name}.", "."): p for n, p in in_network.items() if f".{role.name}." in n}
        assert dict(role.named_parameters()).keys() == expected.keys()
        assert all(p is expected[n] for n, p in role.named_parameters())
        assert trained_parameters(role).keys() == expected.keys()
        assert role.state_dict().keys() == expected.keys()
        listed[role.name] = {id(p) for p in role.parameters()}
    assert not listed["student"] & listed["aux"]
    assert listed["student"] | listed["aux"] == {id(p) for p in in_network.values() if p.requires_grad}
    assert not list(shared.teacher().parameters())
    assert not shared.network.training


def test_target_without_a_layer_is_named(base):
    shared = SharedNetwork(base())
    with pytest.raises(ValueError, match=r"lora\.targets: 'to_w' fits no layer of UNet2DConditionModel; .*to_q"):
        add_role(shared, "student", ["to_q", "to_w"])
    with pytest.raises(ValueError, match=r"'o_q' fits no layer"):  # a whole name, not any ending of one
        add_role(shared, "student", ["o_q"])
    add_role(shared, "student")  # refused ones left nothing behind
    add_role(shared, "aux")  # targets are found below the first adapter
    with pytest.raises(ValueError, match="'lora_A' fits no layer"):
        shared.add_adapter("third", LoraConfig(r=RANK, target_modules=["lora_A"]))


def test_moving_a_role_moves_the_network_once(base, inputs, fill):
    """.float() of one role moves base and every adapter, keeps the parameters' identity, and touches no tensor twice."""
    shared, (x, t, condition) = SharedNetwork(base()), inputs()
    student, aux = fill(add_role(shared, "student")), fill(add_role(shared, "aux"))
    before = list(shared.network.parameters())
    expected = {role: role(x, t, **condition) for role in (shared.teacher(), student, aux)}
    denoiser = Denoiser(student, VPSchedule(torch.linspace(0.999, 0.005, 1000)), "epsilon")
    for module, own in ((denoiser, []), (AdapterHead(aux, 5), ["weight", "bias"])):
        seen = []
        module._apply(lambda tensor, seen=seen: seen.append(tensor.data_ptr()) or tensor)
        assert len(seen) == len(set(seen)) == len(before) + len(own)
    denoiser.to(memory_format=torch.channels_last)
    weight = shared.network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for role, value in expected.items():  # only another order of summation
        assert_close(role(x, t, **condition), value, rtol=1e-10, atol=1e-10)
    denoiser.float()
    assert {p.dtype for p in shared.network.parameters()} == {torch.float32}
    after = [*student.parameters(), *aux.parameters()]
    assert {id(p) for p in after} <= {id(p) for p in before}
    assert {p.dtype for p in after} == {torch.float32}
    for role, value in expected.items():
        assert_close(role(x, t, **condition), value.float(), rtol=1e-4, atol=1e-4)


def test_running_restores(base, inputs, fill):
    """Nested, after a role's call, and after an exception inside or in a forward: what was active before is active again."""
    shared, (x, t, condition) = SharedNetwork(base()), inputs()
    student, aux = fill(add_role(shared, "student")), fill(add_role(shared, "aux"))
    out = {role.name: role(x, t, **condition) for role in (shared.teacher(), student, aux)}

    def check(name: str | None) -> None:
        assert shared.active == name
        assert torch.equal(call(shared.network, x, t, condition), out[name])

    check(None)
    with shared.running("student"):
        check("student")
        with shared.running("aux"):
            check("aux")
            with shared.running(None):
                check(None)
            check("aux")
            student(x, t, **condition)
            check("aux")
        with pytest.raises(RuntimeError, match="stop"), shared.running("aux"):
            raise RuntimeError("stop")
        check("student")
        with pytest.raises(RuntimeError, match="channels"):
            aux(x[:, :3], t, **condition)
        check("student")
    check(None)


# A role with a last layer of its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["to_q", "conv1"], ["to_q", "conv1", "conv_out"]])
def test_adapter_head(targets, base, inputs, fill):
    """It reads what the network's last convolution reads: zero at first, that convolution after a copy of its weights."""
    shared, (x, t, condition) = SharedNetwork(base()), inputs()
    role = fill(add_role(shared, "aux", targets))
    head = AdapterHead(role, 4)
    assert last_layer(shared.network).weight.shape == head.conv_out.weight.shape
    assert type(last_layer(shared.network)) is nn.Conv2d
    assert (head(x, t, **condition) == 0).all()

    seen = []
    handle = shared.network.conv_out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    whole = role(x, t, **condition)
    handle.remove()
    features = role.features(x, t, **condition)
    assert features.shape == (B, last_layer(shared.network).in_channels, H, W)
    assert torch.equal(features, seen[0])
    assert not shared.network.conv_out._forward_pre_hooks  # and leaves no hook behind

    head.double()
    with torch.no_grad():
        for mine, theirs in zip(head.conv_out.parameters(), last_layer(shared.network).parameters(), strict=True):
            mine.copy_(theirs)
    out = head(x, t, **condition)
    assert_close(out, last_layer(shared.network)(seen[0]), rtol=1e-12, atol=1e-12)
    if "conv_out" not in targets:
        assert_close(out, whole, rtol=1e-12, atol=1e-12)

    names = [n for n, _ in head.named_parameters()]
    own = [n for n in names if not n.startswith("role.adapter.")]
    assert own == ["conv_out.weight", "conv_out.bias"]
    assert len(names) == len(own) + len(list(role.parameters()))
    head(x, t, **condition).square().sum().backward(inputs=list(head.parameters()))
    reached = {n for n, p in head.named_parameters() if p.grad is not None}
    assert reached == {n for n in names if n in own or ".conv_out." not in n}  # its own takes the place of the adapted one


def test_adapter_head_in_half_precision(base, inputs):
    """A bfloat16 network, a float32 last layer and output."""
    shared, (x, t, condition) = SharedNetwork(base().bfloat16()), inputs()
    head = AdapterHead(add_role(shared, "aux"), 5)
    out = head(x.float(), t, **{k: v.float() for k, v in condition.items()})
    assert (out.dtype, out.shape) == (torch.float32, (B, 5, H, W))


# Sharded ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    """This process as a group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_kind
@pytest.mark.slow
def test_sharded_weights_do_not_show(kind, base, inputs, fill, process_group):
    """FSDP2's hooks around every block: frozen weights are shards, adapters are not; outputs and both roles' gradients stay."""
    plain, split, (x, t, condition) = SharedNetwork(base(kind)), SharedNetwork(base(kind)), inputs(kind)
    roles = [[fill(add_role(shared, name)) for name in ALPHA] for shared in (plain, split)]
    for mine, theirs in zip(*roles, strict=True):
        theirs.load_state_dict(mine.state_dict())
    split.shard()
    for key, parameter in split.network.named_parameters():
        assert isinstance(parameter, DTensor) == (".lora_" not in key), key
    results = []
    for shared, (student, aux) in zip((plain, split), roles, strict=True):
        student.enable_gradient_checkpointing()
        student.to(memory_format=torch.channels_last)  # as trainers do
        x0 = student(x, t, **condition)
        with torch.no_grad():
            teacher = shared.teacher()(x0, t, **condition)
        seen = aux(x0, t, **condition)
        loss = ((seen - teacher) * x0).square().mean()
        gradients = [torch.autograd.grad(loss, list(role.parameters()), retain_graph=True) for role in (student, aux)]
        results.append([x0.detach(), teacher, seen.detach(), *gradients[0], *gradients[1]])
    assert min(float(g.abs().max()) for g in results[0]) > 0
    for mine, theirs in zip(*results, strict=True):
        assert_close(theirs, mine, rtol=1e-9, atol=1e-12)


# Read out in float32 ---------------------------------------------------------------------------------------------------------


def read_by_hand(network: UNet2DConditionModel, features: Tensor) -> Tensor:
    """The last convolution in float32, of what it was given."""
    conv = last_layer(network)
    return nn.functional.conv2d(features.float(), conv.weight.float(), conv.bias.float(), padding=1)


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS, "conv_out"]], ids=["blocks", "conv_out too"])
def test_a_read_out_is_not_rounded_to_bfloat16(how, targets, tiny, generator):
    """x0 = (z - sigma out) / alpha at t = 999, where alpha is .068: rounding `out` to bfloat16 would show."""
    network = UNet2DConditionModel.from_pretrained(tiny["sd15"], subfolder="unet")
    shared = SharedNetwork(network.bfloat16() if how == "bfloat16 weights" else network)
    role = shared.add_adapter("student", LoraConfig(r=RANK, lora_alpha=1.0, target_modules=targets))
    schedule = VPSchedule(torch.linspace(0.99, 0.0047, 1000))  # Stable Diffusion's last: alpha = .068
    x, t = torch.randn(B, 4, 8, 8, generator=generator), torch.full((B,), 999.0)
    condition = {"encoder_hidden_states": torch.randn(B, TOKENS, 32, generator=generator)}
    for name in (None, "student"):
        denoiser = Denoiser(role if name else shared.teacher(), schedule, "epsilon", 1.0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            x0 = denoiser(x, schedule.level(t), condition)
            features = denoiser.network.features(x, t, **condition)
        assert features.dtype == torch.bfloat16
        out = read_by_hand(network, features)
        alpha, sigma = 0.0047**0.5, (1 - 0.0047) ** 0.5
        assert x0.dtype == torch.float32
        assert_close(x0, (x - sigma * out) / alpha, rtol=0, atol=1e-3)
        assert float((sigma * (out.bfloat16().float() - out) / alpha).abs().max()) > 1e-2  # what rounding would do


@every_kind
def test_reading_out_in_float32_changes_no_float32(kind, base, tiny, inputs):
    """Bit for bit the stock network where nothing is half precision, and nothing is left on the layer afterwards."""
    stock, (x, t, condition), schedule = base(kind).float(), inputs(kind), VPSchedule(torch.linspace(0.99, 0.0047, 1000))
    x, condition = x.float(), {k: v.float() for k, v in condition.items()}
    out = call(stock, x, t, condition)
    shared, whole = SharedNetwork(copy.deepcopy(stock)), Whole(copy.deepcopy(stock))
    for network in (shared.teacher(), whole):
        x0 = Denoiser(network, schedule, "epsilon", 1.0)(x, schedule.level(t), condition)
        assert torch.equal(x0, to_x0(out, x, schedule.level(t), "epsilon"))
        assert torch.equal(network(x, t, **condition), out)
    assert "forward" not in vars(last_layer(shared.network))
