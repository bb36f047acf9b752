"""Where each byte of a store is: arrays, shards, chunks, attributes; the plan that is written first."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lftpipe.base.files import plain, read_sealed, write_sealed

# --- What a store looks like on disk: arrays, shards, file names, and the Zarr metadata.
#
# Each split is a Zarr group with the arrays of `StoreSpec.arrays`. The chunk (one sequence of one layer)
# is the unit of reading, the shard (all layers of `sequences_per_shard` sequences) the unit of writing.
# Chunk keys are separated by dots, so that an array is one flat folder: one fsync makes its new shards
# permanent.

SCHEMA_VERSION = 1
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "writer.lock"
PLAN = "plan.json"  # there while states are computed
TOKEN_ARRAYS = ("tokens", "document")  # made of the corpus alone; the teacher computes all others
LOGIT_ARRAYS = ("logit_values", "logit_ids", "logit_normaliser")


@dataclass(frozen=True, order=True)
class ShardKey:
    """One unit of work: the sequences of one split that one shard of each array still lacks.

    ``sequences`` are indices within the split. They are all of the shard's, except in the last shard of a
    store that grows: there they are only those that are not stored yet.
    """

    split: str
    index: int
    sequences: range


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a split: dimension names, chunk and shard shapes, and where a chunk is found."""

    name: str
    layers: tuple[int, ...] | None  # None: no layer axis
    chunk: tuple[int, ...]  # sizes behind the sequence axis: of position, and of feature or rank
    dtype: str  # of the decoded array
    sequences_per_shard: int
    codec: str = ""  # int8 or blosc; without one a chunk is its values as they are

    @property
    def computed(self) -> bool:
        """Whether the teacher computes it."""
        return self.name not in TOKEN_ARRAYS

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of a chunk."""
        return ("position", "rank" if self.name in LOGIT_ARRAYS else "feature")[: len(self.chunk)]

    @property
    def dimensions(self) -> tuple[str, ...]:
        # xarray allows one size per dimension name, and there are fewer attention layers than states.
        """Names of all axes, as xarray sees them."""
        front = () if self.layers is None else ("layer" if self.name == "hidden" else f"{self.name}_layer",)
        return (*front, "sequence", *self.axes)

    def shape(self, sequences: int) -> tuple[int, ...]:
        """Shape of the array with so many sequences."""
        front = () if self.layers is None else (len(self.layers),)
        return (*front, sequences, *self.chunk)

    @property
    def chunks_per_shard(self) -> int:
        """Number of chunks in a full shard."""
        return (1 if self.layers is None else len(self.layers)) * self.sequences_per_shard

    def may_have(self, num_bytes: int, sequences: int) -> bool:
        """Whether a shard file of so many sequences can have so many bytes; encoded chunks vary in size."""
        index = 16 * self.chunks_per_shard + 4
        chunks = (1 if self.layers is None else len(self.layers)) * sequences
        if self.codec:
            return num_bytes >= index + 4 * chunks
        itemsize = {"float16": 2}.get(self.dtype, 4)
        return num_bytes == index + chunks * (math.prod(self.chunk) * itemsize + 4)

    def chunk_number(self, layer: int | None, within: int) -> int:
        """Number of a chunk within its shard's index (row-major over layer and sequence).

        `layer`: the layer l itself, not its index; None for an array without layers.
        """
        if self.layers is None:
            return within
        if layer not in self.layers:
            raise KeyError(layer)
        return self.layers.index(layer) * self.sequences_per_shard + within

    def file(self, split: str, index: int) -> str:
        """Shard file, relative to the store."""
        front = "" if self.layers is None else "0."
        return f"{split}/{self.name}/c.{front}{index}" + ".0" * len(self.chunk)


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """All that decides what a store holds, except the numbers themselves.

    ``identity`` says where the states come from and never changes in the life of a store; ``details`` says
    what may change from one extraction to the next (versions, digests of what was added), only recorded. Both
    are JSON-plain and become attributes of the root group.
    """

    identity: dict[str, Any]
    layers: tuple[int, ...]  # of `hidden`: index -> l; () = tokens alone
    attention_layers: tuple[int, ...]  # of `attention`; () = no such array
    context: int  # positions
    width: int  # features
    dtype: str  # float16, float32 or int8
    sequences_per_shard: int
    sequences: dict[str, int]  # split -> how many
    details: dict[str, Any] = field(default_factory=dict)
    logits: int = 0  # how many of the largest logits of each position; 0 = no such arrays
    compression: str = "none"  # of states of float16 and float32: none or blosc
    rolling: int = 0  # shards of `train` that come and are dropped together; 0 = all stay

    def __post_init__(self) -> None:
        for name in ("identity", "details"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("layers", "attention_layers"):
            if len(set(layers := getattr(self, name))) < len(layers):
                raise ValueError(f"{name} repeats a layer: {layers}")
        if not self.layers and (self.attention_layers or self.logits):
            raise ValueError("layers is empty: a store without states holds tokens alone")
        for name in ("context", "width", "sequences_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("float16", "float32", "int8"):
            raise ValueError(f"dtype must be float16, float32 or int8, not {self.dtype!r}")
        if self.compression not in ("none", "blosc") or (self.compression != "none" and self.dtype == "int8"):
            raise ValueError(f"compression must be none, or blosc of floats, not {self.compression!r}")
        if min(self.logits, self.rolling) < 0:
            raise ValueError(f"logits and rolling must not be negative: {self.logits}, {self.rolling}")
        if any(count < 0 for count in self.sequences.values()):
            raise ValueError(f"numbers of sequences must not be negative: {self.sequences}")
        taken = (self._own.keys() | {"complete"}) & (self.identity.keys() | self.details.keys())
        if clash := sorted(taken | (self.identity.keys() & self.details.keys())):
            raise ValueError(f"attributes given twice: {', '.join(clash)}")

    @property
    def _own(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name not in ("identity", "details")}
        for name, nothing in (("logits", 0), ("compression", "none"), ("rolling", 0)):
            if own[name] == nothing:  # a store without it is what it was before there was any
                del own[name]
        return plain({"schema_version": SCHEMA_VERSION, **own})

    def to_json(self) -> dict[str, Any]:
        """The specification as it stands in journal and manifest."""
        return {**self.content, "details": self.details}

    @property
    def content(self) -> dict[str, Any]:
        """What decides every byte: all but details."""
        return {**self._own, "identity": self.identity}

    @property
    def fixed(self) -> dict[str, Any]:
        """What never changes in the life of a store: its content, but for how much there is."""
        return {name: value for name, value in self.content.items() if name != "sequences"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StoreSpec":
        """Read what `to_json` gave.

        Raises `ValueError` if another version of the schema wrote it.
        """
        if (version := value.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"the store has schema version {version}, this lftpipe reads {SCHEMA_VERSION}")
        fields = {name: value[name] for name in value if name != "schema_version"}
        tuples = {name: tuple(fields[name]) for name in ("layers", "attention_layers")}
        return cls(**{**fields, **tuples})

    @property
    def decoded_dtype(self) -> str:
        """What a reader gets: float32 of a float32 store, else float16."""
        return "float32" if self.dtype == "float32" else "float16"

    @property
    def arrays(self) -> dict[str, ArrayLayout]:
        """Every array of a split, by name."""
        row, state, count = (self.context,), (self.context, self.width), self.sequences_per_shard
        arrays = [ArrayLayout(name, None, row, "int32", count) for name in TOKEN_ARRAYS]
        for name, layers in (("hidden", self.layers), ("attention", self.attention_layers)):
            if layers:
                codec = "int8" if self.dtype == "int8" else self.compression.replace("none", "")
                arrays.append(ArrayLayout(name, layers, state, self.decoded_dtype, count, codec))
        if self.logits:
            ranks = (self.context, self.logits)
            kinds = ((ranks, self.decoded_dtype), (ranks, "int32"), (row, "float32"))
            for name, (chunk, dtype) in zip(LOGIT_ARRAYS, kinds, strict=True):
                arrays.append(ArrayLayout(name, None, chunk, dtype, count))
        return {array.name: array for array in arrays}

    def shard_keys(self) -> Iterator[ShardKey]:
        """Every shard of every split, whole."""
        step = self.sequences_per_shard
        for split, count in self.sequences.items():
            for index, first in enumerate(range(0, count, step)):
                yield ShardKey(split, index, range(first, min(first + step, count)))


def root_attributes(spec: StoreSpec) -> dict[str, Any]:
    """The attributes of the root group, all but ``complete``."""
    return {**spec._own, **spec.identity, **spec.details}


def metadata(spec: StoreSpec, *, complete: bool) -> dict[str, bytes]:
    """The Zarr metadata files of a store (relative path -> JSON text), made by zarr-python itself."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    from lftpipe.store.codec import zarr_codec
    from lftpipe.store.zarr_codec import Int8Codec, register

    register()
    store = MemoryStore()
    root = zarr.create_group(store, attributes={**root_attributes(spec), "complete": complete})
    for split, sequences in spec.sequences.items():
        group = root.create_group(split, attributes={"layers": list(spec.layers)})
        for array in spec.arrays.values():
            front = () if array.layers is None else (1,)
            group.create_array(
                array.name,
                shape=array.shape(sequences),
                chunks=(*front, 1, *array.chunk),
                shards=array.shape(spec.sequences_per_shard),
                dtype=array.dtype,
                serializer=Int8Codec() if array.codec == "int8" else BytesCodec(endian="little"),
                compressors=[*([zarr_codec(array.dtype)] if array.codec == "blosc" else []), Crc32cCodec()],
                # A missing chunk must never look like data: no state is NaN, no token is negative.
                fill_value=-1 if array.dtype == "int32" else float("nan"),
                dimension_names=array.dimensions,
                chunk_key_encoding={"name": "default", "separator": "."},
                attributes={"layers": list(array.layers)} if array.layers else {},
            )
    with warnings.catch_warnings():
        # "not in the specification yet": all readers of Zarr 3 know consolidated metadata nevertheless.
        warnings.simplefilter("ignore")
        for split in spec.sequences:
            zarr.consolidate_metadata(store, path=split)
        zarr.consolidate_metadata(store)
    return {name: value.to_bytes() for name, value in sorted(store._store_dict.items())}


# --- What is to be computed, frozen in a file: every process of an extraction reads it there.


def read_plan(path: Path) -> dict[str, Any] | None:
    """What is to be computed, as `write_plan` froze it; None if nothing is, or if it is damaged."""
    try:
        return read_sealed(path / PLAN)
    except (FileNotFoundError, ValueError):
        return None


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Freeze what is to be computed."""
    write_sealed(path / PLAN, plan)
