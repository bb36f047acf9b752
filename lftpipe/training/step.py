"""One step of training: draw the times, walk, compare, go back, move the weights.

Every random draw is a function of the run's seed and the batch's number. Nothing here waits for the device,
except a look at whether losses were finite, which is not taken in every step (`run.py`).
"""

import math

import torch
from torch import Tensor

from lftpipe import runs
from lftpipe.base.device import move
from lftpipe.base.errors import DivergenceError
from lftpipe.data.batches import Batch
from lftpipe.flow.objective import Loss, walk_times
from lftpipe.flow.path import States
from lftpipe.training import distributed
from lftpipe.training.healing import HealingRun
from lftpipe.training.optimizer import gradient_norm
from lftpipe.training.run import TrainedPart, TrainingRun
from lftpipe.training.terms import LogitsProblem, Problem, SequenceProblem, weighted_sum

Run = TrainingRun | HealingRun


def take_step(run: Run, batch: Batch, *, look: bool = True) -> float:
    """One step of a run; its learning rate.

    `look`: whether to look if losses and gradients were finite: before weights are kept in any way, one must.
    Raises `DivergenceError` if a loss or gradient is not finite, or was not since the last look.
    """
    loss = loss_of(run, batch)
    loss.backward()
    return move_weights(run, loss, look)


def loss_of(run: Run, batch: Batch) -> Loss:
    """The loss of a run's present stage."""
    batch.need(run.fields)
    with run.autocast():
        return weighted_sum(pose(run, batch), run.stage.weights)


def pose(run: Run, batch: Batch, *, equal_steps: bool = False) -> LogitsProblem:
    """A batch with the random draws of its step, or with equal steps as at inference."""
    if isinstance(run, HealingRun):
        return run.pose(batch)
    if len(run.parts) == 1:
        return _pose(run, run.parts[0], batch, batch.states[run.m], equal_steps=equal_steps)
    return SequenceProblem(
        batch=batch,
        flow=run.flow,
        x_0=batch.states[run.m],
        of_part=lambda number, x: _pose(
            run,
            run.parts[number],
            batch,
            batch.states[run.parts[number].part.start] if x is None else x,
            equal_steps=equal_steps,
        ),
        tail=run.tail,
    )


def _pose(run: TrainingRun, one: TrainedPart, batch: Batch, x_0: States, *, equal_steps: bool) -> Problem:
    """The same for one part of the student."""
    timed = one.flow.modulation is not None
    steps = run.settings.walk_steps if timed else 1
    generator = torch.Generator().manual_seed(run.settings.seed * 2_000_003 + batch.step)
    # On the processor and for the whole batch: the same draws on any device, whoever takes which part.
    draws = torch.rand(steps, run.order.batch_size, generator=generator)
    draws = move(draws[:, batch.part], run.device)
    times = "equal" if equal_steps else run.settings.walk_times
    if times == "mixed":
        steps = int(torch.randint(1, steps + 1, (), generator=generator))
    grid = torch.linspace(0, 1, steps + 1, device=run.device)[:, None].expand(-1, len(x_0))
    return Problem(
        flow=one.flow,
        block=one.part.block,
        batch=batch,
        x_0=x_0,
        t=draws[0] if timed else torch.zeros_like(draws[0]),
        time_grid=walk_times(draws[1:]) if times == "uniform" else grid,
        method=run.settings.solver if timed else "euler",
        scale=one.scale,
        tail=run.tail,
    )


def move_weights(run: Run, loss: Loss, look: bool) -> float:
    """Move the weights of a run whose gradients are there; the learning rate of that.

    `look`: whether to look if they were finite since the last look.
    """
    distributed.average_gradients(run.module.parameters())
    norm = gradient_norm(list(run.module.parameters()), run.settings.clip)
    run.watch.add(run.step, distributed.mean(loss.detach()), norm)
    if look:
        seen = run.watch.look()
        run.loss = seen.loss
        if seen.diverged_at is not None:
            raise _divergence(run, seen.norm, seen.diverged_at)
    rate = run.optimizer.step(run.rate_fraction(run.step))
    run.advance()
    return rate


def _divergence(run: Run, norm: float, step: int) -> DivergenceError:
    """Leave a note beside the last checkpoint, from which the run may go on more carefully."""
    if distributed.rank() == 0:
        runs.note_divergence(run.folder, step, run.optimizer.learning_rate)
    has_checkpoint = (run.folder / runs.CHECKPOINT).exists()
    cure = (
        "--resume with a lower --learning-rate or --clip"
        if has_checkpoint
        else "--force and a lower --learning-rate"
    )
    return DivergenceError(
        f"loss {run.loss}, gradient norm {norm} at step {step} of {run.folder}",
        "finite ones",
        f"{'go on from its last checkpoint' if has_checkpoint else 'start it again'} by {cure}",
    )


@torch.no_grad()
def squares_of(run: Run, batch: Batch) -> Tensor:
    """Squares of error and target of a run's states at inference, in the mean over processes.

    NaN where it predicts none.
    """
    if isinstance(run, HealingRun):
        return torch.full((2,), math.nan)
    with run.autocast():
        end = pose(run, batch, equal_steps=True).end
    x_1 = batch.states[run.n]
    return distributed.mean(torch.stack([(end - x_1).square().sum(), x_1.square().sum()]))


def nmse_of(squares: Tensor) -> float:
    """NMSE (section 5.1) from what `squares_of` gave, which may be summed over batches."""
    return (squares[0] / squares[1]).item()
