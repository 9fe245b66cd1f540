"""The posterior on the teacher's own encoder (posterior.network: shared): a U-Net's way up under an adapter, on what its way down
has just made for the teacher.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines import stable_diffusion as sd
from pipelines.adapters import SharedNetwork, Whole
from pipelines.common.config import load_config
from pipelines.common.errors import UserError
from pipelines.denoiser import Denoiser
from pipelines.peft_layers import of_adapters, own_name
from pipelines.up_half import UpHalf, layers_of
from trainers.config.run import DistillConfig
from trainers.engine.draws import DrawSource
from trainers.families import family_for, load_family
from trainers.objectives.base import Need
from trainers.objectives.diff_instruct import DiffInstruct

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

KINDS = ("sd15", "sd21", "sdxl")
LORA, ADAM = {"rank": 4, "alpha": 2.0}, {"lr": 1e-3}
POSTERIOR = {"network": "shared", "lora": LORA, "covariance": "learned", "warmup_updates": 1, "optimizer": ADAM}


@pytest.fixture
def base(tiny):
    """base(kind): the U-Net of a tiny pipeline in float64."""
    return lambda kind: UNet2DConditionModel.from_pretrained(tiny[kind], subfolder="unet").double().eval().requires_grad_(False)


@pytest.fixture
def given(randn):
    """given(kind) -> x_t (b, 4, 8, 8), t (b,), a flat condition."""

    def make(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        condition = {"encoder_hidden_states": randn(2, 7, 64 if kind == "sdxl" else 32)}
        if kind == "sdxl":
            condition |= {"text_embeds": randn(2, 32), "time_ids": torch.full((2, 6), 16.0).double()}
        return randn(2, 4, 8, 8), torch.tensor([801.0, 23.0], dtype=torch.float64), condition

    return make


def stock(network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    added = {k: v for k, v in condition.items() if k != "encoder_hidden_states"}
    more = {"added_cond_kwargs": added} if added else {}
    return network(x, t, encoder_hidden_states=condition["encoder_hidden_states"], **more).sample


def halves_of(network: nn.Module, fill) -> tuple[SharedNetwork, UpHalf]:
    """With an adapter of a student everywhere, as in a run, and one of the posterior on the way up; all weights random."""
    shared = SharedNetwork(network, sd.KIND.anatomy(network.config, 1.0))
    fill(shared.add_adapter("student", LoraConfig(r=2, lora_alpha=1.0, target_modules=list(sd.KIND.layers))))
    layers = layers_of(network, sd.KIND.layers)
    half = UpHalf(fill(shared.add_adapter("aux", LoraConfig(r=2, lora_alpha=3.0, target_modules=layers))), 4).double()
    with torch.no_grad():
        for mine, theirs in zip(half.conv_out.parameters(), half.replaced.parameters(), strict=True):
            mine.copy_(theirs)
    return shared, half


def alone(network: nn.Module, half: UpHalf) -> tuple[nn.Module, dict[str, Tensor]]:
    """A deep copy of the stock network with the posterior's adapter as its only one; its parameters under that role's names."""
    copied = copy.deepcopy(network).requires_grad_(False)
    copied.add_adapter(LoraConfig(r=2, lora_alpha=3.0, target_modules=layers_of(network, sd.KIND.layers)), "own")
    own = {n.replace(".own.", "."): p for n, p in copied.named_parameters() if ".own." in n}
    weights = {n.removeprefix("adapter."): p for n, p in half.role.named_parameters()}
    assert own.keys() == weights.keys()
    assert all(name.startswith("up_blocks.") for name in own)
    with torch.no_grad():
        for name, p in own.items():
            p.data = weights[name].data.double().clone()
    return copied, own


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_network_of_its_own(kind, base, given, fill):
    """On the teacher's features, bit for bit the whole network with that adapter on its way up; the teacher's own output too."""
    network, stays = base(kind), base(kind)
    shared, half = halves_of(network, fill)
    x, t, condition = given(kind)
    made = shared.teacher()(x, t, return_features=True, **condition)
    assert torch.equal(made.sample, stock(stays, x, t, condition))
    assert torch.equal(half(made.features), stock(alone(stays, half)[0], x, t, condition))
    assert not torch.equal(half(made.features), made.sample)
    assert not network.up_blocks[0]._forward_pre_hooks  # none is left behind


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_separate_network(kind, checkpointing, base, given, fill):
    """To 1e-9, of its adapter and, through the teacher's encoder, of x_t; whatever role is active in backward."""
    network, stays = base(kind), base(kind)
    shared, half = halves_of(network, fill)
    x, t, condition = given(kind)
    copied, own = alone(stays, half)
    theirs, mine = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    loss = stock(copied, theirs, t, condition).square().sum()
    expected = dict(zip(("x", *own), torch.autograd.grad(loss, [theirs, *own.values()]), strict=True))
    if checkpointing:
        half.enable_gradient_checkpointing()
    out = half(shared.teacher()(mine, t, return_features=True, **condition).features)
    with shared.running("student"):
        out.square().sum().backward()
    found = {"x": mine.grad} | {n.removeprefix("adapter."): p.grad for n, p in half.role.named_parameters()}
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-9 * max(1.0, float(value.abs().max())))
    assert all(p.grad is None for n, p in network.named_parameters() if ".student." in n)


def test_under_guidance_it_reads_the_conditional_half(base, given, fill):
    network, stays = base("sdxl"), base("sdxl")
    shared, half = halves_of(network, fill)
    x, t, condition = given("sdxl")
    null = {k: torch.zeros_like(v[0]) for k, v in condition.items() if k != "time_ids"}
    teacher = Denoiser(shared.teacher(), schedule := sd_schedule(), "epsilon", 1.0, 3.0, null)
    _, features = teacher(x, schedule.level(t.long()), condition, return_features=True)
    assert_close(half(features), stock(alone(stays, half)[0], x, t, condition), rtol=1e-10, atol=1e-10)


def sd_schedule():
    from diffusers import DDIMScheduler

    return sd.KIND.schedule(DDIMScheduler())


# Runs ------------------------------------------------------------------------------------------------------------------------


def with_shared(config: dict, **posterior) -> dict:
    return config | {"objective": config["objective"] | {"posterior": POSTERIOR | posterior}}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_begin_at_the_teacher(kind, recipe, written, randn):
    """E[x0 | x_t] of the posterior is the teacher's own, conditional one before its first update, guidance or not."""
    config = load_config(DistillConfig, written(with_shared(recipe("vardiu", kind)))[1], [])
    made = family_for(config)(config, Accelerator())
    posterior = made.posterior(config.objective.posterior, with_mean=True)
    x_t, level = randn(2, 4, 8, 8).float(), made.teacher.schedule.level(torch.tensor([700, 30]))
    condition = made.condition(torch.arange(2))
    with torch.no_grad():
        guided, features = made.teacher(x_t, level, condition, return_features=True)
        mean = posterior(x_t, level, condition, features).x0_mean
        own = Denoiser(made.base.teacher(), made.teacher.schedule, made.teacher.parameterization, 1.0)(x_t, level, condition)
    assert_close(mean, own, rtol=1e-4, atol=1e-4)
    assert float((guided - own).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_runs(kind, recipe, distil):
    """Finite numbers, a student, one call of the teacher for each noised copy and no more."""
    output = distil(with_shared(recipe("vardiu", kind)))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(np.isfinite([v for v in row.values() if isinstance(v, float)]).all() for row in rows)
    assert (output / "student" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_neither_micro_batches_nor_recomputed_blocks_show(recipe, distil, tmp_path):
    smooth = ADAM | {"betas": [0.0, 0.99], "eps": 1e-2}
    config = with_shared(recipe("vardiu", "sdxl"), optimizer=smooth, warmup_updates=0) | {"steps": 1, "checkpoint_every": 1}
    config["student"] = {"lora": LORA, "optimizer": smooth}
    lines = []
    for name, more in (("whole", {}), ("split", {"micro_batch_size": 2}), ("saving", {"gradient_checkpointing": True})):
        output = distil(config | more | {"output_dir": str(tmp_path / name)})
        lines.append(json.loads((output / "metrics.jsonl").read_text().splitlines()[0]))
    for key in ("joint/loss", "joint/information", "joint/regression_error"):
        assert [line[key] for line in lines[1:]] == pytest.approx([lines[0][key]] * 2, rel=1e-4)


@pytest.mark.slow
def test_sharded_weights_do_not_show(recipe, whole_and_sharded):
    """FSDP2 on two processes, whose up blocks are called when the network itself is not."""
    smooth = ADAM | {"betas": [0.0, 0.99], "eps": 1e-2}
    config = recipe("vardiu", "sdxl", steps=2, checkpoint_every=2, gradient_checkpointing=True)
    config["student"] = {"lora": LORA, "optimizer": smooth}
    whole_and_sharded(with_shared(config, optimizer=smooth))


def test_refused(recipe, tmp_path):
    config = with_shared(recipe("vardiu"), lora=LORA | {"targets": ["to_w"]})
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))
    parsed = load_config(DistillConfig, str(file), [])
    with pytest.raises(UserError, match=r"objective\.posterior\.lora\.targets: none of \['to_w'\] is a layer of the up blocks"):
        family_for(parsed)(parsed, Accelerator())
    assert not Path(config["output_dir"]).exists()  # before anything is encoded


# The fake score of Diff-Instruct ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_down_alone(kind, base, given, fill):
    """What the way up reads, without running it: the same bits, and the network is as it was."""
    network = base(kind)
    shared, half = halves_of(network, fill)
    x, t, condition = given(kind)
    whole = shared.teacher()(x, t, return_features=True, **condition)
    ran = []
    hook = network.up_blocks[0].resnets[0].register_forward_hook(lambda *args: ran.append(args))
    alone = shared.teacher()(x, t, return_features="only", **condition)
    hook.remove()
    assert alone.sample is None
    assert not ran
    assert torch.equal(half(alone.features), half(whole.features))
    assert torch.equal(shared.teacher()(x, t, **condition), whole.sample)


def shared_fake(config: dict, **more) -> dict:
    fake = config["objective"]["fake_score"] | {"network": "shared", "lora": LORA} | more
    return config | {"objective": config["objective"] | {"fake_score": fake}}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fake_score_on_the_teachers_features(kind, joint, recipe, written, distil, randn):
    """It begins as the teacher without guidance, wherever its features come from; a run counts what it calls."""
    config = shared_fake(recipe("diff_instruct", kind), updates=2, warmup_updates=1)
    config["objective"]["joint"] = joint
    parsed = load_config(DistillConfig, written(config)[1], [])
    made = family_for(parsed)(parsed, Accelerator())
    objective = parsed.objective.build(made, 3)
    x_t, level = randn(2, 4, 8, 8).float(), made.teacher.schedule.level(torch.tensor([700, 30]))
    condition = made.condition(torch.arange(2))
    with torch.no_grad():
        _, features = made.teacher(x_t, level, condition, return_features=True)
        own = Denoiser(made.base.teacher(), made.teacher.schedule, made.teacher.parameterization, 1.0)(x_t, level, condition)
        assert_close(objective.fake(x_t, level, condition, features), own, rtol=1e-4, atol=1e-4)
        assert_close(objective.fake(x_t, level, condition), own, rtol=1e-4, atol=1e-4)
    output = distil(config)
    info = json.loads((output / "student" / "student.json").read_text())
    alone = 3 * (1 if joint else 2) + 1  # updates of the fake score by itself, with that of the warm-up
    assert info["calls"]["way_down"] == alone * 4
    assert info["calls"]["teacher"] == 3 * 4 * 2
    assert info["calls"]["fake_score"] == (alone + 3) * 4


@pytest.mark.slow
def test_the_students_gradient_is_that_of_a_separate_network(recipe, written):
    """Diff-Instruct's joint loss against the same with a deep copy in the place of the shared one."""
    parsed = load_config(DistillConfig, written(shared_fake(recipe("diff_instruct", "sdxl")))[1], [])
    made = family_for(parsed)(parsed, Accelerator())
    objective = parsed.objective.build(made, 3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in [p for network in objective.networks.values() for p in network.parameters() if p.requires_grad]:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    draws = DrawSource(0, 4, (4, 8, 8), torch.device("cpu"), made.examples)
    (draw,) = draws.batch(("step", 0), 0.0)
    student = [p for p in objective.student.parameters() if p.requires_grad]
    parts = list(objective.joint_loss(draw))
    mine = torch.autograd.grad(parts[1].loss.sum(), student)
    half = objective.fake_score.way_up
    copied = copy.deepcopy(made.base.network).requires_grad_(False)
    weights = dict(half.role.named_parameters())
    separate = UNet2DConditionModel.from_config(copied.config)
    separate.load_state_dict({own_name(k): v for k, v in copied.state_dict().items() if not of_adapters(k)})
    separate.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=layers_of(separate, sd.KIND.layers)), "own")
    with torch.no_grad():
        for name, p in separate.named_parameters():
            if ".own." in name:
                p.copy_(weights["adapter." + name.replace(".own.", ".")])
        for theirs, own in zip(separate.conv_out.parameters(), half.conv_out.parameters(), strict=True):
            theirs.copy_(own)
    fake = Denoiser(Whole(separate, sd.KIND.anatomy(separate.config, 1.0)), made.teacher.schedule, "epsilon", 1.0)
    other = DiffInstruct(objective.student, made.teacher, fake, objective.levels, objective.fake_levels, "dmd", "snr", joint=True)
    theirs = torch.autograd.grad(list(other.joint_loss(draw))[1].loss.sum(), student)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("more", [{"teacher.dtype": "bfloat16"}, {"student.steps": 2}], ids=["bfloat16", "two steps"])
@pytest.mark.parametrize("objective", ["vardiu", "diff_instruct"])
def test_runs_in_half_precision_and_in_several_steps(objective, more, recipe, distil):
    """The two dtypes meet in the layers alone; what a step begins with is no matter of the second network's."""
    config = recipe(objective, "sdxl", checkpoint_every=3)
    config = with_shared(config) if objective == "vardiu" else shared_fake(config)
    output = distil(config, *(f"{key}={value}" for key, value in more.items()))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite([v for v in row.values() if isinstance(v, float)]).all() for row in rows)
    stored = load_file(next((output / "checkpoints").iterdir()) / "networks.safetensors")
    assert {v.dtype for k, v in stored.items() if "lora_" in k or "conv_out" in k} == {torch.float32}


def test_other_teachers_refuse_a_shared_fake_score():
    """By name, those whose networks have no last part that can be run alone."""
    need = Need("objective.fake_score.network", "last_part", True)
    for family in ("edm", "exact"):
        assert "objective.fake_score.network has no effect for" in load_family(family).refusal(need)
    for family in ("stable_diffusion", "stable_diffusion_3", "flux", "z_image", "dit"):
        assert load_family(family).refusal(need) is None
