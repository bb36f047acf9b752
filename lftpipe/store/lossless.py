"""The lossless code of states: Blosc's byte shuffle before zstd, about a tenth fewer bytes.

The exponents of neighbouring features are alike, so that the high bytes of float16 and float32 compress; the
low bytes hardly do. `benchmarks/store_codec.py` measures both. The bytes are those of Zarr's own
`blosc` codec, which every reader of Zarr 3 knows.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped, UInt8
from numcodecs import Blosc, blosc  # pyright: ignore[reportAttributeAccessIssue]

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec

#: Zstd gains nothing from more effort here, and larger blocks cost memory alone.
LEVEL, BLOCK_BYTES = 1, 2**18

_CODEC = Blosc(cname="zstd", clevel=LEVEL, shuffle=Blosc.SHUFFLE, blocksize=BLOCK_BYTES)

#: Most bytes that Blosc adds to a chunk that does not compress.
OVERHEAD = 16


def compress(values: Shaped[np.ndarray, "position feature"]) -> bytes:
    """Code one chunk; the same values give the same bytes."""
    # Blosc's threads would store their blocks in the order in which they finish.
    blosc.use_threads = False
    return _CODEC.encode(np.ascontiguousarray(values))


def decompress(encoded: UInt8[np.ndarray, "byte"], out: Shaped[np.ndarray, "position feature"]) -> None:
    """Decode one chunk into an array of its own dtype.

    Parameters
    ----------
    out
        C-contiguous, of the chunk's shape and dtype.

    Raises
    ------
    ValueError
        If the bytes are not those of a chunk of this size.
    """
    if len(encoded) < OVERHEAD:
        raise ValueError(f"{len(encoded)} bytes are no Blosc chunk")
    num_bytes, _, size = encoded[4:OVERHEAD].view("<u4").tolist()
    if num_bytes != out.nbytes or size != len(encoded):
        raise ValueError(f"{size} bytes are no Blosc chunk of {out.nbytes} bytes, but of {num_bytes}")
    blosc.use_threads = False
    try:
        _CODEC.decode(encoded, out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def zarr_codec(dtype: str) -> "BloscCodec":
    """What Zarr's metadata says of it."""
    from zarr.codecs import BloscCodec

    size = np.dtype(dtype).itemsize
    return BloscCodec(typesize=size, cname="zstd", clevel=LEVEL, shuffle="shuffle", blocksize=BLOCK_BYTES)
