"""Starts that are fitted from the cache: the last map by least squares, and narrow MLPs."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from lftpipe.base import progress
from lftpipe.base.errors import RunError, TeacherError
from lftpipe.data.batches import Batch
from lftpipe.families.branches import Branches
from lftpipe.families.family import LayerForm
from lftpipe.families.layer_probe import is_linear_map, weight_of
from lftpipe.families.narrow import mlp_maps, narrow
from lftpipe.flow.part import LayerStack, LeastSquares, PartSequence, carry
from lftpipe.flow.path import States
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.layers import load_layer
from lftpipe.training import distributed
from lftpipe.training.estimator import parts
from lftpipe.training.optimizer import copy_of, set_weights
from lftpipe.training.run import TrainedPart, TrainingRun

# --- A start in closed form: the last maps of a layer, fitted by least squares to what the whole block does.
#
# What a layer adds to the residual stream is linear in its features, the heads' outputs and the MLP's
# hidden units. With these as they are, the best maps from them to `x_1 - x_0` need no step of training.

#: Of the first batches that a run will see.
TOKENS = 49_152

#: Of each feature's own variance. Chosen on sequences held back from training (docs/log.md).
READOUT_RIDGE = 0.01


@torch.no_grad()
def refit(run: TrainingRun, one: TrainedPart, batches: Callable[[], Iterable[Batch]]) -> None:
    """Change the output maps of a part's attention and MLP so that `x_0 + u(x_0)` comes near to `x_1`.

    The fit is ridge regression of what is missing, drawn to the teacher's maps. Where the MLP reads what
    attention gives (sequential residuals) its map is fitted a second time, on what it reads by then.

    `batches`: gives what to fit on, every time it is called.
    """
    assert isinstance(one.flow, Velocity), "of one layer alone"
    layer = one.flow.layer
    attention, mlp = (layer.layer.get_submodule(name) for name in last_maps(run, one))
    _fit(run, one, batches(), [attention, mlp])
    if not layer.parallel:
        _fit(run, one, batches(), [mlp])


def last_maps(run: TrainingRun, one: TrainedPart) -> list[str]:
    """The linear maps that end the branches of a part's layer.

    Raises `RunError` if it has none, or they do not write to the stream directly.
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
    sums = LeastSquares(sum(sizes), run.teacher.width, READOUT_RIDGE)
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


# --- The start of a narrow layer: which channels of the teacher's MLP stay, and the output map fitted anew.
#
# What an MLP adds to the stream is linear in its channels. From their second moments on cached states
# follows, without a step of training, which channels the others replace best, and the output map that
# makes up for those that go.

#: Of each channel's own second moment: channels that hardly vary stay solvable.
NARROW_RIDGE = 1e-5

#: Positions have massive activations where an MLP's output is so many times as long as the median.
MASSIVE = 10.0

#: Fraction of the squared output there that the channels which always stay must make up.
MASSIVE_SHARE = 0.999

#: Batches that a fit is judged on, and not made from, where there are as many again.
JUDGED = 8

#: Channels that are dropped at a time, as a fraction of all.
AT_ONCE = 1 / 96

#: By so much a fit may be worse than plain selection at one kind of positions.
TOLERANCE = 1.05


class Start(NamedTuple):
    """A narrow MLP: which channels stay, and the map from them to the stream."""

    keep: Int64[Tensor, "kept"]
    weight: Float[Tensor, "feature kept"]
    bias: Float[Tensor, "feature"] | None


@torch.no_grad()
def fit(run: TrainingRun, one: TrainedPart, batches: Callable[[int], Iterable[Batch]]) -> None:
    """Give the narrow layers of a part the teacher's weights, with channels chosen and outputs fitted.

    `batches`: from the number of a state to batches that hold it, the same every time.
    """
    layers: Any = one.flow.layers if isinstance(one.flow, LayerStack) else [one.flow.layer]
    for layer, (state, _) in zip(layers, parts(one.part.block, one.part.depth), strict=True):
        teacher = load_layer(run.teacher, state).to(run.device)
        seen = list(batches(state))
        judged, rest = seen[:JUDGED], seen[JUDGED:]
        moments = Moments(teacher)
        with progress.task(f"fit {run.folder.name}, layer {state}", len(seen), "batches") as task:
            for batch in rest if len(rest) >= JUDGED else seen:
                moments.add(batch, batch.states[state])
                task.advance(1)
        moments.average()
        count = weight_of(layer.layer.get_submodule(moments.output)).shape[1]
        plain, fitted = moments.selected(count), moments.fitted(count)
        start = fitted if distributed.agree(_is_no_worse(teacher, fitted, plain, judged, state)) else plain
        _check_channels(teacher, start.keep, one.part.width, judged[0], state)
        narrow(teacher, one.part.width, start.keep)
        output: Any = teacher.layer.get_submodule(moments.output)
        weight_of(output).copy_(start.weight)
        if start.bias is not None:
            output.bias.copy_(start.bias)
        layer.load_state_dict(teacher.state_dict())


class Moments:
    """Second moments of the channels of a layer's MLP, over positions weighed by one over their squared norm.

    Unweighted, a few massive activations would be all that is fitted; without the positions that have them,
    nobody would make them any more.
    """

    def __init__(self, layer: Branches) -> None:
        self.layer = layer
        self.output = mlp_maps(layer).output
        last: Any = layer.layer.get_submodule(self.output)
        self.weight, self.bias = weight_of(last), last.bias
        inputs = self.weight.shape[1] + (self.bias is not None)
        self.gram: Float64[Tensor, "channel channel"] = torch.zeros(
            inputs, inputs, dtype=torch.float64, device=self.weight.device
        )
        self.massive = self.gram.new_zeros(self.weight.shape[1])
        """Squares of what each channel adds where the output is massive."""

    def add(self, batch: Batch, x: States) -> None:
        """Add what the channels are on a batch."""
        z, out, x_1 = _run(self.layer, self.output, x, batch)
        z, sizes = z.flatten(0, 1), out.flatten(0, 1).norm(dim=-1)
        weight = 1 / (x_1.flatten(0, 1).square().sum(-1, keepdim=True) + 1e-12)
        massive = (sizes > MASSIVE * sizes.median()).to(z)[:, None]
        self.massive += ((massive * z.square()).sum(0) * self.weight.square().sum(0)).double()
        if self.bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=-1)
        self.gram += ((weight * z).T @ z).double()

    def average(self) -> None:
        """Over all processes."""
        self.gram, self.massive = distributed.mean(self.gram), distributed.mean(self.massive)

    def selected(self, count: int) -> Start:
        """The channels of the largest activation energy times output norm, with the teacher's own map."""
        energy = self.gram.diagonal()[: len(self.massive)] * self.weight.double().square().sum(0)
        energy[self._always(count)] = torch.inf
        keep = energy.topk(count).indices.sort().values
        return Start(keep, self.weight[:, keep].clone(), None if self.bias is None else self.bias.clone())

    def _always(self, count: int) -> Int64[Tensor, "channel"]:
        """The channels that make the massive activations, at most half of those that stay."""
        order = self.massive.argsort(descending=True)
        shares = self.massive[order].cumsum(0) / self.massive.sum().clamp_min(1e-300)
        needed = int((shares < MASSIVE_SHARE).sum()) + 1 if self.massive.any() else 0
        return order[: min(needed, count // 2)]

    def fitted(self, count: int) -> Start:
        """Channels dropped one group after the other, each time those whose loss the rest makes up for best.

        It is the optimal brain surgeon (Hassibi and Stork, 1992) on whole channels: with `H` the inverse of
        the moments and `B` the map, dropping channel `c` costs `|B_c|^2 / H_cc`.
        """
        size = self.gram.diagonal().clamp_min(1e-300).rsqrt()
        gram = size[:, None] * self.gram * size
        gram.diagonal().add_(NARROW_RIDGE)
        whole = self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], dim=1)
        inverse, map_ = torch.linalg.inv(gram), whole.double() / size
        total = self.weight.shape[1]
        fixed = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
        fixed[self._always(count)] = True
        fixed[total:] = True
        gone = torch.zeros_like(fixed)
        group = max(1, round(AT_ONCE * total))
        for left in range(total - count, 0, -group):
            cost = map_.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
            cost[fixed | gone] = torch.inf
            drop = cost.topk(min(group, left), largest=False).indices
            solved = torch.linalg.solve(inverse[drop][:, drop], inverse[drop])
            map_ -= map_[:, drop] @ solved
            inverse -= inverse[:, drop] @ solved
            gone[drop] = True
            map_[:, gone] = 0
            inverse[gone] = inverse[:, gone] = 0
        keep = (~gone[:total]).nonzero().flatten()
        # Solved once more: the rounding of many small changes adds up.
        read = keep if self.bias is None else torch.cat([keep, keep.new_tensor([total])])
        scaled = (whole.double() / size) @ gram[:, read]
        found = torch.linalg.solve(gram[read][:, read], scaled, left=False) * size[read]
        bias = None if self.bias is None else found[:, -1].to(self.bias)
        return Start(keep, found[:, : len(keep)].to(self.weight), bias)


def _run(layer: Branches, output: str, x: States, batch: Batch) -> tuple[Tensor, Tensor, States]:
    """What a layer's MLP gives its output map and the stream, and the layer's own output."""
    seen: list[Any] = []
    hook = layer.layer.get_submodule(output).register_forward_hook(
        lambda _, args, made: seen.extend([args[0], made])
    )
    try:
        x_1 = layer(x, batch.context)
    finally:
        hook.remove()
    if len(seen) != 2 or seen[0].shape[:2] != x.shape[:2]:
        raise _more_than_channels(layer.index)
    return seen[0], seen[1], x_1


def _is_no_worse(layer: Branches, fitted: Start, plain: Start, judged: Iterable[Batch], state: int) -> bool:
    """Whether a fit is no worse than plain selection at any kind of positions."""
    errors: dict[str, list[Tensor]] = {"fitted": [], "plain": []}
    kinds: list[Tensor] = []
    output = mlp_maps(layer).output
    for batch in judged:
        z, out, x_1 = _run(layer, output, batch.states[state], batch)
        kinds.append(_kinds(batch, out))
        for name, start in (("fitted", fitted), ("plain", plain)):
            made = torch.nn.functional.linear(z[..., start.keep], start.weight, start.bias)
            errors[name].append(((made - out).square().sum(-1) / x_1.square().sum(-1)).flatten())
    kind = torch.cat(kinds, dim=1).double()
    sums = {name: kind @ torch.cat(values).double() for name, values in errors.items()}
    return _none_grew(sums["fitted"], sums["plain"])


def _kinds(batch: Batch, out: States) -> Bool[Tensor, "kind position"]:
    """The first positions of segments, those where an output is massive, and all others."""
    sizes = out.norm(dim=-1)
    massive = sizes > MASSIVE * sizes.median()
    first = batch.first_of_segment
    return torch.stack([first, massive, ~(first | massive)]).flatten(1)


def _none_grew(now: Tensor, before: Tensor) -> bool:
    """Whether the error of no kind of positions grew by more than a little."""
    return bool((now <= TOLERANCE * before + 1e-12).all())


def _check_channels(layer: Branches, keep: Tensor, width: float, batch: Batch, state: int) -> None:
    """Refuse an MLP whose channels do not stay what they are when others go."""
    x, output = batch.states[state], mlp_maps(layer).output
    whole = _run(layer, output, x, batch)[0]
    part = _run(narrow(copy.deepcopy(layer), width, keep), output, x, batch)[0]
    if not torch.allclose(part, whole[..., keep], rtol=1e-3, atol=1e-4 * whole.abs().max().item()):
        raise _more_than_channels(layer.index)


def _more_than_channels(index: int) -> TeacherError:
    return TeacherError(
        f"--width for layer {index}, whose MLP is more than linear maps around its channels",
        "a plain or gated MLP",
        "leave --width out",
    )


# --- The start of a whole student of narrow layers: each layer makes up for what those before it lack.


@torch.no_grad()
def follow(run: TrainingRun, batches: Callable[[int], Iterable[Batch]]) -> None:
    """Fit the output maps of a student's layers once more, in order, on the stream that its own parts make.

    Fitted alone, each layer's error is carried through all that follow. Here each is fitted to bring the
    stream, wrong as it is by then, back to the teacher's state. A fit that does not is taken back.

    `batches`: from the number of a state to batches that hold it, the same every time.
    """
    stream = [batch.states[run.m] for batch in batches(run.m)]
    apart = min(JUDGED, max(1, len(stream) // JUDGED))
    if len(stream) == 1:  # nothing to judge by
        return
    for number, one in enumerate(run.parts):
        start, stop = one.part.block
        if isinstance(run.flow, PartSequence) and number and start > run.parts[number - 1].part.stop:
            pairs = zip(batches(start), stream, strict=True)
            stream = [run.flow.enter(number, x, batch.context) for batch, x in pairs]
        given = partial(_carried, stream, start, partial(batches, stop))
        if one.part.kind == "layer" and _has_maps(run, one):
            _follow_one(run, one, given, apart)
        stream = [carry(one.flow, batch.states[start], batch.context) for batch in given()]


def _follow_one(run: TrainingRun, one: TrainedPart, given: Callable[[], Iterator[Batch]], apart: int) -> None:
    """Fit one layer, judged on the first `apart` batches, which the fit does not see."""
    before, errors = copy_of(one.flow), _errors(one, islice(given(), apart))
    layer: Any = one.flow.layer
    names = last_maps(run, one) if layer.parallel else last_maps(run, one)[1:]  # an MLP reads the attention's
    _fit(run, one, islice(given(), apart, None), [layer.layer.get_submodule(name) for name in names])
    if not distributed.agree(_none_grew(_errors(one, islice(given(), apart)), errors)):
        set_weights(one.flow, before)


def _carried(stream: list[States], state: int, batches: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    """Batches whose `state` is the student's own."""
    for batch, x in zip(batches(), stream, strict=True):
        yield replace(batch, states={**batch.states, state: x})


def _has_maps(run: TrainingRun, one: TrainedPart) -> bool:
    try:
        return bool(last_maps(run, one))
    except RunError:
        return False


def _errors(one: TrainedPart, batches: Iterable[Batch]) -> Float64[Tensor, "kind"]:
    """Squared errors of a part's end, each over the squared state, summed by kind of positions."""
    start, stop = one.part.block
    total = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        x_1 = batch.states[stop]
        lost = (carry(one.flow, batch.states[start], batch.context) - x_1).square().sum(-1)
        share = (lost / (x_1.square().sum(-1) + 1e-12)).flatten().double()
        total += (_kinds(batch, x_1).double() @ share).cpu()
    return total
