"""Students scored over the whole validation split of a store, from its cached states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lftpipe import progress, runs
from lftpipe.compute import cast_linear, resolve_compute_dtype
from lftpipe.flow.adaptive import sample_adaptively
from lftpipe.flow.path import States
from lftpipe.flow.solver import EVALUATIONS, Method, ODESolver, VelocityField
from lftpipe.flow.velocity import Velocity
from lftpipe.metrics import LogitMetrics, Reference, StateMetrics
from lftpipe.packing import positions
from lftpipe.settings import ComputeDtype
from lftpipe.store import Store
from lftpipe.teacher.family import AttentionContext, attention_context
from lftpipe.teacher.parts import (
    Tail,
    count_layer_parameters,
    count_parameters,
    keys_share,
    load_layer,
    load_rotary,
)
from lftpipe.teacher.source import Teacher


@dataclass
class Evaluations:
    """How often tokens were evaluated whose steps were chosen one by one."""

    threshold: float
    keys_share: float
    """What keys and values cost, as a share of an evaluation."""
    total: int = 0
    num_tokens: int = 0

    def plain(self, most: int) -> dict[str, Any]:
        """Mean evaluations of a token, without and with the keys and values that finished tokens make."""
        mean = self.total / self.num_tokens
        with_keys = mean + self.keys_share * (most - mean)
        return {"nfe": mean, "nfe_with_keys": with_keys, "threshold": self.threshold}


@dataclass
class Row:
    """One row of Table 1: how `h[m]` becomes a prediction of `h[n]`, and what comes of it."""

    method: str
    block: tuple[int, int] | None
    predict: Callable[[States, AttentionContext], States]
    parameters: int
    nfe: int | None = None
    k: int | None = None
    solver: str | None = None
    objective: str | None = None
    run: str | None = None
    seed: int | None = None
    train_tokens: int | None = None
    state: StateMetrics = field(default_factory=StateMetrics)
    logits: LogitMetrics = field(default_factory=LogitMetrics)
    ms_per_token: float = math.inf
    parts: tuple[str, ...] = ()
    """Blocks of a student of several flow layers; `block` then spans them all."""
    evaluations: Evaluations | None = None
    """Of a row whose steps are chosen token by token; `k` is then their largest number."""

    @property
    def block_text(self) -> str:
        assert self.block is not None
        return ",".join(self.parts) or f"{self.block[0]}:{self.block[1]}"

    def plain(self) -> dict[str, Any]:
        known = self.block is not None and self.state.num_tokens > 0
        chosen = {} if self.evaluations is None else self.evaluations.plain(self.k or 0)
        return {
            "method": self.method,
            "block": None if self.block is None else self.block_text,
            "objective": self.objective,
            "solver": self.solver,
            "k": self.k,
            "nfe": self.nfe,
            "kl_latent": self.state.kl_latent if known else None,
            "nmse": self.state.nmse if known else None,
            "nmse_without_first": self.state.nmse_without_first if known else None,
            "kl": self.logits.kl if self.block is not None else None,
            "ppl": self.logits.perplexity,
            "parameters": self.parameters,
            "ms_per_token": None if math.isinf(self.ms_per_token) else self.ms_per_token,
            "run": self.run,
            "seed": self.seed,
            "train_tokens": self.train_tokens,
        } | chosen


@dataclass(frozen=True)
class Batch:
    """Some validation sequences; their states are read as they are needed."""

    rows: range
    tokens: Int[Tensor, "sequence position"]
    first: Bool[Tensor, "sequence position"]
    context: AttentionContext


def run_rows(
    run: runs.Run,
    step_counts: tuple[int, ...],
    teacher: Teacher,
    device: str,
    *,
    solver: Method | None = None,
    thresholds: tuple[float, ...] = (),
) -> list[Row]:
    """A run's rows: one for each number of steps and threshold, or the only one if it has no time.

    Parameters
    ----------
    solver
        Left out, that of training.
    thresholds
        Of rows whose steps are chosen token by token, at most the largest of `step_counts`.
    """
    m, n = run.block
    flow = runs.load_flow(run, teacher).to(device)
    size = count_parameters(teacher) - (n - m) * count_layer_parameters(teacher)
    size += sum(parameter.numel() for parameter in flow.parameters())
    steps: list[tuple[Method, int]] = [("euler", 1)]
    if run.has_time:
        steps = [(solver or run.solver, k) for k in step_counts]
    rows = [
        Row(
            method=run.objective,
            block=run.block,
            predict=_flowing(flow, method, k),
            parameters=size,
            nfe=EVALUATIONS[method] * k,
            k=k,
            solver=method,
            objective=run.objective,
            run=run.path.name,
            seed=run.seed,
            train_tokens=run.train_tokens,
        )
        for method, k in steps
    ]
    most = max(rows, key=lambda row: row.k or 0)
    for threshold in thresholds if run.has_time else ():
        assert most.solver == "euler" and most.k is not None
        evaluations = Evaluations(threshold, keys_share(teacher))
        rows.append(
            replace(
                most,
                predict=_choosing(flow, most.k, evaluations),
                nfe=None,
                evaluations=evaluations,
                state=StateMetrics(),
                logits=LogitMetrics(),
            )
        )
    return rows


def together_rows(each: list[list[Row]], teacher: Teacher, device: str) -> list[Row]:
    """Rows of the student that has all the flow layers, one for each number of steps.

    Parameters
    ----------
    each
        The rows of every run, as `run_rows` gives them, in the order of their blocks.
    """
    most = max(len(rows) for rows in each)
    blocks = [rows[0].block or (0, 0) for rows in each]
    bridges = [
        nn.ModuleList(load_layer(teacher, layer) for layer in range(n, m)).to(device)
        for (_, n), (m, _) in pairwise(blocks)
    ]
    joined = []
    for number in range(most):
        chosen = [rows[min(number, len(rows) - 1)] for rows in each]  # one without time has a single row
        more = sum(row.parameters - count_parameters(teacher) for row in chosen[1:])
        joined.append(
            Row(
                method=" + ".join(row.method for row in chosen),
                block=(blocks[0][0], blocks[-1][1]),
                parts=tuple(row.block_text for row in chosen),
                predict=_chained([row.predict for row in chosen], bridges),
                parameters=chosen[0].parameters + more,
                nfe=sum(row.nfe or 0 for row in chosen),
                k=max(row.k or 0 for row in chosen),
                solver=" + ".join(dict.fromkeys(row.solver or "" for row in chosen)),
                objective=" + ".join(dict.fromkeys(row.objective or "" for row in chosen)),
                run=" + ".join(row.run or "" for row in chosen),
                seed=chosen[0].seed,
                train_tokens=max(row.train_tokens or 0 for row in chosen),
            )
        )
    return joined


def _chained(
    predictions: list[Callable[[States, AttentionContext], States]], bridges: list[nn.ModuleList]
) -> Callable[[States, AttentionContext], States]:
    """One flow layer after the other, through the teacher's own layers between them."""

    def predict(x: States, context: AttentionContext) -> States:
        for index, one in enumerate(predictions):
            for layer in bridges[index - 1] if index else ():
                x = layer(x, context)
            x = one(x, context)
        return x

    return predict


def _flowing(flow: nn.Module, method: Method, k: int) -> Callable[[States, AttentionContext], States]:
    """`k` steps through a flow layer (algorithm 3)."""

    def predict(x_0: States, context: AttentionContext) -> States:
        return ODESolver(_velocity(flow, x_0, context), method).sample(x_0, k)

    return predict


def _velocity(flow: nn.Module, x_0: States, context: AttentionContext) -> VelocityField:
    """A flow layer in its context; a linear map sees no source."""
    source = {"source": x_0} if isinstance(flow, Velocity) else {}
    return lambda x, t: flow(x, t, context, **source)


def _choosing(
    flow: nn.Module, most: int, evaluations: Evaluations
) -> Callable[[States, AttentionContext], States]:
    """As many steps as each token needs, and a record of them."""

    def predict(x_0: States, context: AttentionContext) -> States:
        sample = sample_adaptively(_velocity(flow, x_0, context), x_0, most, evaluations.threshold)
        evaluations.total += int(sample.evaluations.sum())
        evaluations.num_tokens += sample.evaluations.numel()
        return sample.x_1

    return predict


def _batches(store: Store, batch_tokens: int, device: str, rotary: nn.Module) -> Iterator[Batch]:
    """The whole validation split, with every state that the store holds of it read on demand."""
    step = max(1, batch_tokens // store.context)
    total = store.num_sequences("validation")
    tokens, document = store.tokens("validation"), store.document("validation")
    for start in range(0, total, step):
        rows = range(start, min(start + step, total))
        places = torch.from_numpy(positions(document[start : rows.stop])).long().to(device)
        yield Batch(
            rows=rows,
            tokens=torch.from_numpy(tokens[start : rows.stop]).long().to(device),
            first=places == 0,
            context=attention_context(rotary, places),
        )


@torch.inference_mode()
def score(
    rows: list[Row],
    store: Store,
    teacher: Teacher,
    *,
    batch_tokens: int,
    compute_dtype: ComputeDtype,
    device: str,
    timed_batches: int = 0,
) -> None:
    """Fill in every row's metrics over the whole validation split, and its time if any batch is timed."""
    start = min((row.block[0] for row in rows if row.block), default=max(store.layers))
    dtype = resolve_compute_dtype(compute_dtype, device)
    tail = Tail(teacher, start).to(device)
    cast_linear(tail, dtype)
    rotary = load_rotary(teacher).to(device)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    total = store.num_sequences("validation") * store.context * len(rows)
    with autocast, progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for index, batch in enumerate(_batches(store, batch_tokens, device, rotary)):
            read = _Reader(store, batch.rows, device)
            for n, group in groupby(
                sorted(rows, key=lambda row: _end(row, store)), lambda row: _end(row, store)
            ):
                x_1 = read(n)
                teacher_logits = tail(x_1, batch.context, start=n)
                reference = Reference.of(teacher_logits)
                for row in group:
                    _add(row, read, tail, batch, x_1, n, teacher_logits, reference)
                    task.advance(batch.tokens.numel())
            if index < timed_batches and len(batch.rows) > 0:
                _time(rows, read, tail, batch, start)


def _end(row: Row, store: Store) -> int:
    """The cached state whose logits a row is compared with: its block's end if stored, else the last."""
    return row.block[1] if row.block and row.block[1] in store.layers else max(store.layers)


def _add(
    row: Row,
    read: "_Reader",
    tail: Tail,
    batch: Batch,
    x_1: States,
    n: int,
    teacher_logits: Tensor,
    reference: Reference,
) -> None:
    if row.block is None:
        row.logits.add(teacher_logits, reference, batch.tokens, batch.first)
        return
    predicted = row.predict(read(row.block[0]), batch.context).float()
    if row.block[1] == n:
        row.state.add(predicted, x_1, batch.first)
    logits = tail(predicted, batch.context, start=row.block[1])
    row.logits.add(logits, reference, batch.tokens, batch.first)


def _time(rows: list[Row], read: "_Reader", tail: Tail, batch: Batch, start: int) -> None:
    """Time every row over the same stretch, from `h[start]` to the logits; the fastest batch counts."""
    for row in rows:
        if row.evaluations is not None:  # its batches are evaluated whole: a clock would say nothing
            continue
        x = read(start)
        began = time.perf_counter()
        m, n = row.block or (start, start)
        x = tail.states(x, batch.context, start=start, stop=m)
        tail(row.predict(x, batch.context), batch.context, start=n)
        if x.is_cuda:
            torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - began) / batch.tokens.numel()
        row.ms_per_token = min(row.ms_per_token, milliseconds)


class _Reader:
    """States of some validation sequences, each read once."""

    def __init__(self, store: Store, rows: range, device: str) -> None:
        self._store, self._rows, self._device = store, rows, device
        self._states: dict[int, States] = {}

    def __call__(self, layer: int) -> States:
        if layer not in self._states:
            state = torch.from_numpy(self._store.read("validation", layer, self._rows))
            self._states[layer] = state.to(self._device, torch.float32)
        return self._states[layer]
