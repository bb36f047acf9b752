"""Rows of Table 1: every way to predict a block's end, and the figures that it will be given."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lftpipe import runs
from lftpipe.evaluation.metrics import LogitMetrics, StateMetrics
from lftpipe.flow.adaptive import sample_adaptively
from lftpipe.flow.path import States
from lftpipe.flow.solver import EVALUATIONS, Method, ODESolver, VelocityField
from lftpipe.flow.velocity import Velocity
from lftpipe.teacher.family import AttentionContext
from lftpipe.teacher.parts import Layers, count_layer_parameters, count_parameters, keys_share, load_bridges
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
    weights_digest: str | None = None
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
            "weights_digest": self.weights_digest,
        } | chosen


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
            weights_digest=run.weights_digest,
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
    bridges = load_bridges(teacher, blocks, device)
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
                weights_digest=" + ".join(row.weights_digest or "" for row in chosen),
            )
        )
    return joined


def _chained(
    predictions: list[Callable[[States, AttentionContext], States]], bridges: list[Layers]
) -> Callable[[States, AttentionContext], States]:
    """One flow layer after the other, through the teacher's own layers between them."""

    def predict(x: States, context: AttentionContext) -> States:
        for index, one in enumerate(predictions):
            x = one(bridges[index - 1](x, context) if index else x, context)
        return x

    return predict


def _flowing(flow: nn.Module, method: Method, k: int) -> Callable[[States, AttentionContext], States]:
    """`k` steps through a flow layer (algorithm 3)."""

    def predict(x_0: States, context: AttentionContext) -> States:
        return ODESolver(_velocity(flow, x_0, context)).sample(x_0, 1 / k, method)

    return predict


def _velocity(flow: nn.Module, x_0: States, context: AttentionContext) -> VelocityField:
    """A flow layer in its context; a linear map sees that alone."""
    if not isinstance(flow, Velocity):
        return lambda x, t, step_size: flow(x, t, context)
    return lambda x, t, step_size: flow(x, t, context, source=x_0, step_size=step_size)


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
