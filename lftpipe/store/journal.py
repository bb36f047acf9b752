"""The journal of a store in the making: what it is to hold, and which of its shards count as done.

A shard's digest is in the journal *before* the shard gets its name. So a crash between the two leaves a whole
``.partial`` file that the journal knows, and opening the store again gives it its name.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.files import canonical, parse_json
from lftpipe.objects import Storage, storage_of
from lftpipe.store.layout import JOURNAL, StoreSpec
from lftpipe.store.parsing import (
    Records,
    check_committed,
    num_shards,
    parse_records,
    parse_spec,
)

#: Local files read at the same time: a digest lets other threads run.
_READERS = 4


class Journal:
    """An append-only file of lines ``digest json``: the specification first, then what was committed."""

    def __init__(self, storage: Storage, spec: StoreSpec, records: Records) -> None:
        """Begin anew with what is known so far, which also drops the torn last line of a killed process."""
        storage.begin_log(line_of(spec.to_json()) + line_of(records))
        self._storage = storage

    def append(self, records: Records) -> None:
        """Add the records of one commit and wait until they are on the disk."""
        self._storage.append_log(line_of(records))

    def close(self) -> None:
        """Close the log; what was appended stays."""
        self._storage.close()

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a store has a journal: it is being made, grown or repaired."""
        return storage_of(path).read_log() is not None

    @staticmethod
    def read(path: Path) -> tuple[StoreSpec, Records] | None:
        """What was planned, and what was committed so far; None without a journal.

        Raises
        ------
        ValueError
            If its first line is damaged, or a whole line says what no store can mean. Other damaged lines
            count as work not done.
        """
        if (log := storage_of(path).read_log()) is None:
            return None
        header, *lines = log.split(b"\n")
        try:
            spec, records = parse_spec(content_of(header)), {}
            for line in lines:
                records.update(parse_records(content_of(line) or {}))
            check_committed(spec, records)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path / JOURNAL} is damaged: {error}") from None
        return spec, records


def line_of(value: object) -> bytes:
    """A journal's line: a digest, and the JSON text that it is of."""
    text = canonical(value)
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def content_of(line: bytes) -> Any:
    """What `line_of` wrote; None if it is damaged."""
    digest, _, text = line.partition(b" ")
    return parse_json(text) if digest == xxhash.xxh3_64_hexdigest(text).encode() else None


def stored_records(path: Path) -> dict[str, int]:
    """Sequences in every shard file of a store in the making, as its journal says it; for who has no lock."""
    try:
        journal = Journal.read(path)
    except ValueError:
        journal = None
    return {file: record.sequences for file, record in journal[1].items()} if journal else {}


def on_disk(path: Path, records: Records) -> Records:
    """Those records whose file is there with the right size."""
    sizes = storage_of(path).sizes(records)
    return {file: record for file, record in records.items() if sizes.get(file) == record.bytes}


def progress(path: Path) -> tuple[int, int] | None:
    """How many shards of a store in the making are done, and of how many; None if none is being made."""
    journal = Journal.read(path)
    if journal is None:
        return None
    spec, records = journal
    states = [array for array in spec.arrays.values() if array.computed]
    step, done = spec.sequences_per_shard, 0
    for split, count in spec.sequences.items():
        # By what is there: a store is begun for as much as is asked for, which may be absurdly much.
        for index in range(min(-(-count // step), len(records))):
            files = (records.get(array.file(split, index)) for array in states)
            whole = min(step, count - index * step)
            done += all(record and record.sequences >= whole for record in files)
    return done, num_shards(spec)


def digests(storage: Storage, files: Iterable[str]) -> Iterator[tuple[str, str | Exception]]:
    """The digest of each file, or why it has none; some are read at the same time."""

    def read(file: str) -> tuple[str, str | Exception]:
        try:
            return file, storage.digest(file)
        except OSError as error:
            return file, error

    with ThreadPoolExecutor(max(storage.concurrency, _READERS)) as pool:
        yield from pool.map(read, files)
