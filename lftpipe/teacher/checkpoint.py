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
from lftpipe.families.attention import AttentionContext, attention_context
from lftpipe.families.branches import Branches
from lftpipe.families.family import Family
from lftpipe.families.meta_model import LARGEST_BUFFER

# --- Reading single tensors out of a safetensors checkpoint, without loading the model.


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


# --- A checkpoint's tensors by the names that the model's own modules have.
#
# Older checkpoints, and those of models whose experts transformers stacks, go by other names. transformers
# knows how to rename and convert them; here it is done for single tensors, so that one layer can be read
# alone.


class NamedCheckpoint(Checkpoint):
    """The tensors of one folder, read by the names of a model's modules.

    Parameters
    ----------
    model
        Without weights: it says which tensors there are, which are tied, and how files are converted.
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
        """Number of elements of every parameter that the files hold, by name; tied ones count once."""
        return {name: self._shapes[name].numel() for name in self._shapes if self._is_read(name)}

    def _is_read(self, name: str) -> bool:
        return name in self._parameters and (name in self._sources or name in self._first_of)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._sources or name in self._first_of

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, as float32.

        Raises
        ------
        TeacherError
            If one of them is not in the checkpoint, or has another shape than the config says.
        """
        tensors: dict[str, Tensor] = {}
        made: dict[str, dict[str, Tensor]] = {}
        for name in names:
            source = name if self.has(name) else self._other_name(name)
            target = self._first_of.get(source, source)
            if target not in self._sources:
                raise TeacherError(
                    f"checkpoint {self.folder} without {name}",
                    "the tensors of its model type",
                    "fetch or save the model again",
                )
            if target not in made:
                made[target] = self._made(target)
            value = made[target].get(source)
            if value is None or value.shape != self._shapes[name].shape:
                given = "nothing" if value is None else tuple(value.shape)
                raise TeacherError(
                    f"checkpoint {self.folder} with {given} for {name}",
                    f"shape {tuple(self._shapes[name].shape)}, as config.json says",
                    "fetch or save the model again",
                )
            tensors[name] = value
        return tensors

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

    Parameters
    ----------
    checkpoint
        Its files; only their headers are read.
    """
    shapes = checkpoint.shapes
    lengths = {length for shape in shapes.values() for length in shape}
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) not in lengths:
            _refuse(checkpoint, f"{name} {getattr(config, name)}", "one that a tensor has")
    if config.num_hidden_layers > len(shapes):
        _refuse(checkpoint, f"num_hidden_layers {config.num_hidden_layers}", "no more layers than tensors")


def check_layer(config: Any, family: Family, checkpoint: Checkpoint) -> None:
    """Refuse a config that makes no layer, or one whose tensors have other shapes than the checkpoint's.

    Parameters
    ----------
    config, family
        Of the model; the family is one that is written out.

    Raises
    ------
    TeacherError
        Naming the tensor, or with the reason why there is no layer.
    """
    folder = checkpoint.folder
    with foreign(TeacherError, f"{folder}", "a config that a layer can be built from", "correct config.json"):
        with torch.device("meta"):
            layer = Branches(family, config, 0)
        for name, parameter in layer.layer.named_parameters():
            full = f"{family.layers_prefix}.0.{name}"
            found = checkpoint.shapes.get(full)
            if found is not None and found != tuple(parameter.shape):
                _refuse(
                    checkpoint, f"shape {found} of {full}", f"{tuple(parameter.shape)}, as config.json says"
                )
        _try(config, family, layer)


def _try(config: Any, family: Family, layer: Branches) -> None:
    """Run a layer without weights, so that what its forward pass cannot use is found too."""
    with torch.device("meta"):
        norm, sizes = family.norm(config), [each.numel() for each in family.frame(config).buffers()]
    if max(sizes, default=0) > LARGEST_BUFFER:
        raise ValueError(f"a table of {max(sizes):,} rotary frequencies")
    context = attention_context(family.frame(config), torch.arange(4)[None], one_segment=True)
    cos, sin = (each.to("meta") for each in context.rotary)
    states = torch.empty(1, 4, config.hidden_size, device="meta")
    norm(layer(states, AttentionContext((cos, sin), None, context.position_ids.to("meta"))))


def _refuse(checkpoint: Checkpoint, given: str, expected: str) -> None:
    raise TeacherError(
        f"{checkpoint.folder}: config.json and weights of other models ({given})",
        expected,
        "fetch or save the model again",
    )
