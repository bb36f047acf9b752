"""What a process needs to compute a store's shards by itself, and how it computes one."""

import functools
import json
import uuid
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lftpipe.base.device import device_kind
from lftpipe.base.errors import SettingsError, TeacherError
from lftpipe.base.files import fingerprint
from lftpipe.extraction.async_writer import Commit
from lftpipe.extraction.forward import Advance, Passes, bf16_error
from lftpipe.store import Sealed, ShardKey, StoreSpec, StoreWriter
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.thread_pool import Lanes
from lftpipe.teacher.trunk import Head, StreamedTrunk, Trunk

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
        spec = {name: value for name, value in self.spec.to_json().items() if name != "details"}
        return fingerprint([spec, self.kind, self.partly])

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


# --- `produce(plan, shard) -> records`: computing a shard, on whatever machine, without the store's lock.


class Producer:
    """A teacher that computes shards of a plan; it is loaded when the first one is asked for.

    Parameters
    ----------
    teacher
        The plan's teacher, if it is open already; else it is found by name, and its files are compared.
    attempts
        How the names of the files begin; left out, with the plan's epoch.
    """

    def __init__(
        self, plan: FrozenPlan, device: str, teacher: Teacher | None = None, attempts: str | None = None
    ) -> None:
        plan.check_device(device)
        self.plan, self.device = plan, device
        # No other process, living or thought dead, may ever use the same names.
        self._attempt = f"{attempts or f'e{plan.epoch}'}-{uuid.uuid4().hex[:12]}"
        if teacher is None:
            teacher = plan.open_teacher()
            plan.check_teacher(teacher)
        self.teacher = teacher

    def run(self, keys: Iterable[ShardKey | None], commit: Commit, advance: Advance = lambda _: None) -> None:
        """Compute shards; see `Passes.run`.

        Parameters
        ----------
        keys
            Which shards; None if there is none for now.
        """
        self._passes.run(keys, commit, advance)

    def measure(self) -> dict[str, Any]:
        """What computing in bfloat16 costs; before the first shard it takes less memory."""
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
        if self.plan.stream_layers:
            batch = spec.identity["batch_sequences"]
            return StreamedTrunk(self.teacher, deepest, compute_dtype, self.device, batch_sequences=batch)
        return Trunk(self.teacher, deepest, compute_dtype, device)


def needs_measure(plan: FrozenPlan) -> bool:
    """Whether the error of the compute dtype is still to be measured: once in a store's life."""
    spec = plan.spec
    exact = spec.identity["compute_dtype"] == "float32"
    return not exact and "compute_error" not in spec.details and bool(spec.sequences["train"])


def produce(plan: dict[str, Any], key: ShardKey, device: str = "cpu") -> Sealed:
    """Compute one shard, with a teacher that stays loaded for the next one.

    Returns
    -------
    Sealed
        The shard's files are on the disk, under names of this attempt; `StoreWriter.commit` takes them.
    """
    sealed: list[Sealed] = []
    producer_of(json.dumps(plan), device).run([key], sealed.append)
    return sealed[0]


@functools.lru_cache(maxsize=1)
def producer_of(plan: str, device: str) -> Producer:
    """The producer of a plan in JSON, kept for the next shard."""
    return Producer(FrozenPlan.from_json(json.loads(plan)), device)
