"""One place of a KV cache."""

from typing import Any

from torch import Tensor


class Slot:
    """One place of a KV cache, whatever index the attention that writes to it believes to have."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        del layer_idx
        return self._cache.update(keys, values, self._index, *rest, **named)
