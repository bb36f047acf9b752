"""What a shape loses, and what it costs: KL on held-back training sequences, parameters and seconds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.base import progress
from lftpipe.base.device import autocast, cast_linear, resolve_compute_dtype, synchronize
from lftpipe.base.shape import Part
from lftpipe.config.settings import PlanSettings
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.evaluation.metrics import LogitMetrics, NextTokens, Reference
from lftpipe.flow.part import carry
from lftpipe.results.plan import Cost
from lftpipe.store import Store
from lftpipe.teacher.layers import load_layer
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import Tail, count_parameters

#: Times that every module is timed; the fastest counts.
REPEATS = 5

#: A module, and the layers that it replaces.
Placed = tuple[nn.Module, tuple[int, int]]


class HeldBack:
    """The training sequences that no candidate learns from, and the teacher to compare with on them."""

    def __init__(self, store: Store, teacher: Teacher, sequences: range, settings: PlanSettings) -> None:
        self.sequences, self.last = sequences, teacher.num_layers
        self.device = torch.device(settings.device)
        self.dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
        self.reader = BatchReader(store, teacher, settings.device)
        self.tail = Tail(teacher, 0).to(self.device)
        cast_linear(self.tail, self.dtype)

    @torch.inference_mode()
    def scores(self, placed: Sequence[Placed]) -> Float[Tensor, "module sequence"]:
        """KL of the teacher with each module in place, by sequence: through the frozen layers after it."""
        fields = BatchFields(tuple(sorted({m for _, (m, _) in placed} | {self.last})))
        found = torch.zeros(len(placed), len(self.sequences), dtype=torch.float64)
        with (
            autocast(self.device, self.dtype),
            progress.task("score shapes", len(self.sequences), "sequences") as task,
        ):
            for column, sequence in enumerate(self.sequences):
                batch = self.reader.read("train", range(sequence, sequence + 1), fields)
                reference = Reference.of(self.tail.logits(batch.states[self.last].flatten(0, 1)))
                following = NextTokens.of(batch.tokens, batch.first_of_segment)
                for row, (module, (m, n)) in enumerate(placed):
                    end = carry(module, batch.states[m], batch.context)
                    metrics = LogitMetrics()
                    states = self.tail.states(end, batch.context, start=n).flatten(0, 1)
                    metrics.add(self.tail.logits(states), reference, following)
                    found[row, column] = metrics.kl
                task.advance(1)
        return found


def mean_and_error(kls: Float[Tensor, "*module sequence"]) -> tuple[Tensor, Tensor]:
    """Means over sequences, and their standard errors."""
    return kls.mean(-1), kls.std(-1) / kls.shape[-1] ** 0.5


class Costs:
    """Parameters of parts, and their seconds a token as measured here; parts of one form share a measure."""

    def __init__(self, held_back: HeldBack, teacher: Teacher) -> None:
        first = held_back.sequences.start
        reader, fields = held_back.reader, BatchFields((held_back.last,))
        self._many = reader.read("train", range(first, first + min(4, len(held_back.sequences))), fields)
        self._x = self._many.states[held_back.last]
        self._one = replace(
            self._many,
            tokens=self._many.tokens[:1, :1],
            position_ids=self._many.position_ids[:1, :1],
            document=None,
            places=None,
            states={},
        )
        self._known: dict[tuple[object, ...], tuple[float, float]] = {}
        self.layers = [self._layer(teacher, index) for index in range(teacher.num_layers)]
        logits = held_back.tail.logits
        seconds = (self._seconds(logits, self._x), self._seconds(logits, self._x[:1, :1]))
        parameters = count_parameters(teacher) - sum(cost.parameters for cost in self.layers)
        self.around = Cost(parameters=parameters, layers=0, prefill=seconds[0], decode=seconds[1])

    def _layer(self, teacher: Teacher, index: int) -> Cost:
        layer = load_layer(teacher, index).to(self._x.device)
        count = sum(weight.numel() for weight in layer.parameters())
        key = ("teacher", count)
        if key not in self._known:
            self._known[key] = self._measured(lambda x, batch: layer(x, batch.context))
        return self._cost(key, count, 1)

    def of(self, part: Part, module: nn.Module) -> Cost:
        """Of a part."""
        count = sum(weight.numel() for weight in module.parameters())
        key = (part.kind, part.depth, part.loops, part.width, count)
        if part.kind == "skip":
            self._known[key] = (0.0, 0.0)
        if key not in self._known:
            self._known[key] = self._measured(lambda x, batch: carry(module, x, batch.context))
        return self._cost(key, count, part.layers)

    def _cost(self, key: tuple[object, ...], parameters: int, layers: int) -> Cost:
        prefill, decode = self._known[key]
        return Cost(parameters=parameters, layers=layers, prefill=prefill, decode=decode)

    def _measured(self, run: Callable[[Tensor, Batch], object]) -> tuple[float, float]:
        many = self._seconds(lambda x: run(x, self._many), self._x)
        return many, self._seconds(lambda x: run(x, self._one), self._x[:1, :1])

    @torch.inference_mode()
    def _seconds(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        """Seconds a token; the first time only warms up."""
        found: list[float] = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            run(x)
            synchronize(x.device)
            found.append(time.perf_counter() - began)
        return min(found[1:]) / x[..., 0].numel()
