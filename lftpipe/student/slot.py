"""One place of a KV cache."""

from typing import Any

from torch import Tensor, nn


class Slot:
    """One place of a KV cache, whatever index the attention that writes to it believes to have."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache, self._index = cache, index

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of this evaluation, behind those it had before.

        Parameters
        ----------
        layer_idx
            Of the layer that asks, which has a slot of its own instead.
        """
        del layer_idx
        return self._cache.update(keys, values, self._index, *rest, **named)


def number_layer(layer: nn.Module, index: int) -> None:
    """Let a layer's parts take this place of the cache for theirs.

    Parameters
    ----------
    layer
        Of any family; parts that know of a cache have a `layer_idx`.
    """
    for part in layer.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = index  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
