"""A store as an xarray data set, its layers by their numbers. Needs the extra `xarray`."""

from pathlib import Path
from typing import TYPE_CHECKING

from lftpipe.errors import StoreError

if TYPE_CHECKING:
    from xarray import Dataset


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
