"""Inner products between clouds of one batch: in float32, or as exactly and faster in a processor's bfloat16 tiles.

The one part of the map that may use torch, and only where that pays: see `pays`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float32

#: `products([m, ...], n)`: every point of the neighbouring clouds `m, ...` times every point of cloud `n`.
Products = Callable[[Sequence[int], int], Float32[np.ndarray, "member sample sample"]]

#: Makes them from the clouds, all in one piece.
MakeProducts = Callable[[Float32[np.ndarray, "cloud sample feature"]], Products]

#: Floating-point operations that float32 takes as much longer for as importing torch takes: about a second.
WORTH_IMPORTING = 4e11


def pays(work: float) -> bool:
    """Whether bfloat16 tiles (Intel's AMX) are there, and gain more than importing torch costs.

    Parameters
    ----------
    work
        Floating-point operations of all products.
    """
    info = Path("/proc/cpuinfo")
    tiles = info.is_file() and "amx_bf16" in info.read_text()
    return tiles and ("torch" in sys.modules or work > WORTH_IMPORTING)


def plain_products(points: Float32[np.ndarray, "cloud sample feature"]) -> Products:
    """Products in float32 by numpy's BLAS."""

    def products(members: Sequence[int], n: int) -> Float32[np.ndarray, "member sample sample"]:
        left = points[members[0] : members[-1] + 1]
        return (left.reshape(-1, left.shape[-1]) @ points[n].T).reshape(*left.shape[:2], -1)

    return products


@contextmanager
def fastest(work: float) -> Iterator[MakeProducts]:
    """What makes the fastest `Products` for so much work (see `pays`), to be made and called within.

    Meanwhile torch, if it is used, runs each product on the thread that calls it, and multiplies float32
    matrices in bfloat16.
    """
    if not pays(work):
        yield plain_products
        return
    import torch

    from lftpipe.compute import prepare_processor

    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    prepare_processor(1)
    torch.set_float32_matmul_precision("medium")
    try:
        yield split_products
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])


def split_products(points: Float32[np.ndarray, "cloud sample feature"]) -> Products:
    """Products by bfloat16, as exact as float32's; to be called within `fastest`.

    A number is `high + low` of two bfloat16 numbers: a float16 number exactly, a float32 one to 2^-17. Of its
    product with another, `high high'` is exact and summed in float32. The cross terms are smaller by 2^8, so that
    their sums may be rounded to bfloat16. `low low'`, smaller by 2^16 and of random sign, is left out.
    """
    import torch

    given = torch.from_numpy(points)
    high = given.bfloat16()
    rounded = high.float()
    low = (given - rounded).bfloat16()

    def products(members: Sequence[int], n: int) -> Float32[np.ndarray, "member sample sample"]:
        place = slice(members[0], members[-1] + 1)
        main = torch.mm(rounded[place].flatten(0, 1), rounded[n].T)
        cross = torch.mm(high[place].flatten(0, 1), low[n].T)
        cross.addmm_(low[place].flatten(0, 1), high[n].T)
        main += cross
        return main.view(len(members), -1, points.shape[1]).numpy()

    return products
