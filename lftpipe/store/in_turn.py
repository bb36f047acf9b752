"""Sequences read once, in order: what is fitted in one pass needs no shuffling and no thread."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from lftpipe.store.reader import Store


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
