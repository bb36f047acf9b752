"""glibc's settings for processes that compute nothing but ours. No torch."""

import ctypes
import sys

# mallopt's parameters (glibc, malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor: the command line's process does, and its workers.

    glibc hands large blocks back to the kernel as soon as they are freed, and every new tensor of a layer
    then faults its pages in again: a fifth of the time of a forward pass of a small model. What it was told
    before cannot be asked for, so a stage that is called from Python leaves its caller's settings alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_ARENA_MAX, 1)  # a thread's own one gives its pages back whatever is said above
