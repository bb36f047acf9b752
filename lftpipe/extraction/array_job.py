"""`--part I/N`: one process of a Slurm array or of torchrun, which computes its part and needs no driver."""

import os
import time
from typing import NamedTuple

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError, StoreBusyError
from lftpipe.config.settings import ExtractSettings
from lftpipe.extraction.plan import Plan
from lftpipe.extraction.shard_job import FrozenPlan, Producer, taker, tasks_of
from lftpipe.extraction.tokens import spec_of
from lftpipe.store import PartJournal, ShardKey, StoreSpec, StoreWriter, read_parts, read_plan, stored_records

#: Seconds between looks at a store that another process is packing tokens for, or completing.
PATIENCE = 0.5

#: Shards that are taken into the store together.
TOGETHER = 1024


class Part(NamedTuple):
    """The I-th of N parts; the first is 1."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


def parse_part(text: str) -> Part:
    """`3/8`, or `env`: what torchrun or Slurm say in the environment."""
    index, _, count = text.partition("/")
    if text == "env":
        index, count = _from_environment()
    try:
        part = Part(int(index), int(count))
    except ValueError:
        part = Part(0, 0)
    if not 1 <= part.index <= part.count:
        raise SettingsError(f"--part {text}", "I/N with I from 1 to N, or env", "pass --part 1/8, say")
    return part


def _from_environment() -> tuple[str, str]:
    """Of the places that say it, the first that tells several parts apart."""
    found = None
    for rank, count, first in (
        ("RANK", "WORLD_SIZE", "0"),
        ("SLURM_PROCID", "SLURM_NTASKS", "0"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", os.environ.get("SLURM_ARRAY_TASK_MIN", "0")),
    ):
        if rank in os.environ and count in os.environ:
            index = int(os.environ[rank]) - int(first) + 1
            found = found or (str(index), os.environ[count])
            if int(os.environ[count]) > 1:
                return str(index), os.environ[count]
    if found is None:
        raise SettingsError(
            "--part env",
            "RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS, in the environment",
            "start it by torchrun or srun, or pass --part 1/8, say",
        )
    return found


def frozen_plan(plan: Plan) -> FrozenPlan | None:
    """The plan in the store's folder, if it is for what is asked; None without one."""
    if (found := read_plan(plan.path)) is None:
        return None
    frozen, asked = FrozenPlan.from_json(found), spec_of(plan)
    wanted = asked.sequences in (frozen.spec.sequences, frozen.spec.details.get("asked"))
    return frozen if wanted and frozen.spec.fixed == asked.fixed else None


def compute_part(plan: Plan, frozen: FrozenPlan, settings: ExtractSettings, part: Part) -> int:
    """Compute what this part still lacks; how many tokens that were."""
    journal = PartJournal(frozen.path, part.index, part.count, frozen.digest)
    with journal.writing():
        mine = frozen.keys()[part.index - 1 :: part.count]
        stored = stored_records(frozen.path)
        todo = [key for key in mine if not _is_done(frozen, key, journal, stored)]
        total = sum(len(key.sequences) for key in todo) * plan.context
        if todo:
            producer = Producer(frozen, settings.device, plan.teacher, journal.attempts)
            measures = part.index == 1 and "compute_error" not in journal.notes
            label = f"extract {plan.teacher.name}, part {part.index} of {part.count}"
            with progress.task(label, total, "tokens") as task:
                tasks = tasks_of(frozen, todo) if measures else todo
                producer.run(tasks, taker(journal.append, journal.note), task.advance)
        journal.finish()
    return total


def _is_done(frozen: FrozenPlan, key: ShardKey, journal: PartJournal, stored: dict[str, int]) -> bool:
    files = [a.file(key.split, key.index) for a in frozen.spec.arrays.values() if a.computed]
    end = key.sequences.stop - key.index * frozen.spec.sequences_per_shard
    if all(stored.get(file, 0) >= end for file in files) or not key.sequences:
        return True
    return key in journal.sealed and journal.sealed[key].is_there(frozen.path)


def all_done(frozen: FrozenPlan, count: int) -> bool:
    """Whether all of so many parts are whole."""
    parts = read_parts(frozen.path, frozen.digest)
    return sum(each.done for each in parts if each.count == count) == count


def absorb_parts(writer: StoreWriter) -> None:
    """Take into the store what processes with `--part` have computed for it."""
    found = read_plan(writer.path)
    if found is None or not (parts := read_parts(writer.path, FrozenPlan.from_json(found).digest)):
        return
    sealed = [each for part in parts for each in part.sealed.values()]
    for first in range(0, len(sealed), TOGETHER):
        writer.commit(*sealed[first : first + TOGETHER])
    for part in parts:
        if part.notes and "compute_error" not in writer.spec.details:
            writer.note(**part.notes)


def open_when_free(plan: Plan, settings: ExtractSettings) -> StoreWriter | FrozenPlan:
    """The store to write, or as soon as another process has frozen it, its plan."""
    while True:
        if frozen := frozen_plan(plan):
            return frozen
        try:
            return StoreWriter.open(plan.path, spec_of(plan), resume=settings.resume)
        except StoreBusyError:
            time.sleep(PATIENCE)


def complete_when_free(plan: Plan, settings: ExtractSettings) -> StoreSpec:
    """Complete a store whose parts are all there; what it then holds.

    Another process may do it at the same time: it is waited for.
    """
    while True:
        try:
            with StoreWriter.open(plan.path, spec_of(plan), resume=settings.resume) as writer:
                if not writer.complete:
                    absorb_parts(writer)
                    writer.finish()
                return writer.spec
        except StoreBusyError:
            time.sleep(PATIENCE)
