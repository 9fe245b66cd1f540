"""PointNet: its function written out, its parts, and the authors' network of points read from their file."""

import json
import math
import pickle
import zipfile

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipelines.adapters import AdapterHead, SharedNetwork, whole_copy
from pipelines.edm import EDMPipeline, EDMScheduler, PointNet
from pipelines.edm.conversion.convert import convert
from pipelines.edm.conversion.pickles import SnapshotError
from pipelines.edm.features import second_decoder, with_outputs

B, D, WIDTH = 7, 3, 11


@pytest.fixture
def net(randomise) -> PointNet:
    return randomise(PointNet(in_channels=D, out_channels=5, width=WIDTH, layers=5, frequencies=2))


def written_out(net: PointNet, x: Tensor, time: Tensor) -> Tensor:
    w, x = net.state_dict(), x.flatten(1)
    h = torch.cat([x, *(f(math.pi / 2 * k * x) for k in (1, 2) for f in (torch.cos, torch.sin)), time[:, None]], 1)
    for name in ("enc.0", "enc.1", "enc.2", "dec.layers.0", "dec.layers.1"):
        h = h @ w[f"{name}.linear.weight"].T + w[f"{name}.linear.bias"]
        h = h * torch.sigmoid(h)
    return h @ w["dec.conv_out.weight"].flatten(1).T + w["dec.conv_out.bias"]


def test_is_what_it_says(net, randn):
    x, time = randn(B, D, 1, 1), randn(B)
    out = net(x, time).sample
    assert out.shape == (B, 5, 1, 1)
    assert_close(out.flatten(1), written_out(net, x, time), rtol=1e-12, atol=1e-12)


def test_untrained_it_gives_zero(randn):
    assert not PointNet(width=WIDTH)(randn(B, 2, 1, 1).float(), torch.ones(B)).sample.any()


def test_a_second_decoder_reads_the_same_features(net, randn):
    """And so does a copy with other outputs; both start at zero and have weights of their own."""
    x, time = randn(B, D, 1, 1), randn(B)
    features = net(x, time, return_features=True).features
    second, copied = second_decoder(net.dec, 4), with_outputs(net, 4)
    assert not second(features).any()
    with torch.no_grad():
        second.conv_out.weight.copy_(net.dec.conv_out.weight[:4])
        second.conv_out.bias.copy_(net.dec.conv_out.bias[:4])
        copied.dec.conv_out.load_state_dict(second.conv_out.state_dict())
    assert_close(second(features), net(x, time).sample[:, :4], rtol=1e-12, atol=1e-12)
    assert_close(copied(x, time).sample, net(x, time).sample[:, :4], rtol=1e-12, atol=1e-12)


def test_adapters(randn):
    """LoRA on all layers starts as the network, is trained alone, and has a head of its own for a posterior."""
    from peft import LoraConfig

    net = PointNet(in_channels=D, out_channels=D, width=WIDTH)
    nn.init.normal_(net.conv_out.weight)
    x, time = randn(B, D, 1, 1).float(), randn(B).float()
    before = net(x, time).sample
    role = SharedNetwork(net).add_adapter("student", LoraConfig(r=2, target_modules=["linear", "conv_out"]))
    assert_close(role(x, time), before, rtol=0, atol=0)
    for name, parameter in role.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert (role(x, time) - before).abs().max() > 0.1
    assert AdapterHead(role, 4)(x, time).shape == (B, 4, 1, 1)
    assert_close(whole_copy(net)(x, time).sample, before, rtol=0, atol=0)


def test_recomputing_gives_the_same_gradients(net, randn):
    x, time = randn(B, D, 1, 1), randn(B)
    gradients = []
    for again in (False, True):
        if again:
            net.enable_gradient_checkpointing()
        net.zero_grad()
        net(x, time).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [{"layers": 1}, {"sample_size": 8}, {"num_classes": 3}])
def test_for_points_alone(wrong):
    with pytest.raises(ValueError, match="points without classes"):
        PointNet(**wrong)
    with pytest.raises(ValueError, match="unconditional network"):
        PointNet(width=WIDTH)(torch.zeros(B, 2, 1, 1), torch.ones(B), class_labels=torch.zeros(B, dtype=torch.long))


def test_a_pipeline_gives_points_as_they_are(tmp_path):
    """output_type latent: x0, neither clamped nor moved; stored and loaded again, the same bits."""
    torch.manual_seed(0)
    net = PointNet(width=WIDTH)
    nn.init.normal_(net.conv_out.weight)
    scheduler = EDMScheduler(sigma_data=20.0, sigma_max=30.0, sampler="renoise", num_inference_steps=1)
    pipeline = EDMPipeline(net, scheduler)
    z = torch.randn(B, 2, 1, 1)
    points = pipeline(latents=z, output_type="latent").images
    level = pipeline.denoiser().schedule.level(torch.full((B,), 30.0))
    assert_close(points, pipeline.denoiser()(30 * z, level), rtol=1e-6, atol=1e-5)
    assert points.abs().max() > 2
    pipeline.save_pretrained(tmp_path / "net")
    assert torch.equal(EDMPipeline.from_pretrained(tmp_path / "net")(latents=z, output_type="latent").images, points)


# The authors' file ---------------------------------------------------------------------------------------------------------


def theirs(width: int = WIDTH, d: int = 2, layers: int = 4) -> nn.Sequential:
    """Sees x and, once for each dimension, sigma."""
    torch.manual_seed(3)
    sizes = [2 * d, *[width] * layers]
    hidden = [m for i in range(layers) for m in (nn.Linear(sizes[i], sizes[i + 1]), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, d))


def saved(net: nn.Sequential, file) -> None:
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, file)


@pytest.mark.parametrize(("d", "layers"), [(2, 4), (3, 5)])
def test_the_authors_network(d, layers, tmp_path, randn):
    net = theirs(d=d, layers=layers)
    saved(net, tmp_path / "net.pth")
    made = convert(tmp_path / "net.pth", tmp_path / "teacher")
    assert made.parameters == sum(p.numel() for p in net.parameters()) - WIDTH * (d - 1)
    pipeline = EDMPipeline.from_pretrained(tmp_path / "teacher")
    x, sigma = 20 * randn(B, d).float(), torch.linspace(0.1, 20, B)
    x0 = pipeline.denoiser()(x[:, :, None, None], pipeline.denoiser().schedule.level(sigma)).flatten(1)
    expected = net(torch.cat([x, sigma[:, None].expand(-1, d)], 1))
    assert_close(x0, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "teacher/scheduler/scheduler_config.json").read_text())["sigma_max"] == 20.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("net.2.bias"), "expected a weight and a bias of net.0, net.2"),
        (
            lambda t: t.update({"net.2.weight": torch.zeros(WIDTH, WIDTH + 1)}),
            r"'net.2.weight' is \(11, 12\); expected",
        ),
        (lambda t: t.update({"net.8.bias": torch.tensor([0.0, torch.nan])}), "'net.8.bias' holds NaN"),
        (lambda t: t.update({"net.0.weight": torch.zeros(WIDTH, 3)}), r"'net.0.weight' is \(11, 3\); expected \(11, 4\)"),
    ],
)
def test_a_file_that_does_not_fit(damage, message, tmp_path):
    tensors = {f"net.{k}": v for k, v in theirs().state_dict().items()}
    damage(tensors)
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(SnapshotError, match=message):
        convert(tmp_path / "net.pth", tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


class Hostile:
    def __reduce__(self):
        return print, ("this was run",)


def test_nothing_in_it_is_run(tmp_path, capsys):
    saved(theirs(), tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        for name, data in held.items():
            archive.writestr(name, pickle.dumps({"net.0.weight": Hostile()}) if name.endswith("data.pkl") else data)
    with pytest.raises(SnapshotError, match="print"):
        convert(tmp_path / "bad.pth", tmp_path / "teacher")
    assert "this was run" not in capsys.readouterr().out
