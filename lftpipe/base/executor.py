"""What all processes have in common that a command starts to share its work."""

import multiprocessing
import os
import signal
import threading

import torch


def place_of(device: str, threads: int | None, number: int, count: int) -> tuple[str, int | None]:
    """The device and the threads of one of several processes: a GPU each, or a part of the threads."""
    if device == "cuda":
        return f"cuda:{number % max(torch.cuda.device_count(), 1)}", threads
    return device, max(1, (threads or torch.get_num_threads()) // count)


def begin() -> None:
    """Leave Ctrl-C to the process that started this one, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
