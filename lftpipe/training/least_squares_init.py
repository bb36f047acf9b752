"""A start in closed form: the last maps of a layer, fitted by least squares to what the whole block does.

What a layer adds to the residual stream is linear in its features, the heads' outputs and the MLP's hidden
units. With these as they are, the best maps from them to `x_1 - x_0` need no step of training.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.base import progress
from lftpipe.base.errors import RunError
from lftpipe.data.batches import Batch
from lftpipe.families.family import LayerForm
from lftpipe.families.layer_probe import is_linear_map, weight_of
from lftpipe.flow.linear import LeastSquares
from lftpipe.flow.velocity import Velocity
from lftpipe.training import distributed
from lftpipe.training.run import TrainedPart, TrainingRun

#: Of the first batches that a run will see.
TOKENS = 49_152

#: Of each feature's own variance. Chosen on sequences held back from training (docs/log.md).
RIDGE = 0.01


@torch.no_grad()
def refit(run: TrainingRun, one: TrainedPart, batches: Callable[[], Iterable[Batch]]) -> None:
    """Change the output maps of a part's attention and MLP so that `x_0 + u(x_0)` comes near to `x_1`.

    The fit is ridge regression of what is missing, drawn to the teacher's maps. Where the MLP reads what
    attention gives (sequential residuals) its map is fitted a second time, on what it reads by then.

    Parameters
    ----------
    batches
        Gives what to fit on, every time it is called.
    """
    assert isinstance(one.flow, Velocity), "of one layer alone"
    layer = one.flow.layer
    attention, mlp = (layer.layer.get_submodule(name) for name in last_maps(run, one))
    _fit(run, one, batches(), [attention, mlp])
    if not layer.parallel:
        _fit(run, one, batches(), [mlp])


def last_maps(run: TrainingRun, one: TrainedPart) -> list[str]:
    """The linear maps that end the branches of a part's layer.

    Raises
    ------
    RunError
        If it has none, or they do not write to the stream directly.
    """
    layer: Any = one.flow.layer
    form: LayerForm | None = layer.form
    branches = [form.attention, form.mlp] if form else []
    names = [each.output for each in branches if each.output and not each.post_norm and each.scale == 1]
    if len(names) != 2 or not all(is_linear_map(layer.layer.get_submodule(name)) for name in names):
        raise RunError(
            f"--init readout for layer {one.part.start} of {run.teacher.name}",
            "a layer whose two branches each end in a linear map that writes to the stream",
            "leave --init out",
        )
    return names


def _fit(run: TrainingRun, one: TrainedPart, batches: Iterable[Batch], maps: list[Any]) -> None:
    sizes = [weight_of(each).shape[1] for each in maps]
    sums = LeastSquares(sum(sizes), run.teacher.width, RIDGE)
    with progress.task(f"fit {run.folder.name}", TOKENS, "tokens") as task:
        for batch in batches:
            features, missing = _features(run, one, batch, maps)
            sums.add(features, missing, batch.states[one.part.stop])
            task.advance(run.tokens_per_step)
    if distributed.count() > 1:  # on the device, where they talk
        sums.gram, sums.cross = (
            distributed.mean(each.to(run.device)).cpu() for each in (sums.gram, sums.cross)
        )
    biased = next((each for each in reversed(maps) if each.bias is not None), None)
    weight, bias = (each.to(run.device) for each in sums.solve(intercept=biased is not None))
    for each, change in zip(maps, weight.split(sizes, dim=1), strict=True):
        weight_of(each).add_(change)
    if biased is not None:
        biased.bias += bias


def _features(
    run: TrainingRun, one: TrainedPart, batch: Batch, maps: list[nn.Module]
) -> tuple[Float[Tensor, "sequence position input"], Float[Tensor, "sequence position feature"]]:
    """What the maps read, side by side, and what the layer misses of `x_1`."""
    read: list[Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda _, given: read.append(given[0])) for each in maps]
    x_0, x_1 = batch.states[one.part.start], batch.states[one.part.stop]
    start = x_0.new_zeros(len(x_0))
    try:
        with run.autocast():
            velocity = one.flow(x_0, start, batch.context, source=x_0, step_size=start)
    finally:
        for hook in hooks:
            hook.remove()
    if any(each.shape[:2] != x_0.shape[:2] for each in read):
        raise RunError(
            f"--init readout for layer {one.part.start} of {run.teacher.name}, whose maps see parts of "
            "a sequence",
            "a layer whose maps see all positions at once",
            "leave --init out",
        )
    return torch.cat([each.float() for each in read], dim=-1), x_1 - x_0 - velocity
