"""A checkpoint's tensors by the names that the model's own modules have.

Older checkpoints, and those of models whose experts transformers stacks, go by other names. transformers
knows how to rename and convert them; here it is done for single tensors, so that one layer can be read alone.
"""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lftpipe.errors import TeacherError
from lftpipe.teacher.checkpoint import Checkpoint


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
