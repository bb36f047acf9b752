"""Single tensors out of safetensors, by the names of a family's modules, checked by their shapes."""

import copy
import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lftpipe.base.errors import TeacherError, foreign

# --- Reading single tensors out of a safetensors checkpoint, without loading the model.


class Checkpoint:
    """The tensors of one folder in transformers' format, read by name from the disk.

    Raises `TeacherError` if the folder holds no safetensors. Pickles are never loaded.
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

        Raises `TeacherError` if one of them is not in the checkpoint.
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


# --- A checkpoint's tensors by the names that the model's own modules have.
#
# Older checkpoints, and those of models whose experts transformers stacks, go by other names. transformers
# knows how to rename and convert them; here it is done for single tensors, so that one layer can be read
# alone.


class NamedCheckpoint(Checkpoint):
    """The tensors of one folder, read by the names of a model's modules.

    `model`: without weights: it says which tensors there are, which are tied, and how files are converted.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        super().__init__(folder)
        self._model = model
        self._shapes: dict[str, Tensor] = model.state_dict()
        self._parameters = {name for name, _ in model.named_parameters()}

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Names that are another tensor's second name."""
        keys = self._model.get_expanded_tied_weights_keys(all_submodels=True) or {}
        return {str(name): str(source) for name, source in dict(keys).items()}

    @property
    def has_untied(self) -> bool:
        """Whether tensors that the config ties are both in the files, and differ."""
        pairs = [pair for pair in self._tied.items() if all(map(self.has, pair))]
        return any(not torch.equal(*self.read(list(pair)).values()) for pair in pairs)

    def check(self) -> None:
        """Refuse files that lack a parameter, or have one of another shape: transformers makes them up.

        Raises `TeacherError` naming it.
        """
        for name in self._parameters:
            _, target = self._found(name)
            converter, sources = self._sources[target]
            if converter is None:
                self._check_shape(name, self.shapes[sources[0][0]])

    @cached_property
    def _sources(self) -> dict[str, tuple[Any, list[tuple[str, str]]]]:
        """By the model's name: what converts, or None, and the file's tensors, each with its pattern."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.core_model_loading import dot_natural_key as natural

        mapping = get_model_conversion_mapping(self._model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self._model.base_model_prefix
        found: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(self._file_of, key=natural):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._shapes)
            if target not in self._shapes and name in self._shapes:
                target, pattern = rename_source_key(name, [], [], prefix, self._shapes)
            if target in self._shapes:
                converter = by_pattern[pattern] if pattern is not None else None
                found.setdefault(target, (converter, []))[1].append((name, pattern or name))
        return found

    @cached_property
    def _first_of(self) -> dict[str, str]:
        """Of a conversion that makes several tensors, the one that it is listed under, by each of them."""
        groups: dict[str, str] = {}
        for target, (converter, _) in self._sources.items():
            if converter is None:
                continue
            first, *others = converter.target_patterns
            for other in others:
                groups[target.replace(first, other)] = target
        return groups

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of elements of every parameter of the model, by name; tied ones count once."""
        return {name: self._shapes[name].numel() for name in self._parameters}

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._sources or name in self._first_of

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, as float32.

        Raises `TeacherError` if one of them is not in the checkpoint, or has another shape than the config
        says.
        """
        tensors: dict[str, Tensor] = {}
        made: dict[str, dict[str, Tensor]] = {}
        for name in names:
            source, target = self._found(name)
            if target not in made:
                made[target] = self._made(target)
            value = made[target].get(source)
            self._check_shape(name, None if value is None else tuple(value.shape))
            assert value is not None
            tensors[name] = value
        return tensors

    def _found(self, name: str) -> tuple[str, str]:
        """The name under which a tensor is in the files, and that of the conversion that makes it."""
        source = name if self.has(name) else self._other_name(name)
        target = self._first_of.get(source, source)
        if target not in self._sources:
            raise TeacherError(
                f"checkpoint {self.folder} without {name}",
                "all tensors of its model type",
                "fetch or save the model again",
            )
        return source, target

    def _check_shape(self, name: str, given: tuple[int, ...] | None) -> None:
        expected = tuple(self._shapes[name].shape)
        if given != expected:
            raise TeacherError(
                f"checkpoint {self.folder} with {given or 'nothing'} for {name}",
                f"shape {expected}, as config.json says",
                "fetch or save the model again",
            )

    def _other_name(self, name: str) -> str:
        """A tied tensor may be in the file by any of its names."""
        first = self._tied.get(name, name)
        names = [first, *(second for second, source in self._tied.items() if source == first)]
        return next((each for each in names if self.has(each)), name)

    def _made(self, target: str) -> dict[str, Tensor]:
        """What a target's tensors in the files become."""
        converter, sources = self._sources[target]
        read = super().read([name for name, _ in sources])
        if converter is None:
            return {target: read[sources[0][0]]}
        converter = copy.deepcopy(converter)
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern, read[name])
        with torch.no_grad():
            made = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


# --- Whether a checkpoint's tensors are those that its config speaks of, seen from their shapes alone.
#
# A config that does not match its weights is refused here, before anything of its sizes is built or
# allocated.


def check_sizes(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a config whose width, vocabulary or number of layers no tensor knows.

    `checkpoint`: its files; only their headers are read.
    """
    shapes = checkpoint.shapes
    lengths = {length for shape in shapes.values() for length in shape}
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) not in lengths:
            _refuse(checkpoint, f"{name} {getattr(config, name)}", "one that a tensor has")
    if config.num_hidden_layers > len(shapes):
        _refuse(checkpoint, f"num_hidden_layers {config.num_hidden_layers}", "no more layers than tensors")


def _refuse(checkpoint: Checkpoint, given: str, expected: str) -> None:
    raise TeacherError(
        f"{checkpoint.folder}: config.json and weights of other models ({given})",
        expected,
        "fetch or save the model again",
    )
