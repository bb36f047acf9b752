"""What the codecs do to the states of a real teacher, taken from a float16 store of it.

    lftpipe extract --model smollm2-135m --layers all --tokens 8192 --validation-tokens 0 --store smol.zarr
    python benchmarks/store_codec.py smol.zarr

Prints, layer by layer, the fraction of float16's bytes, the NMSE with and without the first position of every
sequence, and the worst single token; then the speeds on one core, and those of the lossless codec.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from lftpipe.store import Store
from lftpipe.store.codec import compress, decode, decompress, encode


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args()
    store = Store.open(options.store)
    wanted = range(min(options.sequences, store.num_sequences("train")))
    wide, half = (np.empty((store.context, store.width), dtype) for dtype in (np.float32, np.float16))
    seconds, all_bytes, rows = np.zeros(3), 0, []
    print(f"{'layer':>5} {'bytes':>7} {'NMSE':>9} {'without first':>14} {'worst token':>12}")
    for layer in store.layers:
        error, energy, size = [], [], 0
        for values in store.read("train", layer, wanted).astype(np.float16, copy=False):
            times = [time.process_time()]
            encoded = encode(values)
            times.append(time.process_time())
            decode(encoded, half)
            times.append(time.process_time())
            decode(encoded, wide)
            times.append(time.process_time())
            seconds += np.diff(times)
            size += encoded.nbytes
            all_bytes += values.nbytes
            exact = values.astype(np.float64)
            error.append(((half - exact) ** 2).sum(axis=1))
            energy.append((exact**2).sum(axis=1))
        error, energy = np.array(error), np.array(energy)  # (sequence, position)
        rows.append(
            (
                size / (len(wanted) * half.nbytes),
                error.sum() / energy.sum(),
                error[:, 1:].sum() / energy[:, 1:].sum(),
                (error / energy).max(),
            )
        )
        print("{:5} {:7.4f} {:9.2e} {:14.2e} {:12.2e}".format(layer, *rows[-1]))
    print("worst {:7.4f} {:9.2e} {:14.2e} {:12.2e}".format(*np.max(rows, axis=0)))
    for name, took in zip(("encode", "decode to float16", "decode to float32"), seconds, strict=True):
        print(f"{name:18} {all_bytes / took / 1e6:6.0f} MB of float16 a core-second")
    lossless(store, wanted)


def lossless(store: Store, wanted: range) -> None:
    """Print what the lossless codec saves of float16 and float32 states, and its speeds on one core."""
    for dtype in ("float16", "float32"):
        seconds, raw, coded = np.zeros(2), 0, 0
        out = np.empty((store.context, store.width), dtype)
        for layer in store.layers:
            for values in store.read("train", layer, wanted).astype(dtype):
                times = [time.process_time()]
                encoded = np.frombuffer(compress(values), np.uint8)
                times.append(time.process_time())
                decompress(encoded, out)
                times.append(time.process_time())
                assert (out == values).all()
                seconds += np.diff(times)
                raw, coded = raw + values.nbytes, coded + encoded.nbytes
        write, read = raw / seconds / 1e6
        print(
            f"lossless {dtype}: {raw / coded:.3f} times fewer bytes, {write:.0f} MB/s in, {read:.0f} MB/s out"
        )


if __name__ == "__main__":
    main()
