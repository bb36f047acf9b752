"""`extract --rolling`: the teacher computes windows of states for the runs beside it, as many as fit."""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.config.settings import ExtractSettings
from lftpipe.extraction.compute import freeze
from lftpipe.extraction.plan import Plan
from lftpipe.extraction.shard_job import Producer, taker, tasks_of
from lftpipe.extraction.tokens import spec_of
from lftpipe.storage import storage_of
from lftpipe.store import (
    Reader,
    Roll,
    Rolled,
    ShardKey,
    StoreSpec,
    StoreWriter,
    planned_spec,
    producing,
    registered,
    was_left,
    window_shards,
)

#: Seconds between two looks at what the runs say, while there is nothing to compute.
POLL = 0.1


def check_rolling(settings: ExtractSettings) -> None:
    """Refuse what a rolling store cannot be."""
    spread = {"workers": settings.workers > 1, "ray": settings.ray, "part": settings.part}
    if (name := next((name for name, given in spread.items() if given), None)) is not None:
        raise SettingsError(
            f"--rolling with --{name}",
            "one process, which makes the windows in turn",
            f"leave out --{name}, or extract a whole store",
        )
    if settings.tokens_only:
        raise SettingsError(
            "--rolling with --tokens-only", "states, which come and go", "leave one of the two out"
        )


def rolling_spec(plan: Plan, *, force: bool) -> StoreSpec:
    """What a rolling store is to hold; one that is there keeps its windows.

    Raises `SettingsError` if the store is not a folder, or two windows do not fit under the cap.
    """
    if storage_of(plan.path).remote:
        raise SettingsError(
            f"--rolling with a store at {storage_of(plan.path).where}",
            "a folder: run and producer look at its files all the time",
            "name a local --store; a bucket has room for the whole",
        )
    spec = spec_of(plan)
    if not plan.wanted["train"]:
        raise SettingsError("--rolling without --tokens", "states to train on", "give --tokens")
    old = None if force else planned_spec(plan.path)
    shards = old.rolling if old is not None else 0
    return replace(spec, rolling=window_shards(spec, plan.rolling, shards))


def roll(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> tuple[Rolled, int]:
    """Make windows until every run that came has finished.

    Returns
    -------
    tuple
        What became of the shards, and how many tokens were computed.
    """
    with producing(writer.path):
        producer = Producer(freeze(plan, writer, settings), settings.device, plan.teacher)
        state = Roll(writer, plan.rolling)
        total = sum(len(key.sequences) for key in state.stays) * plan.context
        with progress.task(f"extract {plan.teacher.name}", total, "tokens") as task:
            stays = tasks_of(producer.plan, state.stays)
            producer.run(stays, taker(writer.commit, writer.note), task.advance)
            state.publish()
            progress.say(f"{writer.path} rolls: `lftpipe train` can begin")
            keys = _Keys(writer.path, state, task, plan.context)
            producer.run(keys, taker(state.commit, writer.note), task.advance)
        return state.summary(), task.done


class _Keys:
    """The shards to compute, one after the other; None where there is nothing to do or no room."""

    def __init__(self, path: Path, state: Roll, task: progress.Task, context: int) -> None:
        self._path, self._state, self._task, self._context = path, state, task, context

    def __iter__(self) -> Iterator[ShardKey | None]:
        seen = False
        while True:
            left, readers = was_left(self._path), registered(self._path)
            seen = seen or bool(readers)
            if seen and not readers:
                return
            self._aim(readers.values())
            key = self._state.next(readers.values())
            if key is None:
                if left and not readers:  # it came and left between two looks, or before
                    progress.say(f"no run reads {self._path} any more; begin one, and then this command")
                    return
                self._task.advance(0, **self._waits(readers))
                time.sleep(POLL)
            yield key

    def _aim(self, readers: Collection[Reader]) -> None:
        """What is left to compute, as far as one knows: until the last run ends, or for an epoch."""
        first = min((reader.position for reader in readers), default=0)
        last = max((reader.end for reader in readers), default=self._state.windows.total)
        self._task.aim(self._task.done + (last - first) * self._context)

    def _waits(self, readers: dict[Path, Reader]) -> dict[str, str]:
        """What the producer waits for, for the line of progress."""
        if not readers:
            return {"waits for": "the first run"}
        file, last = min(readers.items(), key=lambda each: each[1].position)
        window = self._state.windows.number(last.position)
        hint = f" (if it will not go on, delete {file})"
        return {"waits for": f"{Path(last.run).name} to pass window {window}{hint}"}
