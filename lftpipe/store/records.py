"""What a store's files record of its shards: parsed, journaled, and compared with what is expected."""

import re
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lftpipe.base.files import canonical, parse_json
from lftpipe.storage import Reads, Writes, storage_of
from lftpipe.store.layout import JOURNAL, ArrayLayout, StoreSpec
from lftpipe.store.shard import Record
from lftpipe.store.windows import rolls

# --- What manifests and journals say, checked where it is read: a damaged or foreign one is refused, not
# obeyed.
#
# A digest finds accidents. Whoever writes a manifest by hand can seal it too, so that types, names and
# sizes are compared with each other before anything is opened or any memory is asked for.

Records = dict[str, Record]  # shard file, relative to the store -> what is known of it

#: More than any disk holds; numbers below it can be multiplied without surprises.
_LARGEST = 2**48
_SPLIT = re.compile(r"[A-Za-z][\w-]{0,63}")
_SHARD = re.compile(r"[A-Za-z][\w-]{0,63}/[a-z_]{1,64}/c(\.\d{1,15}){2,8}", re.ASCII)
_METADATA = re.compile(r"([A-Za-z][\w-]{0,63}/){0,2}zarr\.json")
_DIGEST = re.compile(r"([0-9a-f]{32})?")
_TAIL = re.compile(r"([0-9a-f]{16})?")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no text")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]} is no object")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]} is no list")
    return tuple(_number(each) for each in value)


def _splits(value: Any) -> dict[str, int]:
    counts = {name: _number(count) for name, count in _object(value).items()}
    if bad := [name for name in counts if not _SPLIT.fullmatch(name)]:
        raise ValueError(f"{bad[0][:40]!r} is no name of a split")
    return counts


_KINDS: dict[Any, Callable[[Any], Any]] = {
    int: _number,
    str: _text,
    dict[str, Any]: _object,
    tuple[int, ...]: _numbers,
    dict[str, int]: _splits,
}


def parse_spec(value: Any) -> StoreSpec:
    """The specification in a manifest or journal.

    Raises `ValueError` if it is not one, or one that no store can have.
    """
    kinds = {name: _KINDS[kind] for name, kind in typing.get_type_hints(StoreSpec).items() if kind in _KINDS}
    fields = {
        name: kinds[name](each) if name in kinds else each
        for name, each in _object(value).items()
        if name != "schema_version"
    }
    try:
        spec = StoreSpec.from_json({"schema_version": value.get("schema_version"), **fields})
    except (TypeError, KeyError) as error:
        raise ValueError(f"a specification with fields amiss ({error})") from None
    if spec.context * max(spec.width, spec.logits) * spec.sequences_per_shard >= _LARGEST:
        raise ValueError("a shard larger than any disk")
    return spec


def num_shards(spec: StoreSpec) -> int:
    """Shards of all splits together, of each array."""
    return sum(-(-count // spec.sequences_per_shard) for count in spec.sequences.values())


def files_of(array: ArrayLayout, split: str, sequences: int) -> Iterator[str]:
    """The shard files of an array, in order: `ArrayLayout.file` for stores of a million of them."""
    name = array.file(split, 0)
    place = len(name) - 1 - 2 * len(array.chunk)  # of the shard's number
    front, end = name[:place], name[place + 1 :]
    return (f"{front}{index}{end}" for index in range(-(-sequences // array.sequences_per_shard)))


def parse_records(value: Any, names: re.Pattern[str] = _SHARD) -> Records:
    """What is known of some files, by name.

    `names`: what a file may be called: never one outside the store.
    """
    records: Records = {}
    is_name, is_digest, is_tail = names.fullmatch, _DIGEST.fullmatch, _TAIL.fullmatch
    for file, fields in _object(value).items():
        if not is_name(file):
            raise ValueError(f"{file[:80]!r} is no file of a store")
        if not isinstance(fields, list) or not 3 <= len(fields) <= 4:
            raise ValueError(f"{file} without its record")
        record = Record(*fields)
        if not is_digest(_text(record.digest)) or not is_tail(_text(record.tail)):
            raise ValueError(f"{file} with a digest that is none")
        for count in (record.sequences, record.bytes):
            _number(count)
        records[file] = record
    return records


def parse_metadata(value: Any) -> Records:
    """What is known of the Zarr metadata files."""
    return parse_records(value, _METADATA)


def check_shards(spec: StoreSpec, shards: Records) -> None:
    """See that a finished store's records are those of its specification, no more and no fewer.

    Those of shards that come and go are the journal's.

    Raises `ValueError` naming the first that is missing or cannot be.
    """
    stay = [(split, array) for split in spec.sequences for array in spec.arrays.values()]
    stay = [(split, array) for split, array in stay if not rolls(spec, split, array)]
    step, possible = spec.sequences_per_shard, set()
    total = sum(-(-spec.sequences[split] // step) for split, _ in stay)
    if total != len(shards):
        raise ValueError(f"{len(shards)} shard files are listed of {total}")
    for split, array in stay:
        count = spec.sequences[split]
        for first, file in zip(range(0, count, step), files_of(array, split, count), strict=True):
            record, sequences = shards.get(file), min(step, count - first)
            if record is None or record.sequences != sequences or not record.tail:
                raise ValueError(f"{file} is not listed with its {sequences} sequences and its tail")
            size = array.name, sequences, record.bytes
            if size not in possible and not array.may_have(record.bytes, sequences):
                raise ValueError(f"{file} cannot have {record.bytes} bytes")
            if not array.codec:  # then all have the same
                possible.add(size)


def check_committed(spec: StoreSpec, records: Records) -> None:
    """See that what a journal says was committed can be shards of its specification; some may be missing.

    `records`: of what was committed; one that was lost since has no sequences.
    """
    arrays = spec.arrays
    for file, record in records.items():
        split, name, numbers = file.split("/")
        array, count = arrays.get(name), spec.sequences.get(split, 0)
        index = 0 if array is None else int(numbers.split(".")[1 if array.layers is None else 2])
        here = min(spec.sequences_per_shard, count - index * spec.sequences_per_shard)
        known = array is not None and file == array.file(split, index) and record.sequences <= here
        if (
            array is None
            or not known
            or (record.sequences and not (record.tail and array.may_have(record.bytes, record.sequences)))
        ):
            raise ValueError(
                f"{file} with {record.sequences} sequences, {record.bytes} bytes and tail {record.tail!r}"
            )


# --- The journal of a store in the making: what it is to hold, and which of its shards count as done.
#
# A shard's digest is in the journal *before* the shard gets its name. So a crash between the two leaves a
# whole ``.partial`` file that the journal knows, and opening the store again gives it its name.

#: Local files read at the same time: a digest lets other threads run.
_READERS = 4


def begin_journal(storage: Writes, spec: StoreSpec, records: Records) -> None:
    """Begin anew with what is known so far, which also drops the torn last line of a killed process.

    It has lines ``digest json``: the specification first, then the records of each commit.
    """
    storage.begin_log(line_of(spec.to_json()) + line_of(records))


def has_journal(path: Path) -> bool:
    """Whether a store has a journal: it is being made, grown or repaired."""
    return storage_of(path).read_log() is not None


def read_journal(path: Path) -> tuple[StoreSpec, Records] | None:
    """What was planned, and what was committed so far; None without a journal.

    Raises `ValueError` if its first line is damaged, or a whole line says what no store can mean. Other
    damaged lines count as work not done.
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
        journal = read_journal(path)
    except ValueError:
        journal = None
    return {file: record.sequences for file, record in journal[1].items()} if journal else {}


def on_disk(path: Path, records: Records) -> Records:
    """Those records whose file is there with the right size."""
    sizes = storage_of(path).sizes(records)
    return {file: record for file, record in records.items() if sizes.get(file) == record.bytes}


def progress(path: Path) -> tuple[int, int] | None:
    """How many shards of a store in the making are done, and of how many; None if none is being made."""
    journal = read_journal(path)
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


def digests(storage: Reads, files: Iterable[str]) -> Iterator[tuple[str, str | Exception]]:
    """The digest of each file, or why it has none; some are read at the same time."""

    def read(file: str) -> tuple[str, str | Exception]:
        try:
            return file, storage.digest(file)
        except OSError as error:
            return file, error

    with ThreadPoolExecutor(max(storage.concurrency, _READERS)) as pool:
        yield from pool.map(read, files)


# --- Which file each shard of a finished store is, in sixteen bytes a shard.


class Expected(NamedTuple):
    """Sizes and tails of the shards of one array of one split, by shard index."""

    sizes: np.ndarray
    tails: np.ndarray

    def of(self, index: int) -> tuple[int, str]:
        """Size and tail of a shard, as `ChunkReader` compares them."""
        return int(self.sizes[index]), f"{self.tails[index]:016x}"


def expected_shards(spec: StoreSpec, shards: Records) -> dict[tuple[str, str], Expected]:
    """By array and split, what a manifest says of every shard.

    `spec`, `shards`: of a manifest that was read: they fit each other.
    """
    found: dict[tuple[str, str], Expected] = {}
    for split, count in spec.sequences.items():
        for array in spec.arrays.values():
            if rolls(spec, split, array):
                continue  # the journal says it once the shard is there
            records = [shards[file] for file in files_of(array, split, count)]
            found[array.name, split] = Expected(
                np.fromiter((record.bytes for record in records), np.uint64, len(records)),
                np.fromiter((int(record.tail, 16) for record in records), np.uint64, len(records)),
            )
    return found
