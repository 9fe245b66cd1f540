"""The EDM network, and a second decoder on its encoder: what the encoder hands over, and that sharing it changes nothing."""

import copy
import math

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.denoiser import Denoiser, FeatureMaps
from pipelines.edm import PatchUNet
from pipelines.edm.features import Decoder, second_decoder
from pipelines.edm.patch_unet import ResidualBlock, SelfAttention, fourier_features
from pipelines.noise import EDMSchedule, RectifiedFlowSchedule, VPSchedule, add_noise, edm_coefficients, widen

# three resolutions of 2x2 blocks, attention on the two lower ones, channels that differ everywhere
DEEP = {
    "sample_size": 24,
    "in_channels": 3,
    "out_channels": 5,
    "channels": 4,
    "channel_mult": [1, 2, 3],
    "num_blocks": 2,
    "attention_levels": [1, 2],
    "patch_size": 2,
    "num_classes": 7,
    "norm_groups": 2,
}
SIGMA_DATA = 0.7
SMALL = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "channels": 8, "num_blocks": 1, "norm_groups": 2}


def deep_inputs(randn):
    return randn(5, 3, 24, 24), randn(5) / 2, torch.tensor([0, 3, 6, 7, 3])


def test_untrained_network_is_silent(randn, randomise):
    x, time, labels = deep_inputs(randn)
    out = PatchUNet(**DEEP).double()(x, time, labels).sample
    assert out.shape == (5, 5, 24, 24)
    assert not out.any()
    assert randomise(PatchUNet(**DEEP))(x, time, labels, return_dict=False)[0].std() > 1e-3


def test_every_weight_is_used(randn, randomise):
    unet = randomise(PatchUNet(**DEEP))
    unet(*deep_inputs(randn)).sample.square().sum().backward()
    # a single-head attention is blind to a shift of its keys, so that third of the bias has no gradient
    silent = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert silent == []


@pytest.mark.slow
def test_compiled_blocks_give_the_same(randn, randomise):
    """Outputs and gradients; every block of either sort is compiled."""
    unet, inputs = randomise(PatchUNet(**DEEP)), deep_inputs(randn)
    compiled = copy.deepcopy(unet)
    compiled.compile_repeated_blocks(backend="aot_eager")
    blocks = [m for m in compiled.modules() if type(m).__name__ in PatchUNet._repeated_blocks]
    assert {type(m) for m in blocks} == {ResidualBlock, SelfAttention}
    assert all(m._compiled_call_impl for m in blocks)
    outs = [net(*inputs).sample for net in (unet, compiled)]
    gradients = [torch.autograd.grad(o.square().sum(), list(n.parameters())) for o, n in zip(outs, (unet, compiled), strict=True)]
    assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)
    assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_feature_maps_of_the_bottom(randn, randomise):
    """Also where blocks are compiled, whose hooks are not heard."""
    unet, (x, _, labels) = randomise(PatchUNet(**DEEP | {"out_channels": 3})), deep_inputs(randn)
    denoiser, level = Denoiser(unet, EDMSchedule()), EDMSchedule().level(torch.linspace(0.1, 3, 5, dtype=torch.float64))
    expected = denoiser(x, level, {"class_labels": labels}, return_features=True)[1].bottom
    assert torch.equal(FeatureMaps(denoiser, [unet.bottom])(x, level, {"class_labels": labels})[0], expected)
    unet.compile_repeated_blocks(backend="eager")
    assert_close(FeatureMaps(denoiser, [unet.bottom])(x, level, {"class_labels": labels})[0], expected, rtol=1e-12, atol=1e-12)


def test_samples_do_not_mix(randn, randomise):
    unet, (x, time, labels) = randomise(PatchUNet(**DEEP)), deep_inputs(randn)
    out = unet(x, time, labels).sample
    for i in range(5):
        assert_close(unet(x[i : i + 1], time[i : i + 1], labels[i : i + 1]).sample, out[i : i + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 64])
def test_noise_level_and_class_reach_the_output(channels, randn, randomise):
    """At every width, with the default groups: a normalisation of single channels would take the embedding out again."""
    unet = randomise(PatchUNet(channels=channels, num_classes=3))
    x, time, labels = randn(5, 1, 8, 8), randn(5) / 2, torch.tensor([0, 1, 2, 3, 1])
    with torch.no_grad():
        out, later = unet(x, time, labels).sample, unet(x, time + 0.3, labels).sample
        relabelled = unet(x, time, (labels + 1) % 4).sample
    for other in (later, relabelled):
        least = float((other - out).abs().amax((1, 2, 3)).min())
        assert least > 1e-4


def test_labels(randn, randomise):
    unet, (x, time, _) = randomise(PatchUNet(**DEEP)), deep_inputs(randn)
    out = [unet(x, time, torch.full((5,), label)).sample for label in range(8)]
    for i in range(8):
        for j in range(i):
            assert (out[i] - out[j]).abs().max() > 1e-4
    assert_close(unet(x, time).sample, out[7], rtol=0, atol=0)  # none is the null label
    with pytest.raises(ValueError, match=r"unconditional network \(num_classes=0\)"):
        PatchUNet(**SMALL)(torch.zeros(3, 2, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("size", [4, 12, 25])
def test_resolution_must_divide(size):
    with pytest.raises(ValueError, match=rf"sample_size {size} must be a multiple of patch_size 2\^\(levels-1\) = 8"):
        PatchUNet(**DEEP | {"sample_size": size})


def test_residual_block_starts_as_its_skip(randn):
    block = ResidualBlock(4, 4, 6, 0.0, 2).double()
    x = randn(3, 4, 5, 7)
    assert_close(block(x, randn(3, 6)), x, rtol=0, atol=0)


def test_fourier_features(randn):
    time = randn(5)
    features = fourier_features(time, 14)
    assert features.shape == (5, 14)
    cycles = [2 ** (-3 + i) for i in range(7)]  # 1/8 to 8 a unit
    for i, t in enumerate(time.tolist()):
        expected = [math.cos(2 * math.pi * f * t) for f in cycles] + [math.sin(2 * math.pi * f * t) for f in cycles]
        assert_close(features[i], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(randn, randomise):
    unet, inputs = randomise(PatchUNet(**DEEP)), deep_inputs(randn)
    runs = []
    block = next(layer for layer in unet.down if isinstance(layer, ResidualBlock))
    block.register_forward_pre_hook(lambda *args: runs.append(1))  # recomputation may stop early

    def gradients() -> tuple[Tensor, list[Tensor], int]:
        runs.clear()
        unet.zero_grad()
        x = inputs[0].clone().requires_grad_()
        loss = unet(x, *inputs[1:]).sample.pow(3).sum()
        loss.backward()
        return loss.detach(), [x.grad, *(p.grad for p in unet.parameters())], len(runs)

    loss, plain, forwards = gradients()
    unet.enable_gradient_checkpointing()
    loss_again, checkpointed, forwards_again = gradients()
    assert (forwards, forwards_again) == (1, 2)  # the block was run again for its backward pass
    assert_close(loss_again, loss, rtol=0, atol=0)
    for a, b in zip(checkpointed, plain, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(unet(*inputs).sample.pow(3).sum(), loss, rtol=0, atol=0)


def test_network_save_and_load(tmp_path, randn, randomise):
    unet, inputs = randomise(PatchUNet(**DEEP, dropout=0.1)).eval(), deep_inputs(randn)
    unet.save_pretrained(tmp_path)
    loaded = PatchUNet.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert not loaded.training
    assert {k: loaded.config[k] for k in DEEP} == {k: unet.config[k] for k in DEEP}
    assert loaded.config.dropout == 0.1
    assert_close(loaded(*inputs).sample, unet(*inputs).sample, rtol=0, atol=0)


def test_lora(tmp_path, generator, randn, randomise):
    """An adapter starts as the identity, is the only thing trained, can be turned off, saved and loaded."""
    unet, inputs = randomise(PatchUNet(**DEEP)), deep_inputs(randn)
    base = unet(*inputs).sample.detach()
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["conv1", "conv2", "qkv", "embed"]), "student")
    assert_close(unet(*inputs).sample, base, rtol=0, atol=0)
    trainable = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n and ".student." in n for n in trainable)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted = unet(*inputs).sample
    assert (adapted - base).abs().max() > 1e-2
    adapted.sum().backward()
    assert all(p.grad is not None for p in trainable.values())
    unet.disable_adapters()
    assert_close(unet(*inputs).sample, base, rtol=0, atol=0)
    unet.enable_adapters()
    unet.save_lora_adapter(tmp_path, "student")
    unet.delete_adapters("student")
    assert_close(unet(*inputs).sample, base, rtol=0, atol=0)
    unet.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
    unet.double()
    assert_close(unet(*inputs).sample, adapted, rtol=1e-12, atol=1e-12)


@pytest.fixture
def unet(randomise) -> PatchUNet:
    return randomise(PatchUNet(**DEEP))


@pytest.fixture
def inputs(randn) -> tuple[Tensor, Tensor, Tensor]:
    return deep_inputs(randn)


# The features -------------------------------------------------------------------------------------------------------------


def test_features_come_with_an_unchanged_output(unet, inputs):
    plain = unet(*inputs)
    assert plain.features is None
    with_features = unet(*inputs, return_features=True)
    assert torch.equal(with_features.sample, plain.sample)
    as_tuple = unet(*inputs, return_dict=False, return_features=True)
    assert torch.equal(as_tuple[0], plain.sample)
    assert len(unet(*inputs, return_dict=False)) == 1
    for features in (with_features.features, as_tuple[1], unet.encode(*inputs)):
        for a, b in zip([features.bottom, *features.skips, features.embedding], tensors(with_features.features), strict=True):
            assert torch.equal(a, b)
    out = unet.conv_out(unet.dec.maps(with_features.features))
    assert torch.equal(nn.functional.pixel_shuffle(out, 2), plain.sample)


def tensors(features) -> list[Tensor]:
    return [features.bottom, *features.skips, features.embedding]


def test_features_can_be_decoded_again(unet, inputs):
    """Decoding uses up no skip connection of the features that it is given."""
    features = unet.encode(*inputs)
    assert torch.equal(unet.dec.maps(features), unet.dec.maps(features))


def test_second_half_of_the_features(unet, inputs):
    features = unet.encode(*inputs)
    pair = unet.encode(*(torch.cat([v.flip(0), v]) for v in inputs))
    for half, whole in zip(tensors(pair.second_half()), tensors(features), strict=True):
        assert_close(half, whole, rtol=1e-10, atol=1e-12)


# The second decoder ------------------------------------------------------------------------------------------------------


def test_decoder_with_the_last_convolution_is_the_network(unet, inputs):
    decoder = second_decoder(unet.dec, 5).double()
    features = unet.encode(*inputs)
    assert not decoder(features).any()
    assert decoder(features).shape == (5, 5, 24, 24)
    decoder.conv_out.load_state_dict(unet.conv_out.state_dict())
    assert torch.equal(decoder(features), unet(*inputs).sample)


def test_decoder_is_a_copy_of_half_the_network(unet, inputs):
    """No parameter of the encoder, none shared, all trained even if the network is frozen, any number of channels."""
    unet.requires_grad_(False)
    decoder = second_decoder(unet.dec, 11)
    names = {n.split(".")[0] for n, _ in decoder.named_parameters()}
    assert names == {"up", "norm_out", "conv_out"}
    assert all(p.requires_grad for p in decoder.parameters())
    assert not any(p.requires_grad for p in unet.parameters())
    mine = {p.data_ptr() for p in decoder.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in unet.parameters())
    before = unet(*inputs).sample
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(1)
    assert torch.equal(unet(*inputs).sample, before)
    assert decoder.double()(unet.encode(*inputs)).shape == (5, 11, 24, 24)


def checkpointed_and_not(unet: PatchUNet, decoder: Decoder, inputs) -> list[list[Tensor]]:
    """Output and all gradients, those in x and in the weights, without and with gradient checkpointing of the decoder."""
    decoder, runs, results = copy.deepcopy(decoder), [], []
    block = next(m for m in decoder.modules() if isinstance(m, ResidualBlock))
    block.register_forward_pre_hook(lambda *args: runs.append(1))
    for checkpointed in (False, True):
        if checkpointed:
            decoder.enable_gradient_checkpointing()
        runs.clear()
        decoder.zero_grad()
        x = inputs[0].clone().requires_grad_()
        out = decoder(unet.encode(x, *inputs[1:]))
        with torch.autocast("cpu", enabled=False):
            out.to(x.dtype).pow(3).sum().backward()
        assert len(runs) == 1 + checkpointed  # the block was run again for its backward pass
        results.append([out.detach(), x.grad, *(p.grad for p in decoder.parameters())])
    return results


@pytest.fixture
def decoder(unet, randomise) -> Decoder:
    made = second_decoder(unet.dec, 3)
    randomise(made.conv_out)
    return made


def test_gradient_checkpointing_of_the_decoder_changes_nothing(unet, decoder, inputs):
    plain, checkpointed = checkpointed_and_not(unet, decoder, inputs)
    for a, b in zip(checkpointed, plain, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(b.any() for b in plain)


def test_gradient_checkpointing_of_the_decoder_under_autocast(unet, decoder, inputs):
    """The recomputation runs under the autocast of the forward pass: bit for bit the same in bfloat16, and near float32."""
    inputs = (inputs[0].float(), inputs[1].float(), inputs[2])
    exact, _ = checkpointed_and_not(unet.float(), decoder.float(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain, checkpointed = checkpointed_and_not(unet, decoder, inputs)
    assert plain[0].dtype == torch.bfloat16
    for a, b in zip(checkpointed, plain, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain, exact, strict=True):
        assert nn.functional.cosine_similarity(a.float().flatten(), b.flatten(), 0) > 0.98


# Through the denoiser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def denoiser_inputs(randn):
    level = EDMSchedule().level(torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64))
    return randn(3, 3, 24, 24), level, {"class_labels": torch.tensor([2, 0, 5])}


def denoiser(unet: PatchUNet, scale: float = 1.0) -> Denoiser:
    return Denoiser(unet, EDMSchedule(), "edm", SIGMA_DATA, scale, {"class_labels": torch.tensor(7)})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_denoiser_hands_over_the_features_of_its_conditional_call(scale, randomise, denoiser_inputs):
    unet = randomise(PatchUNet(**DEEP | {"out_channels": 3}))
    x_t, level, condition = denoiser_inputs
    x0, features = denoiser(unet, scale)(x_t, level, condition, return_features=True)
    assert torch.equal(x0, denoiser(unet, scale)(x_t, level, condition))
    c_in = (level.sigma**2 + SIGMA_DATA**2).rsqrt()
    expected = unet.encode(c_in * x_t, level.t.log() / 4, condition["class_labels"])
    for a, b in zip(tensors(features), tensors(expected), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_network_that_has_no_features_is_called_as_before(randn, denoiser_inputs):
    """Nothing that it does not know is passed to it."""
    x_t, level, _ = denoiser_inputs
    x0 = Denoiser(lambda x, time: x, EDMSchedule(), "edm", SIGMA_DATA)(x_t, level)
    assert isinstance(x0, Tensor)


# Preconditioning ---------------------------------------------------------------------------------------------------------


def test_coefficients_are_those_of_karras(randn):
    """Table 1 where alpha = 1."""
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_in, c_skip, c_out = edm_coefficients(EDMSchedule().level(sigma), SIGMA_DATA)
    total = sigma**2 + SIGMA_DATA**2
    assert_close(c_in, widen(1 / total.sqrt()), rtol=1e-12, atol=0)
    assert_close(c_skip, widen(SIGMA_DATA**2 / total), rtol=1e-12, atol=0)
    assert_close(c_out, widen(sigma * SIGMA_DATA / total.sqrt()), rtol=1e-12, atol=0)


VP = VPSchedule(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))


@pytest.mark.parametrize(("schedule", "t"), [(RectifiedFlowSchedule(), [0.1, 0.5, 0.95]), (VP, [10, 500, 990])])
def test_coefficients_give_unit_variance_at_any_alpha(schedule, t, randn):
    """Of the network's input and of its target (x0 - c_skip x_t) / c_out, and no correlation between the two: c_skip is the one
    that makes the target's share least.
    """
    level = schedule.level(torch.tensor(t, dtype=torch.float64))
    assert float(level.alpha.max()) < 1
    c_in, c_skip, c_out = edm_coefficients(level, SIGMA_DATA)
    n = 200_000
    basis = randn(2, n)
    x, e = torch.linalg.qr(basis.T).Q.T * n**0.5  # orthonormal: sample moments without error
    x0, eps = (v.expand(3, 1, 1, n) for v in (SIGMA_DATA * x, e))
    x_t = add_noise(x0, eps, level)
    given, target = (c_in * x_t).flatten(1), ((x0 - c_skip * x_t) / c_out).flatten(1)
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(given.square().mean(1), ones, rtol=1e-9, atol=0)
    assert_close(target.square().mean(1), ones, rtol=1e-9, atol=0)
    assert_close((given * target).mean(1), 0 * ones, rtol=0, atol=1e-9)
