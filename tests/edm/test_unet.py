"""EDMUNet as a diffusers model: checkpointing, compiled blocks, adapters, files, labels, initial weights, second decoders."""

import copy
import math

import pytest
import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch.testing import assert_close

from pipelines.adapters import block_layers
from pipelines.edm import EDMUNet
from pipelines.edm.features import second_decoder, with_outputs
from pipelines.edm.layout import ARCHITECTURES
from pipelines.edm.unet import Resample, UNetBlock

SMALL = {
    "song": {"model_channels": 8, "channel_mult": [1, 3], "num_blocks": 1, "attention_resolutions": [6], "augment_dim": 5},
    "ncsnpp": ARCHITECTURES["ncsnpp"]
    | {"model_channels": 8, "channel_mult": [1, 2, 3], "num_blocks": 2, "attention_resolutions": [12, 3]},
    "adm": {"architecture": "adm", "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [12]},
}


@pytest.fixture(params=SMALL)
def unet(request, randomise) -> EDMUNet:
    shape = {"sample_size": 12, "in_channels": 2, "out_channels": 3, "num_classes": 7}
    return randomise(EDMUNet(**shape | SMALL[request.param]), 0.1)


@pytest.fixture
def inputs(unet, randn) -> tuple:
    augment = randn(5, 5) if unet.config.augment_dim else None
    return randn(5, 2, 12, 12), randn(5), torch.tensor([0, 3, 6, 7, 3]), augment


def gradients(unet, inputs) -> list[torch.Tensor]:
    x = inputs[0].clone().requires_grad_()
    unet(x, *inputs[1:]).sample.pow(3).sum().backward()
    return [x.grad, *(p.grad for p in unet.parameters())]


def test_every_weight_is_used_and_samples_do_not_mix(unet, inputs):
    out = unet(*inputs).sample
    assert out.shape == (5, 3, 12, 12)
    silent = [
        n for (n, _), g in zip(unet.named_parameters(), gradients(unet, inputs)[1:], strict=True) if not g.abs().max() > 1e-14
    ]
    assert silent == []
    for i in range(5):
        one = unet(*(None if v is None else v[i : i + 1] for v in inputs)).sample
        assert_close(one, out[i : i + 1], rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_changes_nothing(unet, inputs):
    """All blocks, those of the decoder too, run again in backward."""
    runs = {}
    for name, module in unet.named_modules():
        if isinstance(module, UNetBlock):
            module.register_forward_pre_hook(lambda m, a, name=name: runs.update({name: runs.get(name, 0) + 1}))
    plain = gradients(unet, inputs)
    assert set(runs.values()) == {1}
    runs.clear()
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    checkpointed = gradients(unet, inputs)
    assert set(runs.values()) == {2}
    for a, b in zip(checkpointed, plain, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_blocks_give_the_same(unet, inputs):
    compiled = copy.deepcopy(unet)
    compiled.compile_repeated_blocks(backend="eager")
    assert all(m._compiled_call_impl for m in compiled.modules() if isinstance(m, UNetBlock))
    assert_close(compiled(*inputs).sample, unet(*inputs).sample, rtol=1e-12, atol=1e-12)


def test_lora_on_every_layer_of_the_blocks(tmp_path, unet, inputs, generator):
    """Starts as the identity, is the only thing trained, reaches convolutions of up- and downsampling blocks, is saved."""
    base = unet(*inputs).sample.detach()
    layers = block_layers(unet)
    assert layers == ["affine", "conv0", "conv1", "proj", "qkv", "skip"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=layers), "student")
    assert_close(unet(*inputs).sample, base, rtol=0, atol=0)
    adapters = {n: p for n, p in unet.named_parameters() if ".student." in n}
    blocks = [n for n, m in unet.named_modules() if isinstance(m, UNetBlock)]
    assert all(f"{block}.{layer}.lora_A.student.weight" in adapters for block in blocks for layer in ("conv0", "conv1", "affine"))
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted = unet(*inputs).sample
    assert (adapted - base).abs().max() > 1e-2
    adapted.sum().backward()
    assert {n for n, p in unet.named_parameters() if p.grad is not None and p.requires_grad} == set(adapters)
    unet.save_lora_adapter(tmp_path, "student")
    unet.delete_adapters("student")
    unet.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
    assert_close(unet.double()(*inputs).sample, adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load(tmp_path, unet, inputs, low_cpu_mem_usage):
    """Resample filters are no weights, and are there again after loading without initialising."""
    unet.eval().save_pretrained(tmp_path)
    loaded = EDMUNet.from_pretrained(tmp_path, dtype=torch.float64, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(loaded, ModelMixin)
    keys = {k for k in unet.config if not k.startswith("_")}
    assert {k: loaded.config[k] for k in keys} == {
        k: list(v) if isinstance(v, tuple) else v for k in keys for v in [unet.config[k]]
    }
    assert not any("kernel" in n for n in loaded.state_dict())
    assert_close(loaded(*inputs).sample, unet(*inputs).sample, rtol=0, atol=0)


def test_half_precision_weights(unet, inputs):
    """Everything that is not the noise level is computed in the weights' own precision."""
    half = copy.deepcopy(unet).bfloat16()
    x, time, labels, augment = inputs
    out = half(x.bfloat16(), time.float(), labels, None if augment is None else augment.float()).sample
    assert out.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(out.double().flatten(), unet(*inputs).sample.flatten(), 0) > 0.99


def test_wrong_labels_and_configurations(unet, inputs):
    x, time, _, augment = inputs
    with pytest.raises(ValueError, match=r"class_labels have shape \(5, 6\); expected \(5, 7\), or \(5,\) integers"):
        unet(x, time, torch.zeros(5, 6), augment)
    plain = EDMUNet(sample_size=12, in_channels=2, **SMALL["ncsnpp"]).double()
    with pytest.raises(ValueError, match=r"unconditional network \(num_classes=0\)"):
        plain(x, time, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a network without them \(augment_dim=0\)"):
        plain(x, time, augment_labels=torch.zeros(5, 9))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"architecture": "unet"}, "architecture is 'unet'; expected one of song, adm"),
        ({"embedding_type": "sine"}, "embedding_type is 'sine'; expected one of positional, fourier"),
        ({"encoder_type": "dense"}, "encoder_type is 'dense'; expected one of standard, skip, residual"),
        ({"sample_size": 18}, r"sample_size 18 must be a multiple of 2\^\(levels-1\) = 4"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter \[1, 2, 1\] must have an even number of taps"),
        ({"model_channels": 10}, "model_channels 10 must be a multiple of 4"),
        ({"architecture": "adm", "encoder_type": "skip"}, "encoder_type is 'skip'; architecture 'adm' has 'standard'"),
        ({"architecture": "adm", "resample_filter": [1, 3, 3, 1]}, r"resample_filter is \[1, 3, 3, 1\]; architecture 'adm' has"),
    ],
)
def test_configurations_of_no_network(config, match):
    with pytest.raises(ValueError, match=match):
        EDMUNet(**config)


def test_box_filter_is_the_convolution(randn):
    """Average pooling and repetition are what the filter [1, 1] does."""
    x = randn(2, 3, 4, 6)
    for up in (True, False):
        box = Resample((1, 1), up).double()
        expected = box(x)
        box.box = False
        assert_close(box(x), expected, rtol=1e-12, atol=1e-12)


def test_initial_weights():
    """Song: Glorot-uniform, biases zero, ends of branches scaled by 1e-5; ADM: ends zero, class embeddings of variance one."""
    torch.manual_seed(0)
    song = EDMUNet(num_classes=11, augment_dim=9, model_channels=64)
    for name, parameter in song.named_parameters():
        if parameter.ndim > 1:
            area = parameter[0, 0].numel()
            bound = math.sqrt(6 / (area * (parameter.shape[0] + parameter.shape[1])))
            last = name.split(".")[-2]
            bound *= 1e-5 if last in ("conv1", "proj", "conv_out") else math.sqrt(0.2) if last == "qkv" else 1
            assert 0.9 * bound < parameter.abs().max() <= bound * (1 + 1e-6), name
        elif "norm" not in name:
            assert not parameter.any(), name
    adm = EDMUNet(num_classes=500, augment_dim=9, **ARCHITECTURES["adm"] | {"model_channels": 64, "num_blocks": 1})
    weights = adm.state_dict()
    assert abs(float(weights["map_label.weight"].std()) - 1) < 0.01
    zero = [n for n, w in weights.items() if n.split(".")[-2] in ("conv1", "proj", "conv_out", "map_augment")]
    assert not any(weights[n].any() for n in zero)
    assert not adm(torch.randn(2, 3, 32, 32), torch.randn(2)).sample.any()


def test_second_decoder_and_copies(unet, inputs, randomise):
    """On the features of the first, with its last weights, it is the network; a copy with other outputs is, too."""
    made = unet(*inputs, return_features=True)
    assert torch.equal(made.sample, unet(*inputs).sample)
    for part in (second_decoder(unet.dec, 11).double(), with_outputs(unet, 11).double()):
        assert all(p.requires_grad for p in part.parameters())
        out = part(made.features) if part is not unet and not isinstance(part, EDMUNet) else part(*inputs).sample
        assert out.shape == (5, 11, 12, 12)
        assert not out.any()
        assert part.out_channels == 11
        with torch.no_grad():
            for mine, theirs in zip(part.conv_out.parameters(), unet.conv_out.parameters(), strict=True):
                mine[-3:] = theirs
        out = part(made.features) if not isinstance(part, EDMUNet) else part(*inputs).sample
        assert_close(out[:, -3:], made.sample, rtol=1e-12, atol=1e-12)
    assert {p.data_ptr() for p in unet.parameters()}.isdisjoint(p.data_ptr() for p in second_decoder(unet.dec, 2).parameters())
