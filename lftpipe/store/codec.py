"""How states are encoded: int8 per channel with a scale for each block, and lossless compression."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Float32, Int8, Shaped, UInt8, UInt32
from numcodecs import Blosc, blosc  # pyright: ignore[reportAttributeAccessIssue]

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec


# --- The int8 code of states: 0.53 of float16's bytes, and massive activations exact.
#
# A chunk is coded on its own. From every channel its mean over the chunk is taken, and 32 consecutive
# positions of a channel share one scale, their largest magnitude over 127:
#
#     value[position, feature] = mean[feature] + scale[position // 32, feature] * code[position, feature]
#
# Real models put values a thousand times the usual on a few positions and channels (SmolLM2-135M: 28,000
# in channel 507 at position 0, where the rest has an RMS of 10). One of these would coarsen the scale of
# 31 others, so values beyond 6 standard deviations of their channel are kept as they are and do not count
# in scales. At most 1 in 256 values is kept so, the strongest first, which bounds a chunk's size.
#
# Bytes of a chunk of P positions and F features, all little-endian, G = ceil(P / 32):
#
#     uint32            n, number of exact values
#     float16 (F)       mean
#     float16 (G, F)    scale
#     int8    (P, F)    code, -127 .. 127; 0 where the value is exact
#     uint32  (n)       position * F + feature of the exact values, ascending
#     float16 (n)       exact values

_POSITIONS = 32  # that share a scale
_DEVIATIONS = 6  # beyond which a value is kept exact
_EXACT_SHARE = 256  # at most one in so many
_SINK_ENERGY = 8  # times the median: positions beyond do not count in means and deviations
_INFINITY = 0x7C00  # bits of float16's
_TINY = np.float32(2.0**-24)  # the smallest scale


class _Parts(NamedTuple):
    """Views of an encoded chunk."""

    mean: Float16[np.ndarray, "feature"]
    scale: Float16[np.ndarray, "group feature"]
    code: Int8[np.ndarray, "position feature"]
    place: UInt32[np.ndarray, "exact"]
    exact: Float16[np.ndarray, "exact"]


def encoded_bytes(positions: int, features: int, exact: int) -> int:
    """Size of an encoded chunk with so many exact values."""
    groups = -(-positions // _POSITIONS)
    return 4 + 2 * features * (1 + groups) + positions * features + 6 * exact


def encode(values: Float16[np.ndarray, "position feature"]) -> UInt8[np.ndarray, "byte"]:
    """Code one chunk."""
    if (values.view(np.uint16) & np.uint16(0x7FFF)).max() >= _INFINITY:
        raise ValueError("states that are not finite have no int8 code")
    wide = widen(values)
    mean, limit = _centre(wide)
    size = np.abs(wide)
    peaks = _group_maxima(size)
    place = _outliers(size, peaks, limit)
    if len(place):
        wide.reshape(-1)[place] = 0
        size.reshape(-1)[place] = 0
        peaks = _group_maxima(size)
    scale = (peaks / 127).astype(np.float16)
    scale.view(np.uint16)[...] += (
        scale.astype(np.float32) * np.float32(127.5) <= peaks
    )  # rounded too far down
    positions, features = values.shape
    encoded = np.empty(encoded_bytes(positions, features, len(place)), np.uint8)
    encoded[:4].view(np.uint32)[...] = len(place)
    parts = _parts(encoded, positions, features)
    parts.mean[...], parts.scale[...] = mean, scale
    parts.place[...], parts.exact[...] = place, values.reshape(-1)[place]
    fraction = 1 / np.maximum(scale.astype(np.float32), _TINY)
    for rows, group in _groups(wide, fraction):
        rows *= group
    np.rint(wide, out=wide)
    np.copyto(parts.code, wide, casting="unsafe")
    return encoded


def decode(encoded: UInt8[np.ndarray, "byte"], out: Float[np.ndarray, "position feature"]) -> None:
    """Decode one chunk into a float16 or, five times as fast, a float32 array.

    Raises `ValueError` if the bytes are not those of a chunk of this shape.
    """
    parts = _parts(encoded, out.shape[0], out.shape[1])
    mean, scale = parts.mean.astype(np.float32), parts.scale.astype(np.float32)
    wide = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    for (code, group), (rows, _) in zip(_groups(parts.code, scale), _groups(wide, scale), strict=True):
        np.multiply(code, group, out=rows)
    wide += mean
    if wide is not out:
        largest = np.finfo(np.float16).max
        if np.abs(mean).max() + 127 * scale.max() > largest:  # half a step above the largest float16
            np.clip(wide, -largest, largest, out=wide)
        np.copyto(out, wide, casting="same_kind")
    out.reshape(-1)[parts.place] = parts.exact


def _parts(encoded: UInt8[np.ndarray, "byte"], positions: int, features: int) -> _Parts:
    exact = int.from_bytes(encoded[:4].tobytes(), "little") if len(encoded) >= 4 else -1
    if len(encoded) != encoded_bytes(positions, features, exact):
        raise ValueError(f"{len(encoded)} bytes are no int8 chunk of {positions} x {features} values")
    groups, start = -(-positions // _POSITIONS), 4
    views = []
    for dtype, shape in (
        ("<f2", (features,)),
        ("<f2", (groups, features)),
        ("i1", (positions, features)),
        ("<u4", (exact,)),
        ("<f2", (exact,)),
    ):
        stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        views.append(encoded[start:stop].view(dtype).reshape(shape))
        start = stop
    return _Parts(*views)


def _centre(
    wide: Float32[np.ndarray, "position feature"],
) -> tuple[Float16[np.ndarray, "feature"], Float32[np.ndarray, "feature"]]:
    """Take the mean from every channel; the means, and how far from it a usual value is at most.

    Positions of huge norm do not count in either.
    """
    energy = np.einsum("pf,pf->p", wide, wide)
    counts = energy <= _SINK_ENERGY * np.median(energy)
    weight = counts.astype(np.float32) / max(int(counts.sum()), 1)
    mean = (weight @ wide).astype(np.float16)
    wide -= mean.astype(np.float32)
    return mean, _DEVIATIONS * np.sqrt(weight @ np.square(wide))


def _outliers(
    size: Float32[np.ndarray, "position feature"],
    peaks: Float32[np.ndarray, "group feature"],
    limit: Float32[np.ndarray, "feature"],
) -> UInt32[np.ndarray, "exact"]:
    """Flat places of the values beyond the limit of their channel, at most one in 256, the strongest."""
    groups, features = np.nonzero(peaks > limit)
    rows = (groups * _POSITIONS)[:, None] + np.arange(_POSITIONS)
    rows = np.minimum(rows, len(size) - 1)  # the last group may be short; its last row is then met again
    strength = size[rows, features[:, None]] / np.maximum(limit[features], _TINY)[:, None]
    places = rows * size.shape[1] + features[:, None]
    beyond = strength > 1
    strength, (places, first) = strength[beyond], np.unique(places[beyond], return_index=True)
    strength, most = strength[first], size.size // _EXACT_SHARE
    if len(places) > most:
        places = np.sort(places[np.argsort(-strength, kind="stable")[:most]])
    return places.astype(np.uint32)


def _group_maxima(size: Float32[np.ndarray, "position feature"]) -> Float32[np.ndarray, "group feature"]:
    maxima = np.empty((-(-len(size) // _POSITIONS), size.shape[1]), np.float32)
    for rows, out in _groups(size, maxima):
        rows.max(axis=-2, keepdims=True, out=out)
    return maxima


def _groups(rows: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """All whole groups as one array, and the short last one, each with what belongs to it, to broadcast."""
    whole = len(rows) // _POSITIONS
    cut = whole * _POSITIONS
    pairs = [(rows[:cut].reshape(whole, _POSITIONS, -1), groups[:whole, None])] if whole else []
    return pairs + ([(rows[cut:], groups[whole:])] if cut < len(rows) else [])


def widen(values: Float16[np.ndarray, "position feature"]) -> Float32[np.ndarray, "position feature"]:
    """Finite float16 as float32, seven times as fast as numpy: shift the bits, then repair the exponent.

    Infinities and NaN become 65536 and beyond.
    """
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # the sign was spread over four bits
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


# --- The lossless code of states: Blosc's byte shuffle before zstd, about a tenth fewer bytes.
#
# The exponents of neighbouring features are alike, so that the high bytes of float16 and float32 compress;
# the low bytes hardly do. `benchmarks/store_codec.py` measures both. The bytes are those of Zarr's own
# `blosc` codec, which every reader of Zarr 3 knows.

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

    `out`: c-contiguous, of the chunk's shape and dtype.
    Raises `ValueError` if the bytes are not those of a chunk of this size.
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
