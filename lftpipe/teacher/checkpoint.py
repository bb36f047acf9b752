"""Reading single tensors out of a safetensors checkpoint, without loading the model."""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lftpipe.errors import TeacherError, foreign


class Checkpoint:
    """The tensors of one folder in transformers' format, read by name from the disk.

    Raises
    ------
    TeacherError
        If the folder holds no safetensors. Pickles are never loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            names = _files_of(index)
            if single.exists() and names != [single.name]:
                raise TeacherError(
                    f"{folder} with {single.name} and an index of other files",
                    "one source of weights",
                    f"remove {single.name} or {index.name}, whichever is not the model",
                )
            self.files = [folder / name for name in names]
        else:
            self.files = [single]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise TeacherError(
                f"{folder} without {', '.join(missing)}",
                "weights as safetensors (pickles are never loaded)",
                "save the model with transformers' save_pretrained",
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the files, by its name there."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        return shapes

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of elements of every tensor, by name."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        places: dict[str, Path] = {}
        for file in self.files:
            with self._open(file) as tensors:
                places |= dict.fromkeys(tensors.keys(), file)
        return places

    def _open(self, file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise TeacherError(f"damaged file {file}", "safetensors", f"fetch it again ({error})") from error

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, as float32.

        Raises
        ------
        TeacherError
            If one of them is not in the checkpoint.
        """
        absent = [name for name in names if name not in self._file_of]
        if absent:
            raise TeacherError(
                f"checkpoint {self.folder} without {absent[0]}",
                "the tensors of its model type",
                "fetch or save the model again",
            )
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._file_of[name] for name in names}):
            with self._open(file) as content:
                for name in names:
                    if self._file_of[name] == file:
                        tensors[name] = content.get_tensor(name).float()
        return tensors

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the bytes of all weight files."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        return total.hexdigest()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._file_of


class Overlay(Checkpoint):
    """A checkpoint some of whose tensors are others: what healing changed of a teacher.

    Its digest is that of the checkpoint below it, by which runs know their teacher.
    """

    def __init__(self, below: Checkpoint, changed: dict[str, Tensor]) -> None:
        super().__init__(below.folder)
        self.below, self.changed = below, changed

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the checkpoint below it."""
        return self.below.shapes

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Those of the checkpoint below it."""
        return self.below.sizes

    @cached_property
    def digest(self) -> str:
        """That of the checkpoint below it."""
        return self.below.digest

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return self.below.has(name)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, as float32; those that were changed in their new form."""
        kept = self.below.read([name for name in names if name not in self.changed])
        return {name: self.changed[name] if name in self.changed else kept[name] for name in names}


def _files_of(index: Path) -> list[str]:
    with foreign(TeacherError, f"damaged {index}", "the index of a checkpoint", "fetch it again"):
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if wrong := [
            name for name in names if Path(name).name != name or Path(name).suffix != ".safetensors"
        ]:
            raise TeacherError(
                f"{index} that names {wrong[0]}",
                "safetensors files of the same folder (pickles are never loaded)",
                "save the model with transformers' save_pretrained",
            )
        return names
