"""Reading a store: what it is, its arrays by layer and sequence, batches, and xarray's view."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int32

from lftpipe.base.errors import StoreError
from lftpipe.base.files import fingerprint
from lftpipe.storage import local_path
from lftpipe.store.arrivals import Arrivals
from lftpipe.store.batches import Batch, Buffer, Logits, batch_sequences, read_ahead
from lftpipe.store.layout import LOGIT_ARRAYS, ArrayLayout, StoreSpec
from lftpipe.store.manifest import finished_manifest
from lftpipe.store.records import Expected, expected_shards
from lftpipe.store.shard_reader import Shards
from lftpipe.store.windows import ROLLING_SPLIT, Windows

if TYPE_CHECKING:
    from xarray import Dataset


# --- What a store says of itself: where its states come from, which there are, how many, in which form.


class Description:
    """A store's specification, in the words of who reads it."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        self.path, self.spec = path, spec
        self._arrays = spec.arrays

    @property
    def identity(self) -> dict[str, Any]:
        """Where the states come from."""
        return self.spec.identity

    @property
    def layers(self) -> tuple[int, ...]:
        """Which states are stored."""
        return self.spec.layers

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Of which layers attention outputs are stored."""
        return self.spec.attention_layers

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return self.spec.context

    @property
    def width(self) -> int:
        """Features of a state."""
        return self.spec.width

    @property
    def dtype(self) -> str:
        """How states are stored: float16, float32 or int8."""
        return self.spec.dtype

    @property
    def windows(self) -> Windows:
        """Of a rolling store."""
        return Windows(self.spec)

    def rolls(self, split: str) -> bool:
        """Whether the states of a split come and go.

        Parameters
        ----------
        split
            `train` or `validation`.
        """
        return bool(self.spec.rolling) and split == ROLLING_SPLIT

    def need_whole(self, what: str) -> None:
        """Refuse a rolling store, whose training states come and go.

        Parameters
        ----------
        what
            What needs them all.

        Raises
        ------
        StoreError
            If it is one.
        """
        if self.spec.rolling:
            raise StoreError(
                f"{what} on the rolling store {self.path}",
                "a store that keeps all of its training states",
                "extract one without --rolling into another --store; fewer --tokens will do",
            )

    def num_sequences(self, split: str) -> int:
        """Sequences of a split.

        Parameters
        ----------
        split
            `train` or `validation`.
        """
        try:
            return self.spec.sequences[split]
        except KeyError:
            has = ", ".join(self.spec.sequences)
            raise StoreError(
                f"split {split!r} of {self.path}", f"one of {has}", "name one of these"
            ) from None

    def need_logits(self) -> None:
        """Refuse a store without logits.

        Raises
        ------
        StoreError
            If it was made without.
        """
        if not self.spec.logits:
            raise StoreError(
                f"{self.path} holds no logits",
                "a store with the teacher's top-K logits",
                "extract with --logits 64 into another --store",
            )

    def layout(self, array: str, layer: int | None) -> ArrayLayout:
        """How an array is laid out.

        Parameters
        ----------
        array
            `hidden`, `attention`, `tokens`, `document` or one of the logits' arrays.
        layer
            One that is to be read; None of an array without layers.

        Raises
        ------
        StoreError
            If the array, or the layer in it, is not stored.
        """
        layout = self._arrays.get(array)
        if layout is None or (layer is not None and layer not in (layout.layers or ())):
            stored = "; ".join(
                f"{name} of layers {', '.join(map(str, each.layers))}"
                for name, each in self._arrays.items()
                if each.layers
            )
            raise StoreError(
                f"{array} of layer {layer} is not in {self.path}", stored, "extract with these --layers"
            )
        return layout


# --- A store as an xarray data set, its layers by their numbers. Needs the extra `xarray`.


def as_dataset(
    path: Path, split: str, layers: tuple[int, ...], attention_layers: tuple[int, ...]
) -> "Dataset":
    """Open a split lazily: nothing is read before it is asked for.

    Raises
    ------
    StoreError
        If xarray is not installed, there is no such split, or the store is at a URL.
    """
    try:
        import xarray
    except ImportError as error:
        raise StoreError(
            "to_xarray without xarray", "the package xarray", 'pip install "lftpipe[xarray]"'
        ) from error
    if not (path / split / "zarr.json").is_file():
        raise StoreError(f"split {split!r} of {path}", "train or validation, in a folder", "name one of them")
    found = xarray.open_zarr(path, group=split, consolidated=False)
    numbers = {"layer": list(layers), "attention_layer": list(attention_layers)}
    return found.assign_coords({name: value for name, value in numbers.items() if name in found.sizes})


# --- Reading a complete store: one system call a chunk, straight into the caller's memory, checksum checked.

Indices = Sequence[int] | np.ndarray
_ALL = slice(None)


class Store(Description):
    """A complete store, as it was when it was opened: one that grows meanwhile does not disturb it.

    It may be used by several threads, inherited by forked processes, and sent to spawned ones.

    Attributes
    ----------
    identity : dict
        Where the states come from.
    layers, attention_layers : tuple of int
        Which states and attention outputs are stored.
    context, width : int
        Positions of a sequence, features of a state.
    dtype : str
        How they are stored: float16, float32 or int8.
    fingerprint : str
        Digest over identity and every byte of every shard.
    shards : Shards
        Its files, where they lie and how large they are.
    """

    def __init__(
        self, path: Path, spec: StoreSpec, fingerprint: str, expected: dict[tuple[str, str], Expected]
    ) -> None:
        """Use `open`."""
        super().__init__(path, spec)
        self.fingerprint = fingerprint
        self.shards = Shards(path, spec, expected)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a store for reading; only its manifest is read.

        Parameters
        ----------
        path
            The store's folder.

        Raises
        ------
        StoreError
            If it is missing, incomplete or its manifest is damaged.
        """
        path = local_path(path)
        manifest = finished_manifest(path)
        expected = expected_shards(manifest.spec, manifest.shards)
        return cls(path, manifest.spec, manifest.fingerprint, expected)

    @classmethod
    def unfinished(cls, path: Path, spec: StoreSpec) -> "Store":
        """A store in the making, to whoever knows what of it is there: its tokens, to begin with.

        Parameters
        ----------
        path, spec
            The store, and what it is to hold.
        """
        return cls(path, spec, "", {})

    def __reduce__(self) -> tuple[type["Store"], tuple[Any, ...]]:
        return Store, (self.path, self.spec, self.fingerprint, self.shards.expected)

    @functools.cached_property
    def origin(self) -> str:
        """Digest over what stays when a store grows: its identity, its format, its first sequences."""
        splits = [split for split, count in self.spec.sequences.items() if count]
        first = {split: self.tokens(split, [0]).tolist() for split in splits}
        kept = {"identity": self.identity, "context": self.context, "dtype": self.dtype, "first": first}
        return fingerprint(kept)

    def tokens(self, split: str, sequences: Indices | None = None) -> Int32[np.ndarray, "sequence position"]:
        """Token ids of these sequences, or of all.

        Parameters
        ----------
        split
            `train` or `validation`.
        sequences
            Indices within the split; left out, all of them.
        """
        return self._rows("tokens", split, None, sequences, None)

    def document(
        self, split: str, sequences: Indices | None = None
    ) -> Int32[np.ndarray, "sequence position"]:
        """Which document each token came from, of these sequences, or of all.

        Parameters
        ----------
        split
            `train` or `validation`.
        sequences
            Indices within the split; left out, all of them.
        """
        return self._rows("document", split, None, sequences, None)

    def logits(self, split: str, sequences: Indices | None = None) -> Logits:
        """The teacher's largest logits of these sequences, or of all.

        Parameters
        ----------
        split
            `train` or `validation`.
        sequences
            Indices within the split; left out, all of them.

        Raises
        ------
        StoreError
            If the store was made without.
        """
        self.need_logits()
        return Logits(*(self._rows(array, split, None, sequences, None) for array in LOGIT_ARRAYS))

    def read(
        self,
        split: str,
        layer: int,
        sequences: Indices,
        *,
        array: str = "hidden",
        out: np.ndarray | None = None,
    ) -> Float[np.ndarray, "sequence position feature"]:
        """States (or attention outputs) of one layer.

        Parameters
        ----------
        split
            `train` or `validation`.
        layer
            The layer l itself, not its index.
        sequences
            Indices in any order, repeated or not.
        array
            `hidden` for states, `attention` for attention outputs.
        out
            Array to read into, C-contiguous, of float32 or the storage dtype; a new one of the storage dtype
            (float16 for int8) if left out. Int8 is decoded to float32 three times as fast as to float16.

        Raises
        ------
        StoreError
            If the layer is not stored, or bytes are not as they were written.
        IndexError
            If there is no such sequence.
        """
        return self._rows(array, split, layer, sequences, out)

    def to_xarray(self, split: str = "train") -> "Dataset":
        """A split as a lazy data set: `hidden` and `attention` by layer, sequence, position and feature.

        Parameters
        ----------
        split
            `train` or `validation`.

        Raises
        ------
        StoreError
            If xarray is not installed, or the store is at a URL.
        """
        return as_dataset(local_path(self.path), split, self.layers, self.attention_layers)

    def batches(
        self,
        split: str,
        layers: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        attention_layers: Sequence[int] = (),
        num_sequences: int | None = None,
        part: slice = _ALL,
        prefetch: int = 2,
        with_tokens: bool = True,
        with_logits: bool = False,
        window: int = 0,
        say: Callable[[str], object] = print,
        dtype: str | None = None,
        allocate: Callable[..., np.ndarray] = np.empty,
    ) -> Iterator[Batch]:
        """Endless batches, shuffled over the whole split anew each epoch, read ahead by a thread.

        Which sequences a batch holds depends on ``seed`` and its step alone; see `batch_sequences`.

        Parameters
        ----------
        split
            `train` or `validation`.
        layers, attention_layers
            Which states, and which attention outputs, each batch holds.
        batch_size
            Sequences of a batch.
        seed
            Decides the order of each epoch.
        start_step
            Step of the first batch: a resumed run gets the batches of an unbroken one.
        num_sequences
            Of the split, only so many of its first sequences.
        part
            Which of a batch's sequences are read: processes that share a batch take ``slice(rank, None,
            processes)``.
        prefetch
            Batches kept ready; their memory is reused, so that a batch is valid until the next one is asked
            for. 0 reads without a thread.
        with_tokens
            Whether batches hold token ids and document numbers.
        with_logits
            Whether batches hold the teacher's largest logits.
        window
            Sequences that are shuffled among themselves; 0: all. `train` of a rolling store has its own.
        say
            Takes a line when a rolling store's shard is waited for.
        dtype
            Of the states: the storage dtype, or ``"float32"``.
        allocate
            ``(shape, dtype)`` to the memory that states are read into: pinned memory, for a GPU.
        """
        count = self.num_sequences(split) if num_sequences is None else num_sequences
        fits = 0 < count <= self.num_sequences(split) and batch_size >= 1
        if not fits or min(prefetch, seed, start_step) < 0:
            given = f"{batch_size=}, {prefetch=}, {seed=}, {start_step=}"
            raise ValueError(f"there are no such batches of {count} {split} sequences: {given}")
        shape = (len(range(batch_size)[part]), self.context, self.width)
        stored = {
            array: {layer: self.layout(array, layer).dtype for layer in wanted}
            for array, wanted in (("hidden", layers), ("attention", attention_layers))
        }
        if with_logits:
            self.need_logits()
        window = self.windows.sequences if self.rolls(split) else window

        def fill(step: int, buffer: Buffer) -> Batch:
            wanted = batch_sequences(count, batch_size, seed, step, window)[part]
            self.shards.together(
                functools.partial(self.read, split, layer, wanted, array=array, out=out)
                for array, states in buffer.items()
                for layer, out in states.items()
            )
            rows = (self.tokens(split, wanted), self.document(split, wanted)) if with_tokens else (None, None)
            logits = self.logits(split, wanted) if with_logits else None
            return Batch(step, wanted, buffer["hidden"], *rows, logits, buffer["attention"])

        for array, states in stored.items():
            if states:
                self.shards.check_first(self._arrays[array], split)
        buffers = [
            {
                array: {layer: allocate(shape, np.dtype(dtype or own)) for layer, own in states.items()}
                for array, states in stored.items()
            }
            for _ in range(prefetch + 2 if prefetch else 1)
        ]
        if not self.rolls(split):
            return read_ahead(fill, buffers, start_step)
        arrivals = Arrivals(self.path, self.windows, self.shards, say)
        return read_ahead(arrivals.patient(fill, batch_size), buffers, start_step, arrivals.stop)

    def _rows(
        self,
        array: str,
        split: str,
        layer: int | None,
        sequences: Indices | None,
        out: np.ndarray | None,
    ) -> np.ndarray:
        layout, count = self.layout(array, layer), self.num_sequences(split)
        return self.shards.rows(layout, split, layer, count, sequences, out)


# --- Sequences read once, in order: what is fitted in one pass needs no shuffling and no thread.


def read_in_turn(
    store: Store,
    split: str,
    parts: Sequence[tuple[str, int]],
    sequences: Sequence[int],
    at_once: int,
) -> Iterator[list[Float[np.ndarray, "sequence position feature"]]]:
    """The same few states of one lot of sequences after the other, as they are stored.

    Parameters
    ----------
    parts
        `(array, layer)` of each: `hidden` for states, `attention` for attention outputs.
    """
    for first in range(0, len(sequences), at_once):
        some = sequences[first : first + at_once]
        yield [store.read(split, layer, some, array=array) for array, layer in parts]
