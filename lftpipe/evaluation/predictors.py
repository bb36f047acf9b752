"""Predictors: ways to compute a block's output from its input, each with its cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lftpipe import runs
from lftpipe.base.shape import SHOWN_BLOCKS, Part
from lftpipe.data.batches import Batch
from lftpipe.families.attention import AttentionContext
from lftpipe.flow.part import carry
from lftpipe.flow.path import States
from lftpipe.flow.solver import Method, VelocityField, sample_adaptively
from lftpipe.flow.velocity import Velocity
from lftpipe.results.scores import JOINED
from lftpipe.teacher.layers import load_embedding
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import (
    Layers,
    Tail,
    count_layer_parameters,
    count_parameters,
    keys_fraction,
    load_bridges,
)

# --- What a predictor is: how a block's start becomes its end, what that costs, and where it comes from.

Predict = Callable[[States, AttentionContext], States]


Block = tuple[int, int]


@dataclass(frozen=True)
class Origin:
    """The run that a predictor was trained in; of several together, what they say jointly."""

    run: str
    objective: str
    seed: int
    train_tokens: int
    weights_digest: str

    @classmethod
    def of(cls, run: runs.Run) -> "Origin":
        """A run's own."""
        return cls(run.path.name, run.objective, run.seed, run.train_tokens, run.weights_digest)

    @classmethod
    def joined(cls, origins: list["Origin"]) -> "Origin":
        """Of a student of several flow layers."""
        return cls(
            run=JOINED.join(each.run for each in origins),
            objective=JOINED.join(dict.fromkeys(each.objective for each in origins)),
            seed=origins[0].seed,
            train_tokens=max(each.train_tokens for each in origins),
            weights_digest=JOINED.join(each.weights_digest for each in origins),
        )


@dataclass
class Evaluations:
    """How often tokens were evaluated whose steps are chosen one by one."""

    threshold: float
    keys_fraction: float
    """What keys and values cost, as a fraction of an evaluation."""
    total: int = 0
    num_tokens: int = 0

    @property
    def mean(self) -> float:
        """Evaluations of a token; NaN before anything was predicted."""
        return self.total / self.num_tokens if self.num_tokens else math.nan

    def mean_with_keys(self, most: int) -> float:
        """`mean`, and the keys and values that a finished token makes until the last step."""
        return self.mean + self.keys_fraction * (most - self.mean)


@dataclass(frozen=True)
class Steps:
    """In how many steps a flow layer is run, and what they cost."""

    k: int
    solver: str
    nfe: int
    chosen: Evaluations | None = None
    """Set where each token takes as many steps as it needs; `k` is then their largest number."""


@dataclass(frozen=True)
class Predictor:
    """How `h[m]` becomes a prediction of `h[n]`, and what that costs.

    `block`: `(m, n)`; None of the teacher, which predicts nothing.
    `shape`: what replaces which layers; `block` spans them all.
    """

    method: str
    predict: Predict
    parameters: int
    block: Block | None = None
    steps: Steps | None = None
    origin: Origin | None = None
    shape: tuple[Part, ...] = ()
    tail: Tail | None = None
    """The layers after the block where they are no longer the teacher's: of a healed run."""
    enter: Callable[[Batch], States] | None = None
    """From a batch to the block's start, where the layers before it are no longer the teacher's."""

    @property
    def block_text(self) -> str | None:
        """As in the table: `m:n`, several of them, or from where to where there are many."""
        if self.block is None:
            return None
        blocks = [part.block for part in self.shape]
        return ",".join(f"{m}:{n}" for m, n in (blocks if 0 < len(blocks) <= SHOWN_BLOCKS else [self.block]))

    @property
    def adaptive(self) -> Evaluations | None:
        """The record of steps that are chosen token by token, if they are."""
        return self.steps.chosen if self.steps else None


# --- The predictors of Table 1: the teacher, skipped layers, a run, several runs together.


def teacher_predictor(teacher: Teacher) -> Predictor:
    """The teacher itself."""
    return Predictor("teacher", _keep, count_parameters(teacher))


def skip_predictor(teacher: Teacher, block: Block) -> Predictor:
    """The teacher without a block: the block's input stands in for its output.

    `block`: the layers that are left out.
    """
    m, n = block
    name = f"skip layer {m}" if n == m + 1 else f"skip layers {m}-{n - 1}"
    part = Part(m, n, "skip")
    return Predictor(name, _keep, _size_without(teacher, [part]), block, shape=(part,))


def run_predictors(
    run: runs.Run,
    step_counts: tuple[int, ...],
    teacher: Teacher,
    device: str,
    *,
    solver: Method | None = None,
    thresholds: tuple[float, ...] = (),
    stored: tuple[int, ...] = (),
) -> list[Predictor]:
    """A run's predictors: one for each number of steps and threshold, or the only one if it has no time.

    `thresholds`: of predictors whose steps are chosen token by token, at most the largest of `step_counts`.
    `stored`: states that batches hold: a run whose first layers were healed starts from `h[0]`, or from the
    tokens.
    """
    flow = runs.load_flow(run, teacher).to(device)
    size = _size_without(teacher, run.parts) + sum(weight.numel() for weight in flow.parameters())
    method: Method = solver or run.solver
    if not run.has_time:
        method, step_counts, thresholds = "euler", (1,), ()
    if len(run.parts) > 1:
        thresholds = ()

    tail, enter = _healed(run, teacher, stored, device)

    def predictor(predict: Predict, steps: Steps) -> Predictor:
        origin = Origin.of(run)
        return Predictor(
            run.label, predict, size, run.block, steps, origin, shape=run.parts, tail=tail, enter=enter
        )

    found = [
        predictor(_flowing(flow, method, k), Steps(k, method, run.evaluations(method, k)))
        for k in step_counts
    ]
    most = max(step_counts)
    for threshold in thresholds:
        assert method == "euler"
        chosen = Evaluations(threshold, keys_fraction(teacher))
        found.append(predictor(_choosing(flow, most, chosen), Steps(most, method, most, chosen)))
    return found


def _healed(
    run: runs.Run, teacher: Teacher, stored: tuple[int, ...], device: str
) -> tuple[Tail | None, Callable[[Batch], States] | None]:
    """What of a healed student is no longer the teacher's, after its last part and before its first."""
    if run.healed is None:
        return None, None
    own, (m, n) = runs.healed_teacher([run], teacher), run.block
    tail = Tail(own, n).to(device)
    if run.starts_at == m:
        return tail, None
    before = Layers(own, 0, m).to(device)
    embedding = None if 0 in stored else load_embedding(teacher).to(device)

    def enter(batch: Batch) -> States:
        x = batch.states[0] if embedding is None else embedding(batch.tokens, batch.position_ids)
        return before(x, batch.context)

    return tail, enter


def joined_predictors(
    student: Sequence[runs.Run], each: list[list[Predictor]], teacher: Teacher, device: str
) -> list[Predictor]:
    """Predictors of the student that has the parts of all these runs, one for each number of steps."""
    bridges = load_bridges(teacher, [run.block for run in student], device)
    most = max(len(predictors) for predictors in each)
    # A run without time has a single predictor.
    together = ([own[min(number, len(own) - 1)] for own in each] for number in range(most))
    return [_joined(chosen, bridges, count_parameters(teacher)) for chosen in together]


def _joined(chosen: list[Predictor], bridges: list[Layers], total: int) -> Predictor:
    steps = [one.steps for one in chosen if one.steps]
    blocks = [one.block for one in chosen if one.block]
    return Predictor(
        method=" + ".join(one.method for one in chosen),
        predict=_chained([one.predict for one in chosen], bridges),
        parameters=total + sum(one.parameters - total for one in chosen),
        block=(blocks[0][0], blocks[-1][1]),
        steps=Steps(
            k=max(each.k for each in steps),
            solver=" + ".join(dict.fromkeys(each.solver for each in steps)),
            nfe=sum(each.nfe for each in steps),
        ),
        origin=Origin.joined([one.origin for one in chosen if one.origin]),
        shape=tuple(part for one in chosen for part in one.shape),
    )


def _size_without(teacher: Teacher, parts: Sequence[Part]) -> int:
    """Parameters of the teacher without the layers that are replaced."""
    gone = (count_layer_parameters(teacher, index) for part in parts for index in range(*part.block))
    return count_parameters(teacher) - sum(gone)


def _keep(x: States, context: AttentionContext) -> States:
    del context
    return x


def _chained(predictions: list[Predict], bridges: list[Layers]) -> Predict:
    """One flow layer after the other, through the teacher's own layers between them."""

    def predict(x: States, context: AttentionContext) -> States:
        for index, one in enumerate(predictions):
            x = one(bridges[index - 1](x, context) if index else x, context)
        return x

    return predict


def _flowing(flow: nn.Module, method: Method, k: int) -> Predict:
    """`k` steps through a flow layer (algorithm 3)."""
    return lambda x_0, context: carry(flow, x_0, context, method, k)


def _velocity(flow: nn.Module, x_0: States, context: AttentionContext) -> VelocityField:
    """A flow layer in its context; a linear map sees that alone."""
    if not isinstance(flow, Velocity):
        return lambda x, t, step_size: flow(x, t, context)
    return lambda x, t, step_size: flow(x, t, context, source=x_0, step_size=step_size)


def _choosing(flow: nn.Module, most: int, evaluations: Evaluations) -> Predict:
    """As many steps as each token needs, and a record of them."""

    def predict(x_0: States, context: AttentionContext) -> States:
        sample = sample_adaptively(_velocity(flow, x_0, context), x_0, most, evaluations.threshold)
        evaluations.total += int(sample.evaluations.sum())
        evaluations.num_tokens += sample.evaluations.numel()
        return sample.x_1

    return predict
