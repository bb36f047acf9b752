"""How many random cases a law is tried on: a few in the everyday suite, more by `make fuzz`."""

import os


def cases(usual: int, *, most: int) -> int:
    """`usual`, or what `LFTPIPE_FUZZ_CASES` says, up to `most`."""
    return min(most, max(usual, int(os.environ.get("LFTPIPE_FUZZ_CASES", "0"))))
