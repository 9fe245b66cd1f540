"""The one training loop. It knows phases, networks by role and optimisers, and no objective by name.

One step runs every phase of the objective once (or `repeats` times): draw, accumulate over micro-batches, average over
processes, check, clip, step. EMA and the step counter follow the updates of the primary network (the student), the learning rate
of each network the updates that it has made itself, its warm-up among them.

Gradients are averaged over processes by one all-reduce of a flat vector instead of a DistributedDataParallel wrapper: phases
call several networks, and the same network several times, in ways the wrapper cannot follow.
"""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from pipelines.common import atomic
from pipelines.common.errors import UserError
from pipelines.common.launch import on_main
from pipelines.common.lock import FolderLock
from pipelines.common.reading import reason_of

from ..config.networks import Optimizer as OptimizerConfig
from ..config.run import Run
from ..objectives.base import Draw, LossTerms, Objective, Phase
from . import checkpoint, resume
from .draws import DrawSource
from .ema import Ema, constant_decay, halflife_decay, trained_parameters
from .log import RunLog
from .optimizers import build_optimizer, learning_rate
from .pictures import Pictures, Watch
from .resume import Start

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # asked to stop; interrupted; the terminal was closed


@runtime_checkable
class Recomputable(Protocol):
    """A network that can compute its blocks again in backward instead of keeping what is inside them."""

    def enable_gradient_checkpointing(self) -> None: ...


@runtime_checkable
class Compilable(Protocol):
    """A network that says which of its blocks are worth compiling."""

    def compile_repeated_blocks(self, **options: Any) -> None: ...


class NonFiniteError(UserError):
    """A loss or gradient is NaN or infinite; raised on every process before any weight has changed."""


class Trainer:
    """record(start) is called once, when the run is known to be able to start: before that nothing is written. It returns what is
    new in the run's environment.

    primary: the role whose EMA is kept and exported; optimizers: a config for each trained role.

    preview() gives pictures (n, c, h, w) in [0, 1] and export(folder, info) writes the model, both called with the EMA weights in
    place: preview on every process, since where weights are sharded none can run a network alone. watch and page: see Pictures.
    evaluate(step) gives numbers of it for the log, called likewise every evaluate_every steps. The result goes
    to <output_dir>/<primary>/, a snapshot every run.snapshot_every steps to <output_dir>/snapshots/step_<step>/.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        objective: Objective,
        primary: str,
        optimizers: dict[str, OptimizerConfig],
        draws: DrawSource,
        preview: Callable[[], Tensor],
        export: Callable[[Path, dict], None],
        record: Callable[[Start], list[str]],
        evaluate: Callable[[int], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        watch: Watch | None = None,
        page: Callable[[str, int], None] | None = None,
    ) -> None:
        self.run, self.accelerator, self.objective, self.primary = run, accelerator, objective, primary
        self.draws, self.export, self.record = draws, export, record
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.output = Path(run.output_dir)
        self.networks = objective.networks
        for network in (*self.networks.values(), *objective.frozen.values()):
            network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes both
        for network in objective.frozen.values():
            network.requires_grad_(False)
        if run.gradient_checkpointing:
            for module in (m for network in self.networks.values() for m in network.modules()):
                if isinstance(module, Recomputable):
                    module.enable_gradient_checkpointing()
        if run.compile:
            compile_blocks((*self.networks.values(), *objective.frozen.values()), run.compile)
        self.parameters = {role: list(trained_parameters(net).values()) for role, net in self.networks.items()}
        if accelerator.num_processes > 1:
            for parameter in (p for group in self.parameters.values() for p in group):
                parameter.data = broadcast(parameter.data)
        self.optimizer_configs = optimizers
        self.optimizers = {role: build_optimizer(self.parameters[role], c) for role, c in optimizers.items()}
        decay = halflife_decay(run.ema_halflife, run.batch_size) if run.ema_halflife else constant_decay(run.ema_decay)
        self.ema = Ema(self.networks[primary], decay)
        self.step = self.warmup_done = 0
        self.warmup_updates = [(phase, i) for phase in objective.warmup for i in range(phase.repeats)]
        self.updates_done = self._updates_after(0, 0)
        self.updates_planned = self._updates_after(len(self.warmup_updates), run.steps)
        self.seconds = 0.0
        self.calls: Counter[str] = Counter()
        for role, network in (self.networks | objective.frozen).items():
            network.register_forward_pre_hook(self._counting(role), with_kwargs=True)
        self.log = RunLog(accelerator, self.output, run.steps, objective.health)
        self.pictures = Pictures(accelerator, self.output, self.log, self.ema, preview, watch, page)
        self._stop_requested = self._stop_agreed = False

    def _take(self, lock: FolderLock) -> None:
        """The output folder is this run's: what an interrupted one left half written in it is put right."""
        lock.acquire()
        resume.recover(self.output, self.primary)

    # The run ---------------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to run.steps. Returns False if a signal ended the run early, after saving; True if it is complete."""
        heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP, and so do we then
        previous = {s: signal.signal(s, self._on_signal) for s in heeded}
        lock = FolderLock(self.output)
        try:
            on_main(self.accelerator, lambda: self._take(lock))
            self._begin(self.restore())
            self._warm_up()
            while self.step < self.run.steps and not self._stop_agreed:
                self.one_step()
            complete = self.step >= self.run.steps
            if self.run.checkpoint_every or not complete:
                self._save()
            if self.step:
                self._export(self.output / self.primary)
            if self.run.sample_every:
                self.pictures.draw_page("complete" if complete else "stopped", self.step)
            if not complete:
                self.log.say(f"Stopped by a signal at step {self.step}; saved. Continue with resume=latest.")
            return complete
        except atomic.WriteError as error:
            raise atomic.WriteError(f"{error}. The run stopped at step {self.step}; {self._last_checkpoint()}.") from error
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            raise UserError(
                f"out of memory at step {self.step}: {reason_of(error)}. Set micro_batch_size (below batch_size, "
                f"{self.run.batch_size}), which changes no result, or gradient_checkpointing: true; {self._last_checkpoint()}."
            ) from error
        finally:
            self.log.bar.close()
            lock.release()
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _begin(self, start: Start) -> None:
        """Bring the folder to where the run starts, and say what that is."""
        self.accelerator.wait_for_everyone()  # every process has read what it goes on from
        set_aside: list[Path] = []

        def prepare() -> None:
            if resume.leaves_a_branch(self.output, start):
                set_aside.extend(resume.set_aside(self.output, start.step))
            self.log.rewind(start.checkpoint, start.step)

        on_main(self.accelerator, prepare)
        environment = self.record(start)
        for line in resume.report(start, self.run, environment, set_aside):
            self.log.say(line)

    def _warm_up(self) -> None:
        """Before the first step: levels that are annealed, and the EMA, stay where they are until then."""
        for phase, i in self.warmup_updates[self.warmup_done :]:
            if self._stop_agreed:
                return
            self.log.bar.set_description(f"warm-up {phase.name} {i + 1}/{phase.repeats}", refresh=False)
            self.log.bar.update(0)
            values = self._timed_update(phase, ("warmup", phase.name, i))
            self.warmup_done += 1
            if i + 1 == phase.repeats:
                rates = {name: rate for name, rate in self._rates().items() if name.removesuffix("/lr") in phase.updates}
                shown = ", ".join(f"{n} {v:.3g}" for n, v in (values | rates).items())
                self.log.say(f"warm-up of {phase.name} done: {shown}")
        if self.warmup_updates and self.step == 0 and self.run.checkpoint_every:
            self._save()
        self.log.bar.set_description("")

    def one_step(self) -> None:
        """All phases once, in order, then what is due at this step: evaluation, a line of the log, pictures, a checkpoint."""
        for phase in self.objective.phases:
            for repeat in range(phase.repeats):
                values = self._timed_update(phase, ("step", self.step, phase.name, repeat))
                self.log.add(values)
        self.step += 1
        run = self.run
        if self.evaluate and self.step % self.evaluate_every == 0:
            with self.ema.swapped():
                self.log.add({f"evaluation/{name}": value for name, value in self.evaluate(self.step).items()})
        if self.step % run.log_every == 0 or self.step == run.steps:
            self.log.write(self.step, self.seconds, self._rates())
        self.log.bar.update()
        sampled = run.sample_every and self.step % run.sample_every == 0
        if sampled:
            calls = self.calls.copy()
            self.pictures.draw(self.step)
            self.calls = calls  # drawing is no training
        if run.snapshot_every and self.step % run.snapshot_every == 0:
            self._export(self.output / "snapshots" / f"step_{self.step:08d}")
        if run.checkpoint_every and self.step % run.checkpoint_every == 0 and self.step < run.steps:
            self._save()
        if sampled and self.step < run.steps:
            self.pictures.draw_page("training", self.step)

    # One update ------------------------------------------------------------------------------------------------------

    def _timed_update(self, phase: Phase, key: tuple[int | str, ...]) -> dict[str, float]:
        start = time.perf_counter()
        values = self._update(phase, key)
        self.seconds += time.perf_counter() - start
        return values

    def _update(self, phase: Phase, key: tuple[int | str, ...]) -> dict[str, float]:
        """Accumulate, average, check, clip and step the networks of phase.updates."""
        draws = self.draws.batch(key, progress=self.step / self.run.steps)
        parameters = [p for role in phase.updates for p in self.parameters[role]]
        summed: dict[str, Tensor] = {}
        with self.accelerator.autocast():
            contexts = [None] * len(draws)
            if phase.prepare and len(draws) * self.accelerator.num_processes > 1:
                contexts = phase.prepare(draws, self.accelerator.gather)
        for draw, context in zip(draws, contexts, strict=True):
            torch.manual_seed(draw.seed)
            for loss, metrics in self._parts(phase, draw, context):
                mean = loss.mean() / len(draws)
                # `inputs` keeps the gradients of networks that this phase only passes through from being touched
                mean.backward(inputs=parameters)
                for name, value in ({"loss": mean} | {n: v / len(draws) for n, v in metrics.items()}).items():
                    summed[name] = summed.get(name, 0.0) + value.detach()
        values = self._average_over_processes(parameters, summed)
        if phase.observe:
            phase.observe(values)

        norms = {role: nn.utils.get_total_norm(_gradients(self.parameters[role])) for role in phase.updates}
        values |= {f"{role}_grad_norm": float(norm) for role, norm in norms.items()}
        self._check_finite(phase, values)
        for role in phase.updates:
            config = self.optimizer_configs[role]
            if config.clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters[role], config.clip, norms[role])
            for group in self.optimizers[role].param_groups:
                group["lr"] = learning_rate(config, self.updates_done[role], self.updates_planned[role])
            self.optimizers[role].step()
            self.optimizers[role].zero_grad()
            self.updates_done[role] += 1
            if role == self.primary:
                self.ema.update()
        return {f"{phase.name}/{name}": value for name, value in values.items()}

    def _parts(self, phase: Phase, draw: Draw, context: Any) -> Iterator[LossTerms]:
        """The parts of a loss, each computed under autocast when the one before has been differentiated."""
        with self.accelerator.autocast():
            terms = phase.loss(draw, context)
        if isinstance(terms, LossTerms):
            yield terms
            return
        while True:
            with self.accelerator.autocast():
                part = next(terms, None)
            if part is None:
                return
            yield part

    def _average_over_processes(self, parameters: list[nn.Parameter], scalars: dict[str, Tensor]) -> dict[str, float]:
        """Mean of gradients (in place) and scalars over processes; also lets all agree on a request to stop."""
        device = self.accelerator.device
        stop = torch.tensor(float(self._stop_requested), device=device)
        numbers = torch.stack([v.float().to(device) for v in (*scalars.values(), stop)])
        if self.accelerator.num_processes > 1:
            gradients = _gradients(parameters)
            flat = torch.cat([*(g.flatten().float() for g in gradients), numbers])
            flat = self.accelerator.reduce(flat, reduction="mean")
            sizes = [g.numel() for g in gradients]
            for gradient, mean in zip(gradients, flat[: -len(numbers)].split(sizes), strict=True):
                gradient.copy_(mean.view_as(gradient))
            numbers = flat[-len(numbers) :]
        *values, stop = numbers.tolist()
        self._stop_agreed = stop > 0
        return dict(zip(scalars, values, strict=True))

    def _check_finite(self, phase: Phase, values: dict[str, float]) -> None:
        bad = {name: v for name, v in values.items() if not math.isfinite(v) and (name == "loss" or "grad_norm" in name)}
        if bad:
            raise NonFiniteError(
                f"phase {phase.name!r} at step {self.step}: {', '.join(f'{n} = {v}' for n, v in bad.items())}. No weight was "
                f"changed; {self._last_checkpoint()}. Lower the learning rate or the clip threshold and go on with "
                "resume=latest, or start a new run with a higher lowest noise level."
            )

    def _last_checkpoint(self) -> str:
        saved = checkpoint.list_checkpoints(self.output / "checkpoints")
        return f"the last checkpoint is {str(saved[-1])!r}" if saved else "no checkpoint has been written"

    # Saving ----------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "networks": checkpoint.network_tensors(self.networks),
            "objective": self.objective.state,
            "ema": self.ema.average,
            "optimizers": checkpoint.optimizer_tensors(self.optimizers, self.networks),
        }

    def _save(self) -> None:
        def save() -> None:
            state = {
                "step": self.step,
                "warmup_done": self.warmup_done,
                "updates_done": dict(self.updates_done),
                "ema_updates": self.ema.updates,
                "seconds": self.seconds,
                "calls": dict(self.calls),
                "log": self.log.state,
            }
            folder, config = self.output / "checkpoints", self.run.model_dump(mode="json")
            checkpoint.save(folder, self.step, self._tensors(), state, config, self.log.files, self.run.keep_checkpoints)

        on_main(self.accelerator, save)

    def restore(self) -> Start:
        """Take up what run.resume means, if anything. Nothing is written."""
        start = resume.plan(self.run, self.primary)
        if start.checkpoint is None:
            return start
        path, source = start.checkpoint, str(start.checkpoint)
        tensors, state = checkpoint.load(path, explicit=self.run.resume != "latest")
        mine = self._tensors()
        checkpoint.restore_tensors(mine["networks"], tensors["networks"], source)
        checkpoint.restore_tensors(mine["objective"], tensors.get("objective", {}), source)
        checkpoint.restore_tensors(mine["ema"], tensors["ema"], source)
        checkpoint.restore_optimizers(self.optimizers, self.networks, tensors["optimizers"], source)
        self.step, self.warmup_done, self.seconds = state["step"], state["warmup_done"], state["seconds"]
        self.updates_done = Counter(state.get("updates_done") or self._updates_after(self.warmup_done, self.step))
        self.ema.updates, self.calls = state["ema_updates"], Counter(state["calls"])
        self.log.resume(state["log"], self.step)
        return start

    def _export(self, folder: Path) -> None:
        def export() -> None:
            calls = {role: n * self.accelerator.num_processes for role, n in sorted(self.calls.items())}
            with self.ema.swapped():
                self.export(folder, {"steps": self.step, "train_seconds": round(self.seconds, 2), "calls": calls})

        on_main(self.accelerator, export)

    # Small things ----------------------------------------------------------------------------------------------------

    def _updates_after(self, warmup_done: int, steps: int) -> Counter[str]:
        """By role, how often a network has been updated after so many updates of the warm-up and so many steps."""
        made = Counter(role for phase, _ in self.warmup_updates[:warmup_done] for role in phase.updates)
        for phase in self.objective.phases:
            made.update(dict.fromkeys(phase.updates, steps * phase.repeats))
        return made

    def _rates(self) -> dict[str, float]:
        """'<role>/lr' -> the rate of the network's last update."""
        return {f"{role}/lr": optimizer.param_groups[0]["lr"] for role, optimizer in self.optimizers.items()}

    def _counting(self, role: str):
        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.calls[role] += len(args[0]) * getattr(module, "calls_per_sample", 1)  # two with guidance

        return count

    def _on_signal(self, number: int, frame) -> None:
        """The first signal ends the run after its step. A second Ctrl-C ends it at once; a second SIGTERM does not, since several
        may pass on the same one (a scheduler and a launcher, say).
        """
        first, self._stop_requested = not self._stop_requested, True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if first:
            once_more = "; once more stops at once" if number == signal.SIGINT else ""
            self.log.say(f"{signal.Signals(number).name}: finishing the step and saving{once_more}.")


def compile_blocks(networks: Iterable[nn.Module], backend: str) -> None:
    """Compile what each network repeats: minutes less to compile than the whole, nearly as fast."""
    # one piece of code serves every width, adapter and mode of differentiation: each is a compilation of its own
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in dict.fromkeys(m for network in networks for m in network.modules()):
        if isinstance(module, Compilable):
            module.compile_repeated_blocks(backend=backend)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Each parameter's gradient; zeros where a phase did not reach it, so that all processes agree on the shapes."""
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients
