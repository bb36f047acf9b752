"""What a store says of itself: where its states come from, which there are, how many, in which form."""

from pathlib import Path
from typing import Any

from lftpipe.errors import StoreError
from lftpipe.store.layout import ArrayLayout, StoreSpec
from lftpipe.store.windows import ROLLING_SPLIT, Windows


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
