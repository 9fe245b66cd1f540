"""What is asked of peft, public and private: pipelines/peft_layers.py is the one place that reaches into it."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from pipelines.peft_layers import layers_with_adapters, of_adapter, of_adapters, own_layer, own_name, switch

ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(5, 3), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x)[:, :, None, None])


@pytest.fixture
def net(generator) -> Net:
    """Two adapters on both layers, all weights random."""
    net = Net()
    for name in ("student", "aux"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear", "conv"]), net, name)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(of_adapters(key))
    return net


def test_names(net):
    plain = Net()
    own = {own_name(key) for key, _ in net.named_parameters() if not of_adapters(key)}
    assert own == {key for key, _ in plain.named_parameters()}
    for name in ("student", "aux"):
        assert sum(of_adapter(key, name) for key, _ in net.named_parameters()) == 4
    layers = layers_with_adapters(net)
    assert layers == {"linear": net.linear, "conv": net.conv}
    assert [set(layer.r) for layer in layers.values()] == [{"student", "aux"}] * 2
    assert type(own_layer(net.linear)) is nn.Linear
    assert own_layer(plain.linear) is plain.linear


def test_a_switch_chooses_what_runs_and_nothing_else(net, generator):
    """No adapter, or one alone: the layers' own products and those of that adapter, by hand."""
    x, parts = torch.randn(4, 5, generator=generator), dict(net.named_parameters())
    before = {key: (p.requires_grad, p.clone()) for key, p in parts.items()}

    def by_hand(name: str | None) -> Tensor:
        h = x
        for layer in ("linear", "conv"):
            weight = parts[f"{layer}.base_layer.weight"].flatten(1)
            if name is not None:
                a, b = (parts[f"{layer}.lora_{part}.{name}.weight"].flatten(1) for part in "AB")
                weight = weight + 4 * b @ a  # alpha / rank: peft's default alpha is 8
            h = h @ weight.T + parts[f"{layer}.base_layer.bias"]
        return h[:, :, None, None]

    for name in (None, "student", "aux", "student", None):
        switch(layers_with_adapters(net).values(), name)
        torch.testing.assert_close(net(x), by_hand(name), rtol=1e-5, atol=1e-4)
        assert all(p.requires_grad == before[key][0] and torch.equal(p, before[key][1]) for key, p in parts.items())


def test_a_backward_pass_finds_its_graph_after_a_switch(net, generator):
    layers, x = list(layers_with_adapters(net).values()), torch.randn(4, 5, generator=generator)
    switch(layers, "student")
    loss = net(x).square().sum()
    switch(layers, "aux")
    loss.backward()
    for key, parameter in net.named_parameters():
        assert (parameter.grad is not None) == of_adapter(key, "student"), key


def test_nothing_else_reaches_into_peft():
    private = re.compile(r"_disable_adapters|_active_adapter\b|BaseTunerLayer|\.base_layer\b")
    files = [
        f for folder in ("pipelines", "trainers", "eval") for f in (ROOT / folder).rglob("*.py") if f.name != "peft_layers.py"
    ]
    assert len(files) > 100
    code = {f: "\n".join(line.partition("#")[0] for line in f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert not [str(f) for f, text in code.items() if private.search(text)]
