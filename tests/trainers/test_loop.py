"""One update of the loop on networks of a few numbers: losses in one piece and in parts, and what is reported of them."""

import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pipelines.common.errors import UserError
from trainers.config.networks import Optimizer
from trainers.config.run import Run
from trainers.engine.draws import DrawSource
from trainers.engine.loop import Trainer
from trainers.objectives.base import LossTerms, Phase

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Tiny:
    """An objective of one linear network with the loss that it is given, loss(network, draw)."""

    frozen, warmup, health, needs_data, state = {}, (), (), False, {}

    def __init__(self, loss, observe=None) -> None:
        torch.manual_seed(0)
        self.networks = {"student": nn.Linear(6, 5)}
        self.seen = []
        self.phases = (Phase("joint", ("student",), lambda draw, context: loss(self.networks["student"], draw), observe=observe),)


def update(loss, folder, micro: int | None = None, observe=None) -> tuple[dict[str, float], list[torch.Tensor]]:
    """(values of one update, the weights after it)."""
    objective = Tiny(loss, observe)
    run = Run(output_dir=str(folder), steps=2, batch_size=12, micro_batch_size=micro)
    draws = DrawSource(0, 12, (1, 2, 3), torch.device("cpu"), micro_batch_size=micro)
    optimizers = {"student": Optimizer(lr=0.1, eps=1e-3)}
    trainer = Trainer(run, Accelerator(cpu=True), objective, "student", optimizers, draws, print, print, print)
    values = trainer._update(objective.phases[0], ("step", 0, "joint", 0))
    return values, [p.detach().clone() for p in objective.networks["student"].parameters()]


def pieces(network: nn.Module, draw) -> list[LossTerms]:
    out = network(draw.z.flatten(1))
    first, second = out.square().sum(1), torch.exp(network(draw.eps.flatten(1))).sum(1)
    some = LossTerms(first, {"both": first.mean(), "first": torch.tensor(3.0)})
    return [some, LossTerms(second, {"both": second.mean(), "second": second.max()}), LossTerms(0.1 * first[:1], {})]


def in_parts(network: nn.Module, draw):
    yield from pieces(network, draw)


def in_one_piece(network: nn.Module, draw) -> LossTerms:
    first, second, third = pieces(network, draw)
    metrics = {"both": first.metrics["both"] + second.metrics["both"], "first": torch.tensor(3.0)}
    return LossTerms(first.loss + second.loss + third.loss, metrics | {"second": second.metrics["second"]})


@pytest.mark.parametrize("micro", [None, 4])
def test_a_loss_in_parts_is_the_sum_of_them(micro, tmp_path):
    """The same step, loss, gradient norm and metrics; a part may hold fewer samples, its mean counts all the same."""

    def each_alone(network, draw):
        for i in range(3):
            yield pieces(network, draw)[i]  # a graph of its own for each part

    whole_values, whole = update(in_one_piece, tmp_path, micro)
    values, weights = update(each_alone, tmp_path, micro)
    assert values.keys() == whole_values.keys()
    assert values == pytest.approx(whole_values, rel=1e-5)
    for a, b in zip(weights, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = [p.detach() for p in Tiny(None).networks["student"].parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(weights, before, strict=True)) > 0.01


def test_what_parts_report(tmp_path):
    """A metric is the sum over the parts that name it, averaged over micro-batches."""
    values, _ = update(lambda network, draw: (pieces(network, draw)[i] for i in range(3)), tmp_path, 4)
    network = Tiny(None).networks["student"]
    draws = DrawSource(0, 12, (1, 2, 3), torch.device("cpu"), micro_batch_size=4).batch(("step", 0, "joint", 0), 0.0)
    seen = [pieces(network, draw) for draw in draws]
    assert values["joint/first"] == pytest.approx(3.0)
    assert values["joint/both"] == pytest.approx(sum(p.metrics["both"].item() for parts in seen for p in parts[:2]) / 3, rel=1e-5)
    assert values["joint/second"] == pytest.approx(sum(parts[1].metrics["second"].item() for parts in seen) / 3, rel=1e-5)
    assert values["joint/loss"] == pytest.approx(sum(p.loss.mean().item() for parts in seen for p in parts) / 3, rel=1e-5)


def test_a_part_is_freed_before_the_next_is_built(tmp_path):
    """What the backward pass of one part needs is gone when the generator goes on; the network's gradient is there."""
    alive, gradients = [], []

    def loss(network, draw):
        for _ in range(3):
            saved = network(draw.z.flatten(1))  # a square keeps what it is taken of for its backward pass
            reference, part = weakref.ref(saved), saved.square().sum(1)
            del saved
            alive.append(reference() is not None)
            yield LossTerms(part, {"size": part.mean()})
            alive.append(reference() is not None)
            gradients.append(network.weight.grad.clone())

    update(loss, tmp_path, 6)
    assert alive == [True, False] * 6
    for i, gradient in enumerate(gradients[:3]):
        torch.testing.assert_close(gradient, gradients[0] * (i + 1))


def test_parts_are_computed_under_autocast_and_differentiated_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = []

    def loss(network, draw):
        for _ in range(2):
            out = network(draw.z.flatten(1))
            out.register_hook(lambda gradient: seen.append(("backward", torch.is_autocast_enabled("cpu"))))
            seen.append((str(out.dtype), torch.is_autocast_enabled("cpu")))
            yield LossTerms(out.float().sum(1), {})

    update(loss, tmp_path)
    assert seen == [("torch.bfloat16", True), ("backward", False)] * 2


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("loss", [in_one_piece, in_parts])
def test_observe_gets_averaged_numbers(loss, micro, tmp_path):
    """Once for each update, plain numbers: the means that are logged."""
    observed = []

    def in_parts_anew(network, draw):
        return (pieces(network, draw)[i] for i in range(3))

    values, _ = update(in_parts_anew if loss is in_parts else loss, tmp_path, micro, observed.append)
    (numbers,) = observed
    assert all(isinstance(v, float) for v in numbers.values())
    assert {"loss", "both", "first", "second"} <= numbers.keys()
    assert {f"joint/{n}": v for n, v in numbers.items()}.items() <= values.items()


def test_a_batch_that_does_not_fit_in_memory_is_said(tmp_path):
    """With the keys that mend it, whichever of a CPU and a GPU is full."""
    objective = Tiny(in_one_piece)
    run = Run(output_dir=str(tmp_path / "out"), steps=2, batch_size=10**13)
    draws = DrawSource(0, 10**13, (1, 2, 3), torch.device("cpu"))
    trainer = Trainer(
        run, Accelerator(cpu=True), objective, "student", {"student": Optimizer(lr=0.1)}, draws, print, print, print
    )
    trainer.record = lambda start: {}
    with pytest.raises(UserError, match=r"out of memory at step 0: .*Set micro_batch_size .*gradient_checkpointing"):
        trainer.fit()
