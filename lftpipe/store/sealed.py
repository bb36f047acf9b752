"""What an attempt at a shard leaves: whole files under names of its own, until the writer takes them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from lftpipe.files import sync_folder
from lftpipe.store.layout import ShardKey
from lftpipe.store.parsing import Records, parse_records
from lftpipe.store.shard import partial_file

#: `FILE.partial` is what versions before attempts had names left.
_PARTIAL = re.compile(r"(?P<final>.+?)(\.(?P<attempt>[a-z][\w-]*))?\.partial")


class Sealed(NamedTuple):
    """A shard that is whole and on the disk, but has no names yet. It can be sent to another process."""

    key: ShardKey
    attempt: str
    """Names its files, so that no two attempts at a shard ever write the same one."""
    records: Records

    def partial(self, store: Path, file: str) -> Path:
        """Where one of its files is."""
        return partial_file(store / file, self.attempt)

    def is_there(self, store: Path) -> bool:
        """Whether all of its files are as long as they were written."""
        try:
            sizes = {file: self.partial(store, file).stat().st_size for file in self.records}
        except FileNotFoundError:
            return False
        return sizes == {file: record.bytes for file, record in self.records.items()}

    def name(self, store: Path) -> set[Path]:
        """Give the files their names; the folders that must be synced for it to last."""
        for file in self.records:
            self.partial(store, file).replace(store / file)
        return {(store / file).parent for file in self.records}

    def discard(self, store: Path) -> None:
        """Leave nothing of it behind."""
        for file in self.records:
            self.partial(store, file).unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        """The shard as JSON-plain values, for another process."""
        rows = self.key.sequences
        return {
            "key": [self.key.split, self.key.index, rows.start, rows.stop],
            "attempt": self.attempt,
            "records": {file: list(record) for file, record in self.records.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Sealed":
        """Read what `to_json` gave."""
        split, index, start, stop = value["key"]
        records = parse_records(value["records"])
        return cls(ShardKey(split, index, range(start, stop)), value["attempt"], records)


def final_of(partial: Path) -> Path:
    """The name that a `.partial` file was to get."""
    match = _PARTIAL.fullmatch(partial.name)
    assert match is not None, partial
    return partial.with_name(match["final"])


def attempt_of(partial: Path) -> str:
    """The attempt that wrote a `.partial` file; empty if it is not known."""
    match = _PARTIAL.fullmatch(partial.name)
    assert match is not None, partial
    return match["attempt"] or ""


def sync_folders(folders: set[Path]) -> None:
    """Make the new names in some folders last."""
    for folder in sorted(folders):
        sync_folder(folder)
