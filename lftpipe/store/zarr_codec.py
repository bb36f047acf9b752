"""The int8 codec as zarr-python knows it: with lftpipe installed, zarr reads an int8 store as float16.

Installing lftpipe announces the codec through the entry point group ``zarr.codecs``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from lftpipe.store.codec import decode, encode

NAME = "lftpipe.int8"


@dataclass(frozen=True)
class Int8Codec(ArrayBytesCodec):
    """Codes chunks whose last two axes are (position, feature); see `lftpipe.store.codec` for the bytes."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Int8Codec":
        """The codec of an array's metadata."""
        if data["name"] != NAME or data.get("configuration"):
            raise ValueError(f"not a configuration of {NAME}: {data}")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """How an array's metadata names the codec."""
        return {"name": NAME}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse arrays that the codec does not fit."""
        if dtype.to_native_dtype() != np.float16 or len(shape) < 2:
            raise ValueError(f"{NAME} codes float16 with axes (..., position, feature), not {dtype} {shape}")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Refuse: the size depends on the values."""
        raise NotImplementedError("the size depends on the values")

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        values = np.ascontiguousarray(chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(encode(values.reshape(-1, values.shape[-1])).tobytes())

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        values = np.empty(chunk_spec.shape, np.float16)
        encoded = np.frombuffer(chunk_bytes.to_bytes(), np.uint8)
        decode(encoded, values.reshape(-1, values.shape[-1]))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return self._encode_sync(chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_sync(chunk_data, chunk_spec)


def register() -> None:
    """Make zarr know the codec also where lftpipe is used without being installed."""
    register_codec(NAME, Int8Codec)
