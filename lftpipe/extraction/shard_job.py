"""What a process needs to compute a store's shards by itself, and how it computes one."""

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from lftpipe.base.device import device_kind
from lftpipe.base.errors import SettingsError, TeacherError
from lftpipe.base.executor import Advance, Done, Place, Worker
from lftpipe.base.files import fingerprint
from lftpipe.extraction.forward import Passes, bf16_error
from lftpipe.store import Sealed, ShardKey, StoreSpec, StoreWriter
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.thread_pool import Lanes
from lftpipe.teacher.trunk import Head, Trunk, load_trunk

# --- What an extraction computes, frozen: enough for any process to compute any shard of it.


@dataclass(frozen=True, kw_only=True)
class FrozenPlan:
    """The content of `plan.json`: what is to be computed, from what, and on what kind of device."""

    path: Path
    """The store, absolute."""
    spec: StoreSpec
    kind: str
    """The kind of device: others may round differently."""
    model: str
    workspace: str
    revision: str | None
    stream_layers: bool
    """Whether a process holds one layer of the teacher at a time."""
    partly: tuple[tuple[str, int, int], ...]
    """Shards that were stored in part when the plan was made: split, index, sequences."""
    epoch: int = 0
    """How many times the store was opened to be computed; see `StoreWriter.begin_epoch`."""

    def keys(self) -> list[ShardKey]:
        """Every shard, less what was stored of it in part when the plan was made."""
        begun = {(split, index): count for split, index, count in self.partly}
        return [
            ShardKey(key.split, key.index, key.sequences[begun.get((key.split, key.index), 0) :])
            for key in self.spec.shard_keys()
        ]

    def open_teacher(self) -> Teacher:
        """The teacher; see `check_teacher`."""
        return open_teacher(
            self.model,
            Path(self.workspace),
            revision=self.revision,
        )

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse weights that are not those of the plan, as another machine may have under the same name."""
        if teacher.identity() != self.spec.identity["teacher"]:
            raise TeacherError(
                f"model {teacher.model} with other files than the plan's",
                f"those of {self.path}",
                "give every machine the same",
            )

    def check_device(self, device: str) -> None:
        """Refuse another kind of device than the plan's."""
        if (kind := device_kind(device)) != self.kind:
            raise SettingsError(
                f"a device of kind {kind} for {self.path}", self.kind, "compute all of a store on one kind"
            )

    @property
    def digest(self) -> str:
        """Of what decides what each shard holds, not of who computes it when."""
        return fingerprint([self.spec.content, self.kind, self.partly])

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {
            "path": str(self.path),
            "spec": self.spec.to_json(),
            "kind": self.kind,
            "teacher": {
                "model": self.model,
                "workspace": self.workspace,
                "revision": self.revision,
                "stream_layers": self.stream_layers,
            },
            "partly": [list(each) for each in self.partly],
            "epoch": self.epoch,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "FrozenPlan":
        """The plan that `to_json` gave."""
        return cls(
            path=Path(value["path"]),
            spec=StoreSpec.from_json(value["spec"]),
            kind=value["kind"],
            partly=tuple((split, index, count) for split, index, count in value["partly"]),
            epoch=value["epoch"],
            **value["teacher"],
        )


def partly_stored(writer: StoreWriter) -> tuple[tuple[str, int, int], ...]:
    """The shards that an earlier, smaller extraction left to be continued: at most the last of each split."""
    whole = {(key.split, key.index): key.sequences.start for key in writer.spec.shard_keys()}
    begun = ((key, key.sequences.start - whole[key.split, key.index]) for key in writer.pending())
    return tuple((key.split, key.index, count) for key, count in begun if count)


# --- Computing shards of a plan, on whatever machine, without the store's lock.

#: A shard to compute; or the error of the compute dtype to measure, once in a store's life.
Task = ShardKey | Literal["measure"]
#: What comes of it: the shard's files are on the disk, under names of this attempt.
Result = Sealed | dict[str, Any]


class Producer:
    """A teacher that computes shards of a plan; it is loaded when the first one is asked for.

    `teacher`: the plan's teacher.
    `attempts`: how the names of the files begin; left out, with the plan's epoch.
    """

    def __init__(self, plan: FrozenPlan, device: str, teacher: Teacher, attempts: str | None = None) -> None:
        plan.check_device(device)
        self.plan, self.device, self.teacher = plan, device, teacher
        # No other process, living or thought dead, may ever use the same names.
        self._attempt = f"{attempts or f'e{plan.epoch}'}-{uuid.uuid4().hex[:12]}"

    def run(
        self,
        tasks: Iterable[Task | None],
        done: Done[Task, Result],
        advance: Advance = lambda _: None,
    ) -> None:
        """Do tasks; `done` is called in a thread, in the order of the shards, `advance` with tokens."""
        shards = self._shards(tasks, done)
        first = next(shards, None)  # measures, which before the first shard takes less memory
        self._passes.run(itertools.chain([first], shards), lambda sealed: done(sealed.key, sealed), advance)

    def _shards(self, tasks: Iterable[Task | None], done: Done[Task, Result]) -> Iterator[ShardKey | None]:
        for task in tasks:
            if isinstance(task, str):
                done(task, self._measure())
            else:
                yield task

    def _measure(self) -> dict[str, Any]:
        with Lanes(1) if torch.device(self.device).type == "cpu" else nullcontext():
            return bf16_error(
                self.plan.path,
                self.plan.spec,
                lambda: self._load_trunk(torch.float32, "cpu"),
                lambda: self._trunk,
                self.device,
            )

    @cached_property
    def _trunk(self) -> Trunk:
        return self._load_trunk(getattr(torch, self.plan.spec.identity["compute_dtype"]), self.device)

    @cached_property
    def _passes(self) -> Passes:
        spec = self.plan.spec
        head = Head(self.teacher, spec.logits, self.device) if spec.logits else None
        # A whole shard where layers are streamed: each is read once for it.
        streamed = self.plan.stream_layers
        sequences = spec.sequences_per_shard if streamed else spec.identity["batch_sequences"]
        return Passes(self.plan.path, spec, self._trunk, head, self._attempt, sequences)

    def _load_trunk(self, compute_dtype: torch.dtype, device: str) -> Trunk:
        """The layers below the deepest state that is stored; logits need the last state."""
        spec = self.plan.spec
        deepest = self.teacher.num_layers if spec.logits else max(spec.layers)
        stream = spec.identity["batch_sequences"] if self.plan.stream_layers else None
        return load_trunk(
            self.teacher, deepest, compute_dtype, device if stream is None else self.device, stream
        )


def start_producer(plan: FrozenPlan, check: bool, place: Place) -> Worker[Task, Result]:
    """Begin a producer in a process of its own; `check` compares its teacher's files with the plan's."""
    teacher = plan.open_teacher()
    if check:
        plan.check_teacher(teacher)
    return Producer(plan, place.device, teacher).run


def tasks_of(plan: FrozenPlan, keys: list[ShardKey]) -> list[Task]:
    """To measure the error of the compute dtype if that was never done, then to compute the shards."""
    spec = plan.spec
    exact = spec.identity["compute_dtype"] == "float32"
    measured = exact or "compute_error" in spec.details or not spec.sequences["train"]
    return [*keys] if measured else ["measure", *keys]


def taker(commit: Callable[[Sealed], object], note: Callable[..., object]) -> Done[Task, Result]:
    """What hands shards to `commit`, and what was measured to `note`."""

    def take(_: Task, result: Result) -> None:
        if isinstance(result, Sealed):
            commit(result)
        else:
            note(compute_error=result)

    return take
