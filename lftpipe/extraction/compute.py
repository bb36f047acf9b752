"""Computing all that a store lacks: here, in several processes, or on a cluster; one driver commits it."""

import dataclasses
from functools import partial

from lftpipe.base import progress
from lftpipe.base.device import device_kind
from lftpipe.base.executor import Job, Place, execute
from lftpipe.config.settings import ExtractSettings
from lftpipe.extraction.plan import Plan
from lftpipe.extraction.shard_job import (
    FrozenPlan,
    Producer,
    Result,
    Task,
    partly_stored,
    start_producer,
    taker,
    tasks_of,
)
from lftpipe.store import StoreWriter


def compute(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> int:
    """Compute and commit every pending shard; how many tokens that were."""
    pending = writer.pending()
    if not pending:
        return 0
    frozen = freeze(plan, writer, settings)
    total = sum(len(key.sequences) for key in pending) * plan.context
    token_bytes = sum(plan.array_bytes().values()) / (sum(plan.wanted.values()) * plan.context)
    here = settings.ray is None and settings.workers == 1
    elsewhere = settings.ray is not None  # another machine may have other weights under the same name
    with progress.task(f"extract {plan.teacher.name}", total, "tokens") as task:
        job = Job[Task, Result](
            tasks=tasks_of(frozen, pending),
            start=(lambda place: Producer(frozen, place.device, plan.teacher).run)
            if here
            else partial(start_producer, frozen, elsewhere),
            done=taker(writer.commit, writer.note),
            advance=lambda tokens: task.advance(
                tokens, written=progress.human_bytes((task.done + tokens) * token_bytes)
            ),
            size=lambda each: 0 if isinstance(each, str) else len(each.sequences) * plan.context,
            place=Place(settings.device, settings.threads),
        )
        try:
            execute(job, workers=settings.workers, ray=settings.ray)
        finally:
            if not here:  # what processes that were ended have left
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
