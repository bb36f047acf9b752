"""`lftpipe evaluate`: Table 1 and the curve of figure 5, from the cached validation states.

Of the teacher only the layers from the blocks' first on, the final norm and the head are loaded.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lftpipe import manifest, progress, runs
from lftpipe.errors import RunError, SettingsError, StoreError
from lftpipe.flow.path import States
from lftpipe.flow.solver import EVALUATIONS, Method, ODESolver
from lftpipe.metrics import LogitMetrics, Reference, StateMetrics
from lftpipe.packing import positions
from lftpipe.results import COLUMNS, cell, markdown_table
from lftpipe.settings import EvaluateSettings, to_plain
from lftpipe.stages.train import teacher_of
from lftpipe.store import Store
from lftpipe.teacher.compute import resolve_compute_dtype
from lftpipe.teacher.family import AttentionContext, attention_context
from lftpipe.teacher.parts import Tail, count_layer_parameters, count_parameters, load_rotary
from lftpipe.teacher.source import Teacher
from lftpipe.workspace import find_runs, find_store

#: Batches that every row is timed on.
TIMED_BATCHES = 3


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

    def plain(self) -> dict[str, Any]:
        known = self.block is not None and self.state.num_tokens > 0
        return {
            "method": self.method,
            "block": None if self.block is None else f"{self.block[0]}:{self.block[1]}",
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
            "ms_per_token": self.ms_per_token,
            "run": self.run,
            "seed": self.seed,
            "train_tokens": self.train_tokens,
        }


@dataclass(frozen=True)
class Batch:
    """Some validation sequences; their states are read as they are needed."""

    rows: range
    tokens: Int[Tensor, "sequence position"]
    first: Bool[Tensor, "sequence position"]
    context: AttentionContext


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Score teacher, skips and runs over the whole validation split, and write the table.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    LftpipeError
        If a run is missing or of another store, or the store lacks a state.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    store_path = find_store(settings.workspace, settings.store)
    store = Store.open(store_path)
    out = settings.out or store_path.parent / "results.json"
    if out.suffix == ".md":
        raise SettingsError(f"--out {out}", "the JSON file's name", "end it in .json; the .md goes beside it")
    for file in (out, out.with_suffix(".md")):
        if file.exists() and not settings.force:
            raise SettingsError(f"--out {file}, which exists", "a new file", "pass --force or another --out")
    if store.num_sequences("validation") == 0:
        raise StoreError(
            f"store {store_path} without validation sequences",
            "at least one",
            "extract with --validation-tokens",
        )
    opened = [runs.open_run(path) for path in find_runs(store_path, settings.runs)]
    for run in opened:
        if run.store_fingerprint != store.fingerprint:
            raise RunError(
                f"{run.path}, trained from another store than {store_path}",
                "runs of this store",
                "name the run's store with --store, or train again",
            )
    teacher = teacher_of(store, settings.workspace)
    rows = _rows(opened, settings, store, teacher)
    _score(rows, settings, store, teacher)
    result = {
        "teacher": teacher.name,
        "store": str(store_path),
        "store_fingerprint": store.fingerprint,
        "validation_tokens": store.num_sequences("validation") * store.context,
        "compute_dtype": settings.compute_dtype,
        "settings": to_plain(settings),
        "rows": [row.plain() for row in rows],
    }
    manifest.write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    manifest.write_atomic(out.with_suffix(".md"), markdown(result).encode())
    return result | {"out": str(out)}


def _keep(x: States, context: AttentionContext) -> States:
    """A skipped block: its input stands in for its output."""
    del context
    return x


def _rows(opened: list[runs.Run], settings: EvaluateSettings, store: Store, teacher: Teacher) -> list[Row]:
    """Teacher, the skips of each block's first layers, each whole block skipped, then the runs."""
    total, layer = count_parameters(teacher), count_layer_parameters(teacher)
    blocks = {run.block for run in opened}
    first_layers = {
        (m, m + count) for m, _ in blocks for count in settings.skips if m + count <= teacher.num_layers
    }
    rows = [Row("teacher", None, _keep, total)]
    for m, n in sorted(first_layers | blocks):
        name = f"skip layer {m}" if n == m + 1 else f"skip layers {m}-{n - 1}"
        rows.append(Row(name, (m, n), _keep, total - (n - m) * layer, nfe=0))
    for run in opened:
        m, n = run.block
        absent = [state for state in run.block if state not in store.layers]
        if absent:
            raise RunError(
                f"run {run.path} of block {m}:{n}", f"state {absent[0]} in the store", "extract it"
            )
        flow = runs.load_flow(run, teacher).to(settings.device)
        size = total - (n - m) * layer + sum(parameter.numel() for parameter in flow.parameters())
        steps: list[tuple[Method, int]] = [("euler", 1)]
        if run.has_time:
            steps = [(run.solver, k) for k in settings.k]
        for method, k in steps:
            rows.append(
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
            )
    return rows


def _flowing(flow: nn.Module, method: Method, k: int) -> Callable[[States, AttentionContext], States]:
    """`k` steps through a flow layer (algorithm 3)."""

    def predict(x_0: States, context: AttentionContext) -> States:
        return ODESolver(lambda x, t: flow(x, t, context), method).sample(x_0, k)

    return predict


def _batches(store: Store, settings: EvaluateSettings, rotary: nn.Module) -> Iterator[Batch]:
    """The whole validation split, with every state that the store holds of it read on demand."""
    step = max(1, settings.batch_tokens // store.context)
    total = store.num_sequences("validation")
    tokens, document = store.tokens("validation"), store.document("validation")
    for start in range(0, total, step):
        rows = range(start, min(start + step, total))
        places = torch.from_numpy(positions(document[start : rows.stop])).long().to(settings.device)
        yield Batch(
            rows=rows,
            tokens=torch.from_numpy(tokens[start : rows.stop]).long().to(settings.device),
            first=places == 0,
            context=attention_context(rotary, places),
        )


@torch.inference_mode()
def _score(rows: list[Row], settings: EvaluateSettings, store: Store, teacher: Teacher) -> None:
    """Fill in every row's metrics and time."""
    start = min((row.block[0] for row in rows if row.block), default=max(store.layers))
    tail = Tail(teacher, start).to(settings.device)
    rotary = load_rotary(teacher).to(settings.device)
    compute_dtype = resolve_compute_dtype(settings.compute_dtype, settings.device)
    autocast = torch.autocast(
        torch.device(settings.device).type, compute_dtype, enabled=compute_dtype != torch.float32
    )
    total = store.num_sequences("validation") * store.context * len(rows)
    with autocast, progress.task(f"evaluate {teacher.name}", total, "tokens") as task:
        for index, batch in enumerate(_batches(store, settings, rotary)):
            read = _Reader(store, batch.rows, settings.device)
            for n, group in groupby(
                sorted(rows, key=lambda row: _end(row, store)), lambda row: _end(row, store)
            ):
                x_1 = read(n)
                teacher_logits = tail(x_1, batch.context, start=n)
                reference = Reference.of(teacher_logits)
                for row in group:
                    _add(row, read, tail, batch, x_1, n, teacher_logits, reference)
                    task.advance(batch.tokens.numel())
            if index < TIMED_BATCHES and len(batch.rows) > 0:
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


def markdown(result: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    lines = [
        f"# Results: {result['teacher']}",
        "",
        f"{result['validation_tokens']:,} validation tokens, evaluated in {result['compute_dtype']}. "
        "ms/token is from the first block's input to the logits, the same stretch for every row.",
        "",
        *markdown_table(result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> Table:
    """The table for a terminal."""
    title = f"{result['teacher']}: {result['validation_tokens']:,} validation tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = ("method", "block", "k", "nfe", "kl_latent", "nmse", "nmse_without_first", "kl", "ppl")
    for key in shown:
        left = key in ("method", "block")
        table.add_column(COLUMNS[key], justify="left" if left else "right", no_wrap=left)
    for row in result["rows"]:
        table.add_row(*(cell(row[key]) for key in shown))
    table.caption = f"written to {result['out']} and {Path(result['out']).with_suffix('.md')}"
    return table
