"""What manifests and journals say, checked where it is read: a damaged or foreign one is refused, not obeyed.

A digest finds accidents. Whoever writes a manifest by hand can seal it too, so that types, names and sizes
are compared with each other before anything is opened or any memory is asked for.
"""

import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

from lftpipe.store.layout import ArrayLayout, StoreSpec
from lftpipe.store.shard import Record
from lftpipe.store.windows import rolls

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

    Raises
    ------
    ValueError
        If it is not one, or one that no store can have.
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

    Parameters
    ----------
    names
        What a file may be called: never one outside the store.
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

    Raises
    ------
    ValueError
        Naming the first that is missing or cannot be.
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
            if record is None or record.sequences != sequences:
                raise ValueError(f"{file} is not listed with its {sequences} sequences")
            size = array.name, sequences, record.bytes
            if size not in possible and not array.may_have(record.bytes, sequences):
                raise ValueError(f"{file} cannot have {record.bytes} bytes")
            if not array.codec:  # then all have the same
                possible.add(size)


def check_committed(spec: StoreSpec, records: Records) -> None:
    """See that what a journal says was committed can be shards of its specification; some may be missing.

    Parameters
    ----------
    records
        Of what was committed; one that was lost since has no sequences.
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
            or (record.sequences and not array.may_have(record.bytes, record.sequences))
        ):
            raise ValueError(f"{file} with {record.sequences} sequences and {record.bytes} bytes")
