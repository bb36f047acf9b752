"""Computing all that a store lacks: here, in several processes, or on a cluster; one driver commits it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from lftpipe.base import progress
from lftpipe.base.device import device_kind
from lftpipe.config.settings import ExtractSettings
from lftpipe.extraction.async_writer import Commit
from lftpipe.extraction.forward import Advance
from lftpipe.extraction.plan import Plan
from lftpipe.extraction.shard_job import FrozenPlan, Producer, needs_measure, partly_stored
from lftpipe.store import ShardKey, StoreWriter
from lftpipe.teacher.source import Teacher


class Work(NamedTuple):
    """What an executor is given: it chooses who computes what, and nothing else."""

    plan: FrozenPlan
    teacher: Teacher
    settings: ExtractSettings
    keys: list[ShardKey]
    measure: bool
    """Whether to measure the error of bfloat16 first."""
    commit: Commit
    """Takes a shard into the store; from one thread at a time."""
    note: Callable[[dict[str, Any]], object]
    """Takes what was measured."""
    advance: Advance
    """Called with the number of tokens that were computed."""


def compute(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> int:
    """Compute and commit every pending shard; how many tokens that were."""
    pending = writer.pending()
    if not pending:
        return 0
    frozen = freeze(plan, writer, settings)
    total = sum(len(key.sequences) for key in pending) * plan.context
    token_bytes = sum(plan.array_bytes().values()) / (sum(plan.wanted.values()) * plan.context)
    with progress.task(f"extract {plan.teacher.name}", total, "tokens") as task:
        work = Work(
            plan=frozen,
            teacher=plan.teacher,
            settings=settings,
            keys=pending,
            measure=needs_measure(frozen),
            commit=writer.commit,
            note=lambda found: writer.note(compute_error=found),
            advance=lambda tokens: task.advance(
                tokens, written=progress.human_bytes((task.done + tokens) * token_bytes)
            ),
        )
        execute = _executor(settings)
        try:
            execute(work)
        finally:
            if execute is not run_here:  # what processes that were ended have left
                writer.discard_attempts()
    return total


def freeze(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> FrozenPlan:
    """Write `plan.json`; results of earlier drivers are void from now on."""
    frozen = FrozenPlan(
        path=writer.path.resolve(),
        spec=writer.spec,
        kind=device_kind(settings.device),
        model=plan.teacher.model,
        workspace=str(settings.workspace.resolve()),
        revision=settings.revision,
        stream_layers=settings.stream_layers,
        partly=partly_stored(writer),
    )
    writer.begin_epoch(frozen.to_json())
    return dataclasses.replace(frozen, epoch=writer.epoch)


def _executor(settings: ExtractSettings) -> Callable[[Work], None]:
    if settings.ray is not None:
        from lftpipe.extraction.ray_tasks import run_on_ray

        return run_on_ray
    if settings.workers > 1:
        from lftpipe.extraction.workers import run_workers

        return run_workers
    return run_here


def run_here(work: Work) -> None:
    """Compute everything in this process."""
    producer = Producer(work.plan, work.settings.device, work.teacher)
    if work.measure:
        work.note(producer.measure())
    producer.run(work.keys, work.commit, work.advance)
