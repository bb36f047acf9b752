"""One run in progress: its flow layer, its optimiser, its loss, and where it stands."""

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import lftpipe
from lftpipe import runs
from lftpipe.batch import Batch, BatchFields, BatchOrder, BatchReader
from lftpipe.config.loss import Stage, parse_loss, stage_starts
from lftpipe.config.settings import TrainSettings, loss_text
from lftpipe.device import cast_linear, resolve_compute_dtype
from lftpipe.errors import DivergenceError, RunError
from lftpipe.flow.objective import ErrorScale, Loss, walk_times
from lftpipe.flow.path import States
from lftpipe.flow.velocity import Velocity
from lftpipe.store import Store
from lftpipe.teacher.parts import Tail, load_layer, load_norm
from lftpipe.teacher.source import Teacher
from lftpipe.training import processes
from lftpipe.training.optimizer import Optimizer, gradient_norm
from lftpipe.training.terms import Problem, weighted_sum
from lftpipe.training.weights import WeightAverage


class Training:
    """A run between its first step and its last.

    Attributes
    ----------
    step
        Steps done.
    loss
        That of the last one, over all processes.
    """

    def __init__(
        self,
        run_folder: Path,
        settings: TrainSettings,
        store: Store,
        teacher: Teacher,
        block: tuple[int, int],
    ) -> None:
        self.folder, self.settings, self.store, self.teacher = run_folder, settings, store, teacher
        self.m, self.n = self.block = block
        self.device = torch.device(settings.device)
        self.compute_dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
        self.order = order_of(settings, store)
        self.reader = BatchReader(store, teacher, self.device)
        self.tokens_per_step = self.order.batch_size * store.context
        self.num_steps = math.ceil(settings.tokens / self.tokens_per_step)
        self.stages = parse_loss(loss_text(settings))
        self.stage_starts = stage_starts(self.stages, self.num_steps)
        self.flow = Velocity(
            load_layer(teacher, self.m),
            teacher.width,
            time=settings.objective != "regression",
            source=settings.condition == "source",
            step=settings.condition == "step",
        ).to(self.device)
        self.flow.eval().requires_grad_(True)  # a teacher's dropout is not for us
        self.optimizer = Optimizer(self.flow, settings)
        norm = load_norm(teacher, self.n).to(self.device) if settings.loss_scale == "norm" else None
        self.scale = ErrorScale(settings.loss_scale, self._channel_variance(), norm, processes.mean)
        through_logits = any({"logits", "top-logits"} & stage.weights.keys() for stage in self.stages)
        self.tail = self._load_tail() if through_logits else None
        self.weights = WeightAverage(self.flow, settings.ema)
        self.step, self.loss, self.seconds, self.waited = 0, math.nan, 0.0, 0.0

    def _channel_variance(self) -> Tensor | None:
        """Of the target over the first sequences, for `--loss-scale channel`."""
        if self.settings.loss_scale != "channel":
            return None
        count = min(64, self.order.num_sequences)
        states = torch.from_numpy(self.store.read("train", self.n, range(count))).float()
        return states.flatten(0, 1).var(0).to(self.device)

    def _load_tail(self) -> Tail:
        tail = Tail(self.teacher, self.n)
        cast_linear(tail, self.compute_dtype)
        return tail.to(self.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def stage(self) -> Stage:
        """What the next step minimises."""
        return self.stages[self._stage_number(self.step)]

    def _stage_number(self, step: int) -> int:
        return max(
            i for i, start in enumerate(self.stage_starts[:-1]) if start <= min(step, self.num_steps - 1)
        )

    @property
    def stage_end(self) -> int:
        """The step at which the present stage ends."""
        return self.stage_starts[self._stage_number(self.step) + 1]

    @property
    def fields(self) -> BatchFields:
        """What the present stage looks at."""
        terms = self.stage.weights
        layers = tuple(range(self.m, self.n + 1)) if "trajectory" in terms else (self.m, self.n)
        attention = tuple(range(self.m, self.n)) if "branches" in terms else ()
        return BatchFields(layers, attention, "top-logits" in terms)

    def rate_share(self, step: int) -> float:
        """Of the peak learning rate: linear warm-up, then a cosine to a hundredth, over all stages."""
        warmup = max(1, round(self.settings.warmup * self.num_steps))
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, self.num_steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2

    def problem(self, batch: Batch, x_0: States | None = None, *, equal_steps: bool = False) -> Problem:
        """A batch with the random draws of its step, or with equal steps as at inference.

        Parameters
        ----------
        x_0
            Where to start; left out, from the stored `h[m]`.
        """
        x_0 = batch.states[self.m] if x_0 is None else x_0
        time = self.flow.modulation is not None
        steps = self.settings.walk_steps if time else 1
        generator = torch.Generator().manual_seed(self.settings.seed * 2_000_003 + batch.step)
        draws = torch.rand(steps, self.order.batch_size, generator=generator)
        draws = draws[:, batch.part].to(self.device)
        times = "equal" if equal_steps else self.settings.walk_times
        if times == "mixed":
            steps = int(torch.randint(1, steps + 1, (), generator=generator))
        grid = torch.linspace(0, 1, steps + 1, device=self.device)[:, None].expand(-1, len(x_0))
        return Problem(
            flow=self.flow,
            block=self.block,
            batch=batch,
            x_0=x_0,
            t=draws[0] if time else torch.zeros_like(draws[0]),
            time_grid=walk_times(draws[1:]) if times == "uniform" else grid,
            method=self.settings.solver if time else "euler",
            scale=self.scale,
            tail=self.tail,
        )

    def loss_of(self, batch: Batch, x_0: States | None = None) -> tuple[Loss, Problem]:
        """The present stage's loss, and the problem it was computed on."""
        with self.autocast():
            problem = self.problem(batch, x_0)
            return weighted_sum(problem, self.stage.weights), problem

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def apply(self, loss: Loss) -> float:
        """One step of the optimiser, whose gradients are there; the learning rate it was made with.

        Raises
        ------
        DivergenceError
            If loss or gradient is not finite.
        """
        processes.average_gradients(self.flow.parameters())
        norm = gradient_norm(list(self.flow.parameters()), self.settings.clip)
        self.loss = processes.mean(loss.detach()).item()
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            self._diverge(norm)
        learning_rate = self.optimizer.step(self.rate_share(self.step))
        self.step += 1
        self.weights.follow(self.step)
        if self.step in self.stage_starts[1:-1]:
            self.weights.forget_best()
        return learning_rate

    def _diverge(self, norm: float) -> NoReturn:
        """Leave a note beside the last checkpoint, from which the run may go on more carefully, and stop."""
        if processes.rank() == 0:
            runs.note_divergence(self.folder, self.step, self.optimizer.learning_rate)
        kept = (self.folder / runs.CHECKPOINT).exists()
        cure = (
            "--resume with a lower --learning-rate or --clip"
            if kept
            else "--force and a lower --learning-rate"
        )
        raise DivergenceError(
            f"loss {self.loss}, gradient norm {norm} at step {self.step} of {self.folder}",
            "finite ones",
            f"{'go on from its last checkpoint' if kept else 'start it again'} by {cure}",
        )

    @torch.no_grad()
    def nmse(self, batch: Batch, x_0: States | None = None) -> float:
        """Of the state the run would predict at inference (section 5.1)."""
        with self.autocast():
            end = self.problem(batch, x_0, equal_steps=True).end
        x_1 = batch.states[self.n]
        return ((end - x_1).square().sum() / x_1.square().sum()).item()

    def judge(self, held_back_loss: float) -> None:
        """Take note of an evaluation; end the run where the last stage has had no better one for long."""
        since_best = self.weights.judge(held_back_loss)
        in_last_stage = self.stage_end == self.num_steps
        if self.settings.patience and since_best >= self.settings.patience and in_last_stage:
            self.num_steps = self.step

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state(),
            "kept": self.weights.state(),
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.flow.load_state_dict(state["flow"])
        self.optimizer.restore(state["optimizer"])
        self.weights.restore(state["kept"])
        for name in ("step", "num_steps", "seconds", "waited"):
            setattr(self, name, state[name])
        if processes.rank() == 0:
            runs.drop_metrics_after(self.folder, self.step)

    def finish(self) -> dict[str, Any]:
        """Write weights and manifest; what to tell of the run."""
        self.weights.settle()
        shape = {
            "time": self.flow.modulation is not None,
            "shift": self.flow.shift,
            "source": self.flow.source is not None,
            "step": self.settings.condition == "step",
        }
        manifest = manifest_of(self.settings, self.store, self.block, shape)
        manifest["train_tokens"] = self.step * self.tokens_per_step
        if processes.rank() == 0:
            runs.save_run(self.folder, self.flow, manifest)
        return {
            "run": str(self.folder),
            "block": list(self.block),
            "objective": self.settings.objective,
            "steps": self.step,
            "train_tokens": self.step * self.tokens_per_step,
            "loss": self.loss,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.step * self.tokens_per_step / max(self.seconds, 1e-9), 1),
            "data_wait_share": round(self.waited / max(self.seconds, 1e-9), 4),
        }


def order_of(settings: TrainSettings, store: Store) -> BatchOrder:
    """Which sequences a run sees, in which order."""
    total = store.num_sequences("train")
    held_back = math.ceil(settings.hold_back * total)
    batch_size = max(1, settings.batch_tokens // store.context)
    if batch_size % processes.count():
        raise RunError(
            f"a batch of {batch_size} sequences for {processes.count()} processes",
            "a multiple of their number",
            "choose another --batch-tokens",
        )
    if held_back >= total:
        raise RunError(f"--hold-back {settings.hold_back:g} of {total} sequences", "some left", "lower it")
    return BatchOrder(
        batch_size=batch_size,
        seed=settings.seed,
        num_sequences=total - held_back,
        part=slice(processes.rank(), None, processes.count()),
    )


def manifest_of(
    settings: TrainSettings, store: Store, block: tuple[int, int], velocity: dict[str, bool]
) -> dict[str, Any]:
    """What a finished run says of itself."""
    return {
        "store_fingerprint": store.fingerprint,
        "store_origin": store.origin,
        "store": str(store.path.resolve()),
        "teacher": store.identity["teacher"],
        "block": list(block),
        "objective": settings.objective,
        "loss": None if settings.objective == "linear" else loss_text(settings),
        "solver": settings.solver if velocity["time"] else "euler",
        "walk_steps": settings.walk_steps if velocity["time"] else 1,
        "seed": settings.seed,
        "optimizer": settings.optimizer,
        "compute_dtype": settings.compute_dtype,
        "velocity": velocity,
        "versions": {"lftpipe": lftpipe.__version__, "torch": torch.__version__},
    }
