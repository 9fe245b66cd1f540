"""The optimiser of one role, and the learning rate as a pure function of how many updates its network has made."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config.networks import Optimizer as OptimizerConfig


def learning_rate(config: OptimizerConfig, done: int, total: int) -> float:
    """The rate of the update after `done` of a network's `total`: a pure function, which needs no state to resume."""
    warm = min(1.0, (done + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = {
        "constant": 1.0,
        "linear": 1 - done / total,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0))),
    }[config.schedule]
    return config.lr * warm * (config.final_ratio + (1 - config.final_ratio) * left)


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, fused; with bits=8 bitsandbytes' (Dettmers et al. 2021), whose moments take 2 bytes a weight instead of 8."""
    if config.bits == 32:
        return torch.optim.AdamW(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, config.lr, config.betas, config.eps, config.weight_decay)
