"""Runs that are fitted in closed form: linear maps, ReplaceMe, LinearPatch; Hadamard matrices for it."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.base.shape import Part
from lftpipe.config.settings import TrainSettings
from lftpipe.families.branches import Branches
from lftpipe.families.layer_probe import is_linear_map, weight_of
from lftpipe.flow.part import LeastSquares, LinearMap, NoLayer
from lftpipe.flow.velocity import Velocity
from lftpipe.results.outcomes import TrainedRun
from lftpipe.store import Store, read_in_turn
from lftpipe.teacher.layers import load_layer
from lftpipe.teacher.source import Teacher
from lftpipe.training.checkpoint import begin
from lftpipe.training.run import manifest_of, order_of

# --- Hadamard matrices of the orders that widths of models have.


def hadamard(order: int) -> Float[Tensor, "order order"]:
    """An orthogonal matrix whose entries are all `1 / sqrt(order)` or its negative.

    Paley's constructions, doubled as often as needed by Sylvester's: all orders `2^a` and `2^a p` with `p`
    one above a prime of the form `4k + 3`, or twice one above a prime of the form `4k + 1`.

    Raises `ValueError` if these constructions know no matrix of that order.
    """
    core, doublings = order, 0
    while (matrix := _core(core)) is None:
        if core % 2:
            raise ValueError(f"neither Paley nor Sylvester constructs a Hadamard matrix of order {order}")
        core, doublings = core // 2, doublings + 1
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(doublings):
        matrix = torch.kron(double, matrix)
    return matrix / order**0.5


def _core(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1)
    if order % 4 == 0 and _is_prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order) + _skew(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _symmetric(order // 2 - 1)
        return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
            torch.eye(order // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        )
    return None


def _residues(prime: int) -> Tensor:
    """Jacobsthal's matrix: 1 where indices differ by a square modulo the prime, else -1; 0 if equal."""
    squares = {(number * number) % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _bordered(prime: int, left: float) -> Tensor:
    matrix = torch.zeros(prime + 1, prime + 1)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, left, _residues(prime)
    return matrix


def _skew(prime: int) -> Tensor:
    return _bordered(prime, -1.0)


def _symmetric(prime: int) -> Tensor:
    return _bordered(prime, 1.0)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


# --- Rivals that are fitted in one pass over the training states, or not at all: no steps, no gradients.

#: Sequences read at once.
_AT_ONCE = 8

#: `(array, layer)` of each state or attention output that a fit reads.
_Parts = tuple[tuple[str, int], ...]

#: What replaces a block, as module and as part of a shape, and the tokens it was fitted on.
Fitted = tuple[nn.Module, Part, int]


def fit_closed_form(
    folder: Path, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> TrainedRun:
    """Fit and write a run of an objective that needs no steps."""
    started = time.monotonic()
    module, part, seen = _FITS[settings.objective](folder.name, settings, store, teacher, block)
    manifest = manifest_of(settings, store, [part])
    begin(folder, settings, store)
    runs.save_run(folder, module, manifest | {"train_tokens": seen})
    return TrainedRun(
        run=str(folder),
        block=list(part.block),
        shape=manifest["shape"],
        objective=settings.objective,
        train_tokens=seen,
        seconds=round(time.monotonic() - started, 3),
    )


def _batches(name: str, settings: TrainSettings, store: Store, parts: _Parts) -> Iterator[list[Tensor]]:
    """States, attention outputs too, of the training sequences that a run may see, in float32."""
    wanted = math.ceil(settings.tokens / store.context)
    sequences = min(order_of(settings, store).num_sequences, wanted)
    with progress.task(f"train {name}", sequences * store.context, "tokens") as task:
        for states in read_in_turn(store, "train", parts, range(sequences), _AT_ONCE):
            yield [torch.from_numpy(state).float() for state in states]
            task.advance(len(states[0]) * store.context)


def _linear(
    name: str, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> Fitted:
    """The least-squares map from `h[m]` to `h[n]`."""
    sums, seen = LeastSquares(teacher.width, teacher.width), 0
    for x_0, x_1 in _batches(name, settings, store, (("hidden", block[0]), ("hidden", block[1]))):
        sums.add(x_0.double(), x_1 - x_0, x_1)
        seen += x_0[..., 0].numel()
    return _map(teacher, *sums.solve()), Part(*block, "linear"), seen


def _skip(
    name: str, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> Fitted:
    """Nothing in the block's place (ShortGPT, arXiv 2403.03853; Gromov et al., arXiv 2403.17887)."""
    del name, settings, store, teacher
    return NoLayer(), Part(*block, "skip"), 0


def _replaceme(
    name: str, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> Fitted:
    """ReplaceMe (arXiv 2505.02819): a map of the MLP's output of the layer before the block, merged into it.

    With `M` that output and `Y = h[m] - M`, `T` is the least-squares solution of `M T + Y ~ h[n]`. The run is
    then one plain layer for `m-1:n`: layer `m-1`, whose MLP ends in `T` times its last map. Unlike in the
    paper, positions are weighted by one over their squared norm, as everywhere here, and a bias is fitted
    where that map has one.
    """
    m, n = block
    parts = (("hidden", m - 1), ("attention", m - 1), ("hidden", m), ("hidden", n))
    sums, seen = LeastSquares(teacher.width, teacher.width), 0
    for before, attention, x_0, x_1 in _batches(name, settings, store, parts):
        mlp = x_0 - before - attention
        sums.add(mlp.double(), x_1 - x_0, x_1)  # T = 1 + D, and D answers for what the block adds
        seen += x_0[..., 0].numel()
    layer = load_layer(teacher, m - 1)
    output = _last_map(teacher, layer, m - 1)
    change, constant = sums.solve(intercept=output.bias is not None)
    with torch.no_grad():
        weight_of(output).add_(change @ weight_of(output))
        if output.bias is not None:
            output.bias += change @ output.bias + constant
    flow = Velocity(layer, teacher.width, time=False)
    return flow, Part(m - 1, n, "layer"), seen


def _last_map(teacher: Teacher, layer: Branches, index: int) -> Any:
    """The linear map that ends a layer's MLP, whose output is added to the stream as it is."""
    mlp = layer.form.mlp if layer.form is not None else None
    plain = mlp is not None and mlp.output is not None and not mlp.post_norm and mlp.scale == 1
    linear_map = layer.layer.get_submodule(mlp.output) if plain and mlp and mlp.output else None
    if linear_map is None or not is_linear_map(linear_map):
        raise SettingsError(
            f"--objective replaceme after layer {index} of {teacher.name}",
            "a layer whose MLP ends in a linear map that writes to the stream",
            "use --objective linear",
        )
    return linear_map


def _linearpatch(
    name: str, settings: TrainSettings, store: Store, teacher: Teacher, block: tuple[int, int]
) -> Fitted:
    """LinearPatch (arXiv 2505.24680), untrained: channels of `h[m]` take the size of `h[n]`'s.

    Both are rotated by a Hadamard matrix first, and the result back. The scale of a channel is the mean over
    sequences of the ratio of its mean absolute values.
    """
    try:
        rotation = hadamard(teacher.width)
    except ValueError as error:
        raise SettingsError(
            f"--objective linearpatch with a width of {teacher.width}",
            "a width with a known Hadamard matrix",
            "use --objective linear or replaceme",
        ) from error
    total, seen = torch.zeros(teacher.width, dtype=torch.float64), 0
    for x_0, x_1 in _batches(name, settings, store, (("hidden", block[0]), ("hidden", block[1]))):
        before, after = ((x @ rotation).abs().mean(1).double() for x in (x_0, x_1))
        total += (after / before.clamp_min(1e-12)).sum(0)
        seen += x_0[..., 0].numel()
    scale = (total / (seen / store.context)).float()
    patch = rotation @ torch.diag(scale) @ rotation.T - torch.eye(teacher.width)
    return _map(teacher, patch, torch.zeros(teacher.width)), Part(*block, "linear"), seen


def _map(teacher: Teacher, weight: Tensor, bias: Tensor) -> LinearMap:
    flow = LinearMap(teacher.width)
    flow.linear.load_state_dict({"weight": weight, "bias": bias})
    return flow


_FITS: dict[str, Callable[[str, TrainSettings, Store, Teacher, tuple[int, int]], Fitted]] = {
    "linear": _linear,
    "skip": _skip,
    "replaceme": _replaceme,
    "linearpatch": _linearpatch,
}
