"""The training loop: batches in, a trained flow layer out, resumable at any checkpoint."""

import json
import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lftpipe
from lftpipe import feed, progress, runs
from lftpipe.compute import resolve_compute_dtype
from lftpipe.errors import RunError
from lftpipe.flow.linear import LeastSquares, LinearMap
from lftpipe.flow.objective import ErrorScale, flow_matching, flow_walking, hybrid, walk_times
from lftpipe.flow.path import LinearPath, PiecewiseLinearPath
from lftpipe.flow.solver import ODESolver
from lftpipe.flow.velocity import Velocity
from lftpipe.packing import positions
from lftpipe.settings import TrainSettings
from lftpipe.store import Store
from lftpipe.teacher.family import AttentionContext, attention_context
from lftpipe.teacher.parts import load_layer, load_rotary
from lftpipe.teacher.source import Teacher


@dataclass(frozen=True)
class Batch:
    """States of one training step: `states[l]` is `h[l]`, float32, on the device."""

    step: int
    states: dict[int, Tensor]
    context: AttentionContext


class Training:
    """One run in progress: model, optimiser, and where it stands."""

    def __init__(
        self,
        run_folder: Path,
        settings: TrainSettings,
        store: Store,
        teacher: Teacher,
        block: tuple[int, int],
    ) -> None:
        self.folder, self.settings, self.store, self.teacher = run_folder, settings, store, teacher
        self.m, self.n = block
        self.device = torch.device(settings.device)
        self.compute_dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
        self.batch_size = max(1, settings.batch_tokens // store.context)
        self.num_steps = math.ceil(settings.tokens / (self.batch_size * store.context))
        self.layers = (
            tuple(range(self.m, self.n + 1)) if settings.objective == "trajectory" else (self.m, self.n)
        )
        self.flow = Velocity(
            load_layer(teacher, self.m), teacher.width, time=settings.objective != "regression"
        ).to(self.device)
        self.flow.eval().requires_grad_(True)  # a teacher's dropout is not for us
        self.optimizer = self._make_optimizer()
        self.scale = ErrorScale(settings.loss_scale, self._channel_variance())
        self.rotary = load_rotary(teacher).to(self.device)
        self.step = 0
        self.loss = math.nan

    def _make_optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.flow.parameters() if p.ndim >= 2]
        vectors = [p for p in self.flow.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.95), fused=True)

    def _channel_variance(self) -> Tensor | None:
        """Of the target over the first sequences, for `--loss-scale channel`."""
        if self.settings.loss_scale != "channel":
            return None
        count = min(64, self.store.num_sequences("train"))
        states = torch.from_numpy(self.store.read("train", self.n, range(count))).float()
        return states.flatten(0, 1).var(0).to(self.device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a hundredth."""
        warmup = max(1, round(self.settings.warmup * self.num_steps))
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(1, self.num_steps - warmup)
        return self.settings.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)

    def batches(self) -> Iterator[Batch]:
        """Batches from step `self.step` on: a pure function of seed and step."""
        given = (self.layers, self.batch_size, self.settings.seed, self.settings.device)
        if self.settings.from_teacher:
            source = feed.from_teacher(self.store, self.teacher, *given)
        else:
            source = feed.from_cache(self.store, *given)
        for step, states, document in source(self.step):
            places = torch.from_numpy(positions(document)).long().to(self.device)
            yield Batch(step, states, attention_context(self.rotary, places))

    def loss_of(self, batch: Batch) -> Tensor:
        settings, context = self.settings, batch.context
        x_0, x_1 = batch.states[self.m], batch.states[self.n]
        generator = torch.Generator().manual_seed(settings.seed * 2_000_003 + batch.step)
        draws = torch.rand(settings.walk_steps, len(x_0), generator=generator).to(self.device)
        t, between = draws[0], draws[1:]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.flow(x, t, context)

        with self._autocast():
            match settings.objective:
                case "sfm":
                    return flow_matching(velocity, LinearPath(x_0, x_1).sample(t), x_1, self.scale)
                case "trajectory":
                    states = torch.stack([batch.states[l] for l in self.layers])  # noqa: E741
                    return flow_matching(velocity, PiecewiseLinearPath(states).sample(t), x_1, self.scale)
                case "fw":
                    return flow_walking(velocity, x_0, x_1, walk_times(between), settings.solver, self.scale)
                case "hybrid":
                    grid = walk_times(between)
                    return hybrid(velocity, x_0, x_1, grid, t, settings.solver, settings.alpha, self.scale)
                case _:  # regression: one evaluation, no time
                    return self.scale(x_0 + velocity(x_0, t) - x_1, x_1)

    def run(self) -> dict[str, Any]:
        if self.settings.resume:
            self._restore()
        started, seen, waited = time.monotonic(), 0, 0.0
        tokens_per_step = self.batch_size * self.store.context
        mode = "a" if self.step else "w"
        batches = self.batches()
        with (
            (self.folder / runs.METRICS).open(mode) as metrics,
            progress.task(
                f"train {self.folder.name}",
                self.num_steps * tokens_per_step,
                "tokens",
                done=self.step * tokens_per_step,
            ) as task,
        ):
            while self.step < self.num_steps:
                before = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - before
                learning_rate = self.learning_rate(self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                loss = self.loss_of(batch)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.settings.clip).item()
                self.loss = loss.item()
                if not (math.isfinite(self.loss) and math.isfinite(norm)):
                    raise RunError(
                        f"loss {self.loss}, gradient norm {norm} at step {self.step} of {self.folder}",
                        "finite ones",
                        "lower --learning-rate and start again with --force; the last checkpoint is kept",
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                seen += tokens_per_step
                task.advance(tokens_per_step, loss=f"{self.loss:.4f}")
                if self.step % self.settings.log_every == 0 or self.step == self.num_steps:
                    self._log(metrics, batch, learning_rate, time.monotonic() - started, waited)
                if self.step % self.settings.checkpoint_every == 0 and self.step < self.num_steps:
                    metrics.flush()
                    self._save_checkpoint()
        seconds = time.monotonic() - started
        self._finish()
        return {
            "run": str(self.folder),
            "block": [self.m, self.n],
            "objective": self.settings.objective,
            "steps": self.step,
            "train_tokens": self.step * tokens_per_step,
            "loss": self.loss,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(seen / max(seconds, 1e-9), 1),
            "data_wait_share": round(waited / max(seconds, 1e-9), 4),
        }

    @torch.no_grad()
    def _nmse(self, batch: Batch) -> float:
        """Of the state the run would predict at inference, on a training batch."""
        x_0, x_1 = batch.states[self.m], batch.states[self.n]
        method, k = (
            ("euler", 1) if self.flow.modulation is None else (self.settings.solver, self.settings.walk_steps)
        )
        with self._autocast():
            x = ODESolver(lambda x, t: self.flow(x, t, batch.context), method).sample(x_0, k)
        return ((x - x_1).square().sum() / x_1.square().sum()).item()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def _log(self, metrics: Any, batch: Batch, learning_rate: float, seconds: float, waited: float) -> None:
        row = {
            "step": self.step,
            "tokens": self.step * self.batch_size * self.store.context,
            "loss": self.loss,
            "nmse": self._nmse(batch),
            "learning_rate": learning_rate,
            "seconds": round(seconds, 3),
            "data_wait_seconds": round(waited, 3),
        }
        metrics.write(json.dumps(row) + "\n")

    def _save_checkpoint(self) -> None:
        path = self.folder / runs.CHECKPOINT
        path.parent.mkdir(exist_ok=True)
        state = {"step": self.step, "flow": self.flow.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def _restore(self) -> None:
        path = self.folder / runs.CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(f"damaged {path}", "a checkpoint", "start the run again with --force") from error
        self.step = state["step"]
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        _drop_after(self.folder / runs.METRICS, self.step)

    def _finish(self) -> None:
        shape = {"time": self.flow.modulation is not None, "shift": self.flow.shift}
        manifest = _manifest(self.settings, self.store, (self.m, self.n), shape)
        manifest["train_tokens"] = self.step * self.batch_size * self.store.context
        runs.save_run(self.folder, self.flow, manifest)
        (self.folder / runs.CHECKPOINT).unlink(missing_ok=True)


def _drop_after(metrics: Path, step: int) -> None:
    """Cut lines of steps that will be done again."""
    if metrics.exists():
        lines = metrics.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        metrics.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a line cut short by a kill
        return math.inf


def _manifest(
    settings: TrainSettings, store: Store, block: tuple[int, int], velocity: dict[str, bool]
) -> dict[str, Any]:
    return {
        "store_fingerprint": store.fingerprint,
        "store": str(store.path.resolve()),
        "teacher": store.identity["teacher"],
        "block": list(block),
        "objective": settings.objective,
        "solver": settings.solver if velocity["time"] else "euler",
        "walk_steps": settings.walk_steps if velocity["time"] else 1,
        "seed": settings.seed,
        "velocity": velocity,
        "versions": {"lftpipe": lftpipe.__version__, "torch": torch.__version__},
    }


def fit_linear(
    folder: Path, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> dict[str, Any]:
    """The closed-form baseline: one pass over the training states, no steps."""
    started = time.monotonic()
    m, n = block
    sums, seen = LeastSquares(teacher.width), 0
    sequences = min(store.num_sequences("train"), math.ceil(settings.tokens / store.context))
    with progress.task(f"train {folder.name}", sequences * store.context, "tokens") as task:
        for first in range(0, sequences, 8):
            rows = range(first, min(first + 8, sequences))
            x_0, x_1 = (torch.from_numpy(store.read("train", layer, rows)).float() for layer in (m, n))
            sums.add(x_0, x_1)
            seen += len(rows) * store.context
            task.advance(len(rows) * store.context)
    flow = LinearMap(teacher.width)
    weight, bias = sums.solve()
    flow.linear.load_state_dict({"weight": weight, "bias": bias})
    manifest = _manifest(settings, store, block, {"linear": True, "time": False, "shift": False})
    runs.save_run(folder, flow, manifest | {"train_tokens": seen})
    return {
        "run": str(folder),
        "block": [m, n],
        "objective": "linear",
        "train_tokens": seen,
        "seconds": round(time.monotonic() - started, 3),
    }
