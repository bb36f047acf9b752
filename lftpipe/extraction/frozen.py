"""What an extraction computes, frozen: enough for any process to compute any shard of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lftpipe.device import device_kind
from lftpipe.errors import SettingsError, TeacherError
from lftpipe.files import fingerprint
from lftpipe.store import ShardKey, StoreSpec, StoreWriter
from lftpipe.teacher.source import Teacher, open_teacher


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
