"""Optimisers with 8-bit moments: near those with 32 bits, a quarter of their memory, and resumable bit for bit."""

import pytest
import torch
from torch import nn

from trainers.config import networks as config_networks
from trainers.config.networks import Optimizer
from trainers.engine import checkpoint
from trainers.engine.optimizers import build_optimizer


def network() -> nn.Module:
    """Two convolutions large enough for 8-bit moments (4,096 weights), in the trainer's layout, and biases that are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(31, 43, 3), nn.Tanh(), nn.Conv2d(43, 97, 1)).to(memory_format=torch.channels_last)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One update towards the identity's response to noise that depends on `number` alone."""
    x = torch.randn(2, 31, 7, 5, generator=torch.Generator().manual_seed(number)).to(memory_format=torch.channels_last)
    optimizer.zero_grad()
    (net(x) - x[:, :1, 1:-1, 1:-1]).square().mean().backward()
    optimizer.step()


def trained(bits: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network()
    optimizer = build_optimizer(net.parameters(), Optimizer(lr=1e-3, betas=(0.9, 0.99), bits=bits))
    for number in range(steps):
        step(net, optimizer, number)
    return net, optimizer


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim() > 1)


def test_eight_bit_moments_do_what_32_bits_do_in_a_quarter_of_the_memory():
    (full, big), (small, little), start = trained(32, 30), trained(8, 30), network()
    for mine, theirs, before in zip(small.parameters(), full.parameters(), start.parameters(), strict=True):
        moved, apart = float((theirs - before).detach().norm()), float((mine - theirs).detach().norm())
        assert apart < 0.1 * moved
        assert apart > 0
    weights = sum(p.numel() for p in start.parameters() if p.dim() > 1)
    assert 4 * moment_bytes(little) == moment_bytes(big) == 8 * weights


@pytest.mark.parametrize("bits", [8, 32])
def test_an_optimiser_goes_on_from_a_checkpoint_bit_for_bit(bits, tmp_path):
    """Through the files, whose tensors are contiguous while moments follow their weight's layout."""
    whole, _ = trained(bits, 9)
    net, optimizer = trained(bits, 5)
    tensors = {
        "networks": checkpoint.network_tensors({"student": net}),
        "optimizers": checkpoint.optimizer_tensors({"student": optimizer}, {"student": net}),
    }
    checkpoint.save(tmp_path, 5, tensors, {}, {}, logs=[], keep=1)
    saved, _ = checkpoint.load(checkpoint.list_checkpoints(tmp_path)[-1])
    resumed = network()
    again = build_optimizer(resumed.parameters(), Optimizer(lr=1e-3, betas=(0.9, 0.99), bits=bits))
    checkpoint.restore_tensors(checkpoint.network_tensors({"student": resumed}), saved["networks"], "here")
    checkpoint.restore_optimizers({"student": again}, {"student": resumed}, saved["optimizers"], "here")
    for mine, theirs in zip(resumed.parameters(), net.parameters(), strict=True):
        assert {k: type(v) for k, v in again.state[mine].items()} == {k: type(v) for k, v in optimizer.state[theirs].items()}
    for number in range(5, 9):
        step(resumed, again, number)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_missing_library_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr(config_networks, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"bits: 8 needs bitsandbytes, which is not installed; pip install -e \"\.\[8bit\]\", or use 32"
    ):
        Optimizer(lr=1e-3, bits=8)
    Optimizer(lr=1e-3)
