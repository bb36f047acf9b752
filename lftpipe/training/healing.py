"""The loop of healing: batches in, a student whose layers know of one another out, resumable bit for bit."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.errors import DivergenceError
from lftpipe.base.files import fingerprint
from lftpipe.config.settings import HealSettings
from lftpipe.data.batches import Batch, BatchFields, BatchOrder, BatchReader
from lftpipe.training.checkpoint import is_due, restore_newest, write_checkpoint
from lftpipe.training.log import Tracker, tracker_of
from lftpipe.training.optimizer import BETAS, gradient_norm, rate_fraction

#: Sequences held back that an evaluation looks at, at most.
SEQUENCES = 64

#: The loss of a batch, a mean over its positions.
Loss = Callable[[Batch], Tensor]


class Healing:
    """A student between the first step of its healing and the last.

    Parameters
    ----------
    order
        Which sequences a step sees; the rest of the training split is held back.
    """

    def __init__(
        self,
        folder: Path,
        settings: HealSettings,
        reader: BatchReader,
        fields: BatchFields,
        order: BatchOrder,
        trained: dict[str, nn.Parameter],
        loss: Loss,
        healed: str,
    ) -> None:
        self.folder, self.settings, self.reader, self.order = folder, settings, reader, order
        self.healed = healed
        self.fields, self.trained, self.loss_of = fields, trained, loss
        self.tokens_per_step = order.batch_size * reader.store.context
        self.num_steps = math.ceil(settings.tokens / self.tokens_per_step)
        decayed = [weight for weight in trained.values() if weight.ndim >= 2]
        others = [weight for weight in trained.values() if weight.ndim < 2]
        assert settings.learning_rate is not None
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=BETAS,
            fused=True,
        )
        self.step, self.loss, self.seconds, self.waited = 0, math.nan, 0.0, 0.0
        self._tracker: Tracker | None = None
        self._best: dict[str, Tensor] = self._copy()
        self._best_loss = math.inf
        self._saved = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Do what steps are left; the weights are then the best on what is held back.

        Raises
        ------
        DivergenceError
            If a loss or a gradient is not finite.
        """
        if self.settings.resume:
            self._restore()
        total, done = self.num_steps * self.tokens_per_step, self.step * self.tokens_per_step
        with contextlib.ExitStack() as files:
            log = files.enter_context((self.folder / runs.METRICS).open("a" if self.step else "w"))
            self._tracker = tracker_of(self.settings, self.folder, done)
            if self._tracker:
                files.callback(self._tracker.close)
            if self.step == 0:
                self._write(log, 0.0, self._evaluate())
            with progress.task(f"heal {self.folder.name}", total, "tokens", done=done) as task:
                for batch in self._batches():
                    self._advance(batch, log)
                    task.advance(self.tokens_per_step, loss=f"{self.loss:.4f}")
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self._best[name])
        return {
            "steps": self.step,
            "loss": self.loss,
            "held_back_loss": None if math.isinf(self._best_loss) else self._best_loss,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.step * self.tokens_per_step / max(self.seconds, 1e-9), 1),
        }

    def _batches(self) -> Iterator[Batch]:
        batches = self.reader.shuffled(self.fields, self.order, self.step)
        for _ in range(self.step, self.num_steps):
            before = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - before
            self.waited, self.seconds = self.waited + waited, self.seconds + waited
            yield batch

    def _advance(self, batch: Batch, log: Any) -> None:
        started, settings = time.monotonic(), self.settings
        loss = self.loss_of(batch)
        loss.backward()
        norm = gradient_norm(list(self.trained.values()), settings.clip)
        self.loss = loss.item()
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            raise DivergenceError(
                f"loss {self.loss}, gradient norm {norm} at step {self.step} of {self.folder}",
                "finite ones",
                "heal again with --force and a lower --learning-rate",
            )
        assert settings.learning_rate is not None
        rate = settings.learning_rate * rate_fraction(self.step, self.num_steps, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        last = self.step == self.num_steps
        found = self._evaluate() if self.step % settings.evaluate_every == 0 or last else {}
        self.seconds += time.monotonic() - started
        if found or self.step % settings.log_every == 0:
            self._write(log, rate, found)
        if is_due(settings, self.step, self._saved) and not last:
            log.flush()
            self._save()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """The loss on what is held back; takes note of the best."""
        used, size = self.order.num_sequences, self.order.batch_size
        held = range(used, self.reader.store.num_sequences("train"))[:SEQUENCES]
        if not held:
            self._best = self._copy()
            return {}
        total = 0.0
        for start in range(held.start, held.stop, size):
            part = range(start, min(start + size, held.stop))
            total += self.loss_of(self.reader.read("train", part, self.fields)).item() * len(part)
        loss = total / len(held)
        if loss < self._best_loss:
            self._best_loss, self._best = loss, self._copy()
        return {"held_back_loss": loss}

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.trained.items()}

    def _write(self, log: Any, rate: float, found: dict[str, float]) -> None:
        row = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "learning_rate": rate,
            "seconds": round(self.seconds, 3),
            "data_wait_seconds": round(self.waited, 3),
            **({"loss": self.loss} if self.step else {}),
            **found,
        }
        log.write(json.dumps(row) + "\n")
        if self._tracker:
            self._tracker.write(row)

    def _save(self) -> None:
        """All that a killed run needs to go on."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "waited": self.waited,
            "weights": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "best": self._best,
            "best_loss": self._best_loss,
        }
        write_checkpoint(self.folder / runs.CHECKPOINT, [state], self._binding())
        self._saved = time.monotonic()

    def _binding(self) -> str:
        """What the checkpoint belongs to: the weights that are healed, and how."""
        used = self.settings
        named = (self.healed, used.train, used.adapter, used.rank, used.loss, used.seed, used.batch_tokens)
        return fingerprint([*map(str, named), self.reader.store.origin])

    def _restore(self) -> None:
        path = self.folder / runs.CHECKPOINT
        restore_newest(path, self._binding(), self.reader.device, self._take)
        if self.step:
            runs.drop_metrics_after(self.folder, self.step)

    def _take(self, states: list[dict[str, Any]]) -> None:
        (state,) = states
        if state["weights"].keys() != self.trained.keys():
            raise ValueError("weights of other names: it was written by another version")
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.waited = state["step"], state["seconds"], state.get("waited", 0.0)
        self._best, self._best_loss = state["best"], state["best_loss"]
