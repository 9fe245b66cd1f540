"""One transformer with adapters against networks of their own: outputs, gradients, and a head in the place of its last layer."""

import copy

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.adapters import AdapterHead, Role, SharedNetwork, Whole, from_tokens, to_tokens
from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser
from pipelines.kinds import kind_named
from pipelines.last_blocks import LastBlocks, layers_of, split_blocks
from pipelines.noise import RectifiedFlowSchedule
from pipelines.up_half import WayDown

B, C, H, W, TOKENS = 2, 3, 6, 10, 11
GUIDANCE = 3.5
KINDS = {"sd3": "sd3", "sd35": "sd3", "flux dev": "flux", "flux schnell": "flux", "z-image": "zimage"}
CLASSES = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel, "zimage": ZImageTransformer2DModel}
RANK = 2
# same rank, other strength: a switch that is missed keeps every shape, so nothing but the numbers would tell
ALPHA = {"student": 1.0, "aux": 3.0}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def base(tiny):
    """base(kind): the network of a tiny pipeline in float64."""

    def load(kind: str) -> nn.Module:
        network = CLASSES[KINDS[kind]].from_pretrained(tiny(kind), subfolder="transformer")
        return network.double().eval().requires_grad_(False)

    return load


@pytest.fixture
def inputs(randn):
    """inputs(kind) -> x (b, c, h, w), t (b,) in [0, 1], a flat condition."""

    def make(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if kind == "z-image":  # of different lengths
            mask = torch.ones(B, 512, dtype=torch.long)
            mask[0, TOKENS:], mask[1, 37:] = 0, 0
            condition = {"encoder_hidden_states": randn(B, 512, 24), "attention_mask": mask}
            return randn(B, C, H, W), torch.tensor([1.0, 0.3], dtype=torch.float64), condition
        pooled = 22 if KINDS[kind] == "sd3" else 16
        condition = {"encoder_hidden_states": randn(B, TOKENS, 40), "pooled_projections": randn(B, pooled)}
        return randn(B, C, H, W), torch.tensor([1.0, 0.3], dtype=torch.float64), condition

    return make


def stock(network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The network called as diffusers' own pipelines call it."""
    if isinstance(network, SD3Transformer2DModel):
        return network(x, timestep=1000 * t, **condition).sample
    if isinstance(network, ZImageTransformer2DModel):
        rows = zip(condition["encoder_hidden_states"], condition["attention_mask"].sum(1), strict=True)
        out = network(list(x[:, :, None]), (1000 - 1000 * t) / 1000, [row[:n].to(network.dtype) for row, n in rows]).sample
        return -torch.stack(out)[:, :, 0]
    packed = FluxPipeline._pack_latents(x, *x.shape)
    ids = FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, x.device, x.dtype)
    guidance = torch.full((B,), GUIDANCE) if network.config.guidance_embeds else None
    options = {"txt_ids": torch.zeros(TOKENS, 3), "img_ids": ids, "guidance": guidance}
    out = network(packed, timestep=1000 * t / 1000, **condition, **options).sample
    return FluxPipeline._unpack_latents(out, 2 * H, 2 * W, 2)


def shared_of(kind: str, network: nn.Module) -> SharedNetwork:
    return SharedNetwork(network, kind_named(KINDS[kind]).anatomy(network.config, GUIDANCE))


def config_of(kind: str, name: str) -> LoraConfig:
    layers = list(kind_named(KINDS[kind]).layers)
    return LoraConfig(r=RANK, lora_alpha=ALPHA[name], target_modules=layers)


def separate(kind: str, network: nn.Module, role: Role) -> tuple[nn.Module, dict[str, Tensor]]:
    """A deep copy of the stock network with the role's adapter as its only one, and its parameters under the role's names."""
    alone = copy.deepcopy(network).requires_grad_(False)
    alone.add_adapter(config_of(kind, role.name), "own")
    own = {"adapter." + n.replace(".own.", "."): p for n, p in alone.named_parameters() if ".own." in n}
    weights = dict(role.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for n, p in own.items():
            p.data = p.data.double()
            p.copy_(weights[n])
    return alone, own


@every_kind
def test_roles_are_networks_of_their_own(kind, base, inputs, fill):
    """Teacher bit for bit the stock network, adapters on or off; a fresh adapter too; trained ones those of plain peft."""
    network, shared, (x, t, condition) = base(kind), shared_of(kind, base(kind)), inputs(kind)
    expected = stock(network, x, t, condition)
    assert torch.equal(shared.teacher()(x, t, **condition), expected)
    student, aux = (shared.add_adapter(name, config_of(kind, name)) for name in ("student", "aux"))
    assert torch.equal(student(x, t, **condition), expected)
    fill(student), fill(aux)
    assert torch.equal(shared.teacher()(x, t, **condition), expected)
    for role in (student, aux, student):
        alone = stock(separate(kind, network, role)[0], x, t, condition)
        assert torch.equal(role(x, t, **condition), alone)
        assert (alone - expected).abs().max() > 1e-2
    assert torch.equal(Whole(network, shared.anatomy)(x, t, **condition), expected)


def test_default_layers_are_attention_and_feed_forward(base):
    """Of SD3.5 its second attention too; of every block, and nothing else."""
    names = {
        kind: {n for n, m in base(kind).named_modules() if isinstance(m, nn.Linear) and any(n.endswith(f".{t}") for t in layers)}
        for kind in ("sd35", "flux dev")
        for layers in [kind_named(KINDS[kind]).layers]
    }
    double = {
        *(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    }
    double |= {f"{part}.{n}" for part in ("ff", "ff_context") for n in ("net.0.proj", "net.2")}
    second = {f"attn2.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    last = double - {"attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"}  # the text ends there
    expected = {f"transformer_blocks.0.{n}" for n in double | second} | {f"transformer_blocks.1.{n}" for n in last}
    assert names["sd35"] == expected
    single = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"}
    expected = {f"transformer_blocks.0.{n}" for n in double} | {f"single_transformer_blocks.0.{n}" for n in single}
    assert names["flux dev"] == expected


def losses(student, teacher, aux, z: Tensor, eps: Tensor, t: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's, with gradients through teacher and aux, and the aux network's own. x0 = x_t - t v."""
    last = torch.ones(B, dtype=torch.float64)
    x0 = z - student(z, last, **condition)
    wide = t[:, None, None, None]
    x_t = (1 - wide) * x0 + wide * eps
    real, fake = teacher(x_t, t, **condition), aux(x_t, t, **condition)
    denoising = (aux((1 - wide) * x0.detach() + wide * eps, t, **condition) - (eps - x0.detach())).square().sum()
    return {"student": ((fake - real) * (real - x0)).sum(), "aux": denoising}


@pytest.mark.parametrize("checkpointing", [False, True])
@every_kind
def test_gradients_are_those_of_separate_networks(kind, checkpointing, base, inputs, fill, randn):
    """To 1e-9, whichever role runs between forward and backward and is active during it; each backward leaves the other's."""
    network, shared, (z, _, condition) = base(kind), shared_of(kind, base(kind)), inputs(kind)
    roles = {name: fill(shared.add_adapter(name, config_of(kind, name))) for name in ("student", "aux")}
    roles[None] = shared.teacher()
    alone = {name: separate(kind, network, roles[name]) for name in ("student", "aux")}
    eps, t = randn(*z.shape), torch.tensor([0.7, 0.2], dtype=torch.float64)
    wholes = {name: Whole(copied, shared.anatomy) for name, (copied, _) in alone.items()}
    expected = {}
    reference = losses(wholes["student"], Whole(network, shared.anatomy), wholes["aux"], z, eps, t, condition)
    for name, value in reference.items():
        own = alone[name][1]
        expected[name] = dict(zip(own, torch.autograd.grad(value, list(own.values()), retain_graph=True), strict=True))
    if checkpointing:
        for name in ("student", "aux"):
            roles[name].enable_gradient_checkpointing()
    for active in roles:
        computed = losses(roles["student"], roles[None], roles["aux"], z, eps, t, condition)
        for name, other in (("student", "aux"), ("aux", "student")):
            with torch.no_grad():
                roles[active](z, t, **condition)
            with shared.running(active):
                computed[name].backward(inputs=list(roles[name].parameters()))
            assert all(p.grad is None for p in roles[other].parameters())
            for n, p in roles[name].named_parameters():
                scale = max(1.0, float(expected[name][n].abs().max()))
                assert_close(p.grad, expected[name][n], rtol=0, atol=1e-9 * scale)
                p.grad = None


def recomputed_by(shared: SharedNetwork) -> list[str]:
    """The class of each block that it recomputes, from now on."""
    calls, original = [], shared.checkpointed
    shared.checkpointed = lambda *a, **k: (calls.append(type(a[0]).__name__), original(*a, **k))[1]
    return calls


def test_blocks_are_recomputed(base, inputs, fill):
    """Every block, and no other module; SD3's class does not say which repeat, and they are told to diffusers' compiler too."""
    for kind, count in (("sd35", 2), ("flux dev", 2)):
        shared = shared_of(kind, base(kind))
        student = fill(shared.add_adapter("student", config_of(kind, "student")))
        calls = recomputed_by(shared)
        x, t, condition = inputs(kind)
        student.enable_gradient_checkpointing()
        student(x, t, **condition).sum().backward()
        assert len(calls) == count
        assert set(calls) == set(shared.network._repeated_blocks)
        student.compile_repeated_blocks(backend="eager")


@every_kind
def test_head_in_the_place_of_the_last_layer(kind, base, inputs, fill, randn):
    """With the rows that it replaces as its own last channels, those maps are the network's output; the first stay zero, and so
    do all at first."""
    shared, (x, t, condition) = shared_of(kind, base(kind)), inputs(kind)
    aux = fill(shared.add_adapter("aux", config_of(kind, "aux")))
    head = AdapterHead(aux, 5).double()
    assert torch.equal(head(x, t, **condition), torch.zeros(B, 5, H, W).double())
    with torch.no_grad():
        for mine, theirs in zip(head.conv_out.parameters(), head.replaced.parameters(), strict=True):
            mine[-len(theirs) :] = theirs
    maps = head(x, t, **condition)
    assert maps.shape == (B, 5, H, W)
    assert torch.equal(maps[:, :2], torch.zeros(B, 2, H, W).double())
    assert_close(maps[:, 2:], aux(x, t, **condition), rtol=1e-12, atol=1e-12)


def test_tokens_are_flux_own(randn):
    x = randn(2, 3, 6, 10)
    assert torch.equal(to_tokens(x, 2), FluxPipeline._pack_latents(x, 2, 3, 6, 10))
    assert torch.equal(from_tokens(to_tokens(x, 2), (6, 10), 2), x)


@every_kind
def test_half_precision(kind, base, inputs, fill):
    """bfloat16 weights below float32 adapters: the read-out is float32, the product of the last layer not rounded; so is a
    head's output, and gradients."""
    shared, (x, t, condition) = shared_of(kind, base(kind).bfloat16()), inputs(kind)
    student, aux = (shared.add_adapter(name, config_of(kind, name)) for name in ("student", "aux"))
    assert student(x.float(), t.float(), **condition).dtype == torch.bfloat16
    seen = []
    handle = student.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with student.reading_out():
        out = student(x.float(), t.float(), **condition)
    handle.remove()
    assert out.dtype == torch.float32
    last = student.last
    tokens = seen[0].double() @ last.weight.double().T + last.bias.double()
    exact = None if kind == "z-image" else from_tokens(tokens, (H, W), 2)
    if kind == "z-image":  # text follows
        tokens = -tokens[:, : H * W // 4]
    if KINDS[kind] in ("sd3", "zimage"):  # their squares are (row, column, channel)
        exact = tokens.reshape(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
    assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    assert AdapterHead(aux, 2)(x.float(), t.float(), **condition).dtype == torch.float32
    out.square().sum().backward()
    assert {p.grad.dtype for p in student.parameters()} == {torch.float32}


# The last third of the blocks --------------------------------------------------------------------------------------------------

DEEP = {
    "sd35": {"num_layers": 7},
    "flux dev": {"num_layers": 2, "num_single_layers": 5},
    "flux schnell": {"num_layers": 5, "num_single_layers": 1},  # the last two are of both lists
    "z-image": {"n_layers": 5},
}
every_deep_kind = pytest.mark.parametrize("kind", DEEP)


@pytest.fixture
def deep(base, fill):
    """deep(kind): the same with more blocks, all weights random: what is zero at first hides nothing."""

    def make(kind: str) -> nn.Module:
        config = dict(base(kind).config) | DEEP[kind]
        torch.manual_seed(7)
        network = type(base(kind)).from_config(config).double().eval()
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
        return network.requires_grad_(False)

    return make


def last_of(kind: str, network: nn.Module, fill) -> tuple[SharedNetwork, LastBlocks]:
    """With an adapter of a student everywhere, as in a run, and one of the second network on the last third."""
    shared = shared_of(kind, network)
    fill(shared.add_adapter("student", config_of(kind, "student")))
    lists = shared.anatomy.repeats
    layers = layers_of(network, lists, tuple(kind_named(KINDS[kind]).layers))
    role = fill(shared.add_adapter("aux", LoraConfig(r=RANK, lora_alpha=3.0, target_modules=layers)))
    head = LastBlocks(role, C, lists).double()
    with torch.no_grad():
        for mine, theirs in zip(head.conv_out.parameters(), head.replaced.parameters(), strict=True):
            mine.copy_(theirs)
    return shared, head


def alone(kind: str, network: nn.Module, head: LastBlocks) -> tuple[nn.Module, dict[str, Tensor]]:
    """A deep copy of the stock network with the head's adapter as its only one; its parameters under that role's names."""
    layers = layers_of(network, head.lists, tuple(kind_named(KINDS[kind]).layers))
    copied = copy.deepcopy(network).requires_grad_(False)
    copied.add_adapter(LoraConfig(r=RANK, lora_alpha=3.0, target_modules=layers), "own")
    own = {"adapter." + n.replace(".own.", "."): p for n, p in copied.named_parameters() if ".own." in n}
    weights = dict(head.role.named_parameters())
    assert own.keys() == weights.keys()
    for n, p in own.items():
        p.data = weights[n].data.double().clone()
    return copied, own


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("sd35", "transformer_blocks.5"),
        ("flux dev", "single_transformer_blocks.3"),
        ("flux schnell", "transformer_blocks.4"),
    ],
)
def test_what_the_last_third_is(kind, first, deep):
    network = deep(kind)
    before, last = split_blocks(network, shared_of(kind, network).anatomy.repeats)
    assert (last[0], len(last)) == (first, (len(before) + len(last)) // 3)


@every_deep_kind
def test_the_last_third_is_a_network_of_its_own(kind, deep, inputs, fill):
    """On what the teacher's call has made, the whole network with that adapter; the teacher's own output, bit for bit; no other
    block is run, and afterwards all are where they were.
    """
    network, stays = deep(kind), deep(kind)
    shared, head = last_of(kind, network, fill)
    x, t, condition = inputs(kind)
    made = shared.teacher()(x, t, return_features=True, **condition)
    assert torch.equal(made.sample, stock(stays, x, t, condition))
    ran: list[str] = []
    before, last = split_blocks(network, head.lists)
    handles = [network.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n in before + last]
    out = head(made.features)
    for handle in handles:
        handle.remove()
    assert ran == last
    assert_close(out, stock(alone(kind, stays, head)[0], x, t, condition), rtol=1e-11, atol=1e-11)
    assert (out - made.sample).abs().max() > 1e-3
    assert split_blocks(network, head.lists) == (before, last)
    assert torch.equal(shared.teacher()(x, t, **condition), made.sample)


@pytest.mark.parametrize("checkpointing", [False, True])
@every_deep_kind
def test_gradients_of_the_last_third_are_those_of_a_separate_network(kind, checkpointing, deep, inputs, fill):
    """To 1e-9, of its adapter and, through the teacher's blocks, of x_t; whatever role is active in backward."""
    network, stays = deep(kind), deep(kind)
    shared, head = last_of(kind, network, fill)
    x, t, condition = inputs(kind)
    copied, own = alone(kind, stays, head)
    theirs, mine = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    loss = stock(copied, theirs, t, condition).square().sum()
    expected = dict(zip(("x", *own), torch.autograd.grad(loss, [theirs, *own.values()]), strict=True))
    if checkpointing:
        head.enable_gradient_checkpointing()
    out = head(shared.teacher()(mine, t, return_features=True, **condition).features)
    with shared.running("student"):
        out.square().sum().backward()
    found = {"x": mine.grad} | {n: p.grad for n, p in head.role.named_parameters()}
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-9 * max(1.0, float(value.abs().max())))
    assert all(p.grad is None for n, p in network.named_parameters() if ".student." in n)


@pytest.mark.parametrize("kind", ["sd35", "z-image"])
def test_under_guidance_the_last_third_reads_the_conditional_half(kind, deep, inputs, fill):
    """Z-Image pads both halves to the longer text, here that of the null condition."""
    network, stays = deep(kind), deep(kind)
    shared, head = last_of(kind, network, fill)
    x, t, condition = inputs(kind)
    null = {k: torch.ones_like(v[0]) for k, v in condition.items()}
    level = RectifiedFlowSchedule().level(t)
    teacher = Denoiser(shared.teacher(), RectifiedFlowSchedule(), "flow", 1.0, 3.0, null)
    _, features = teacher(x, level, condition, return_features=True)
    assert_close(head(features), stock(alone(kind, stays, head)[0], x, t, condition), rtol=1e-10, atol=1e-10)
    without = Denoiser(shared.teacher(), RectifiedFlowSchedule(), "flow", 1.0)  # as a fake score reads it, by itself
    assert_close(head(WayDown(without)(x, level, condition)), head(features), rtol=1e-10, atol=1e-10)


def test_a_single_block_is_refused(base):
    network = SD3Transformer2DModel.from_config(dict(base("sd3").config) | {"num_layers": 1})
    with pytest.raises(UserError, match="network=shared: this SD3Transformer2DModel has a single block"):
        split_blocks(network, ("transformer_blocks",))
