"""What a recogniser heard, run once and kept: `heard.zarr`, posteriors with labels or encoder states.

A Zarr 3 group with a float16 array for each input, frames by labels or features, and a sealed `manifest.json`
written after the arrays that it names: an input counts once its digest is there, so that killed runs go on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float

from lftpipe.base.errors import StoreError
from lftpipe.base.files import read_sealed, write_sealed
from lftpipe.base.outputs import LOCK

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Input:
    """One recording or image, and what was made of it."""

    name: str
    digest: str
    """Of the file that was recognised."""
    array: str
    array_digest: str
    shape: tuple[int, int]


class HeardStore:
    """The store of one recogniser's results.

    `recogniser`: its name, kind (`ctc` or `seq2seq`), digest of weights, and what decoding needs.
    `labels`: the text of each label; none for encoder states.
    """

    def __init__(self, path: Path, recogniser: dict[str, Any], labels: Sequence[str]) -> None:
        self.path, self.recogniser, self.labels = path, recogniser, list(labels)
        self.inputs: list[Input] = []

    @classmethod
    def open(cls, path: Path) -> "HeardStore":
        """Read the manifest; raises StoreError if there is none, or it is damaged."""
        try:
            manifest = read_sealed(path / MANIFEST)
            store = cls(path, manifest["recogniser"], manifest["labels"])
            store.inputs = [Input(**{**each, "shape": tuple(each["shape"])}) for each in manifest["inputs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: {error}", "what `lftpipe recognise` made", "make it with `lftpipe recognise`"
            ) from None
        return store

    @classmethod
    def begin(
        cls, path: Path, recogniser: dict[str, Any], labels: Sequence[str], *, force: bool
    ) -> "HeardStore":
        """Go on with a store of the same recogniser, or begin one."""
        if (path / MANIFEST).is_file() and not force:
            store = cls.open(path)
            if (store.recogniser, store.labels) != (recogniser, list(labels)):
                raise StoreError(
                    f"{path} of {store.recogniser.get('name')}, and now {recogniser.get('name')}",
                    "one recogniser a store",
                    "name another --store, or --force",
                )
            return store
        there = {each.name for each in path.iterdir()} if path.exists() else set()
        if there - {LOCK} and MANIFEST not in there:
            raise StoreError(f"{path}, which lftpipe did not make", "a new folder", "name another --store")
        store = cls(path, recogniser, labels)
        path.mkdir(parents=True, exist_ok=True)
        store._write()
        return store

    def find(self, name: str, digest: str) -> Input | None:
        """An input that was recognised before."""
        return next((each for each in self.inputs if (each.name, each.digest) == (name, digest)), None)

    def add(self, name: str, digest: str, values: Float[np.ndarray, "frame feature"]) -> Input:
        """Keep what was made of an input. Values that overflow float16, or are no numbers, are refused."""
        import zarr

        kept = np.ascontiguousarray(np.maximum(values, np.finfo(np.float16).min), dtype=np.float16)
        if not np.isfinite(kept).all():
            raise StoreError(f"values of {name} that are not finite", "finite ones", "check the recogniser")
        array = f"input-{len(self.inputs):05d}"
        group = zarr.open_group(self.path, mode="a", zarr_format=3)
        group.create_array(array, data=kept, dimension_names=("frame", "feature"), overwrite=True)
        self.inputs = [each for each in self.inputs if each.name != name]
        made = Input(name, digest, array, xxhash.xxh3_128_hexdigest(kept.tobytes()), kept.shape)
        self.inputs.append(made)
        self._write()
        return made

    def read(self, kept: Input) -> Float[np.ndarray, "frame feature"]:
        """What was made of an input; raises StoreError if a byte of it changed."""
        import zarr

        try:
            array: Any = zarr.open_group(self.path, mode="r")[kept.array]
            values = np.ascontiguousarray(array[:])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}, {kept.name}: {error}", "every byte as written", _CURE) from None
        if xxhash.xxh3_128_hexdigest(values.tobytes()) != kept.array_digest:
            raise StoreError(f"{self.path}, {kept.name}: its values changed", "every byte as written", _CURE)
        return values

    def __iter__(self) -> Iterator[tuple[str, Float[np.ndarray, "frame feature"]]]:
        for each in self.inputs:
            yield each.name, self.read(each)

    def _write(self) -> None:
        inputs = [{**vars(each), "shape": list(each.shape)} for each in self.inputs]
        write_sealed(
            self.path / MANIFEST, {"recogniser": self.recogniser, "labels": self.labels, "inputs": inputs}
        )


_CURE = "make it again with `lftpipe recognise --force`"
